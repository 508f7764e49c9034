"""UniPC, the default solver of the Wan authors' own program."""

import math

from torch import Tensor

from .solver import Solver, log_snr


class UniPC(Solver):
    """Order 2 with B(h) = e^-h - 1, predicting the clean latents, first order in the first and the last step
    (Wan-Video/Wan2.1 wan/utils/fm_solvers_unipc.py; Zhao et al. 2023).

    Each step first corrects the latents that the step before predicted, now that the model has seen them.
    `memory`: x, the latents of the last step; now and before, the clean latents that the last two steps pointed at.
    """

    HIGHEST = 0.999
    WHOLE_TIMESTEPS = True

    def step(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        clean = self.clean(velocity, index, x)
        if "x" in self.memory:
            x = self._corrected(clean, index)
        before = self.memory.get("now")
        self.memory = {"x": x, "now": clean} | ({} if before is None else {"before": before})
        start, end = self.sigmas[index], self.sigmas[index + 1]
        phi = math.expm1(-self._rise(index + 1))
        out = x.mul(end / start).sub_(clean, alpha=(1 - end) * phi)
        if before is not None and index < len(self.sigmas) - 2:
            difference = before.sub(clean)
            out.sub_(difference, alpha=(1 - end) * phi / 2 / self._ratio(index + 1))
        return out

    def _corrected(self, clean: Tensor, index: int) -> Tensor:
        """The latents at `index` by the corrector, which knows what they point at."""
        x, now, before = self.memory["x"], self.memory["now"], self.memory.get("before")
        start, end, h = self.sigmas[index - 1], self.sigmas[index], self._rise(index)
        phi = math.expm1(-h)
        out = x.mul(end / start).sub_(now, alpha=(1 - end) * phi)
        weight_now = 0.5
        if before is not None:
            first = phi / -h - 1
            second = first / -h - 0.5
            ratio = self._ratio(index)
            weight_before = (2 * second / phi - first / phi) / (ratio - 1)
            weight_now = first / phi - weight_before
            out.sub_(before.sub(now), alpha=(1 - end) * phi * weight_before / ratio)
        return out.sub_(clean.sub(now), alpha=(1 - end) * phi * weight_now)

    def _rise(self, index: int) -> float:
        return log_snr(self.sigmas[index]) - log_snr(self.sigmas[index - 1])

    def _ratio(self, index: int) -> float:
        return -self._rise(index - 1) / self._rise(index)
