"""DPM-Solver++ (2M), the other solver of the Wan authors' program."""

import math

from torch import Tensor

from .solver import Solver, log_snr


class DPMpp2M(Solver):
    """Second order from two model evaluations, predicting the clean latents, first order in the first and the last step
    (Wan-Video/Wan2.1 wan/utils/fm_solvers.py; Lu et al. 2022). `memory`: before, the clean latents that the last step
    pointed at.
    """

    WHOLE_TIMESTEPS = True

    def step(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        clean, before = self.clean(velocity, index, x), self.memory.get("before")
        self.memory = {"before": clean}
        levels = [log_snr(sigma) for sigma in self.sigmas[max(index - 1, 0) : index + 2]]
        start, end, h = self.sigmas[index], self.sigmas[index + 1], levels[-1] - levels[-2]
        phi = math.expm1(-h)
        out = x.mul(end / start).sub_(clean, alpha=(1 - end) * phi)
        if before is not None and index < len(self.sigmas) - 2:
            ratio = (levels[1] - levels[0]) / h
            out.sub_(clean.sub(before), alpha=(1 - end) * phi / 2 / ratio)
        return out
