"""Noise schedules of rectified flow and the solvers that step along them: Euler, Heun, LCM, UniPC, DPM-Solver++.

`x = (1 - sigma) * clean + sigma * noise`; the model predicts the velocity `noise - clean`; its timestep is `1000 *
sigma`."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..settings import SamplerSettings

NUM_TRAIN_TIMESTEPS = 1000


def shifted_sigmas(steps: int, shift: float, denoise: float = 1.0) -> Tensor:
    """Noise levels (steps + 1,) in float64, from the highest down to a final 0.

    `u` falls evenly from `denoise`, and `sigma = shift * u / (1 + (shift - 1) * u)` (DiffSynth-Studio
    `FlowMatchScheduler`).
    """
    u = torch.linspace(denoise, 0, steps + 1, dtype=torch.float64)
    return shift * u / (1 + (shift - 1) * u)


def training_weights(shift: float = 5.0) -> Tensor:
    """Loss weight of each of the 1000 training timesteps, (1000,), of mean 1: a bell around timestep 500, zero at its
    lowest.

    Index 0 is the noisiest. It makes up for the points that the shift crowds at high noise (DiffSynth-Studio).
    """
    timesteps = shifted_sigmas(NUM_TRAIN_TIMESTEPS, shift)[:-1].float() * NUM_TRAIN_TIMESTEPS
    bell = torch.exp(-2 * ((timesteps - NUM_TRAIN_TIMESTEPS / 2) / NUM_TRAIN_TIMESTEPS) ** 2)
    bell = bell - bell.min()
    return bell * (NUM_TRAIN_TIMESTEPS / bell.sum())


def add_noise(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """`clean` with `sigma` of it replaced by noise."""
    return (1 - sigma) * clean + sigma * noise


def initial_noise(
    shape: tuple[int, ...], seed: int, rand_device: torch.device | str, device: torch.device, prefix: int = 0
) -> Tensor:
    """Standard normal noise (B, C, prefix + F, h, w) in float32 for `shape` = (B, C, F, h, w), drawn on `rand_device`.

    Drawn on the CPU it is the same on every machine, and without a prefix equal to ComfyUI's for the same shape and
    seed. Prefix frames are drawn as the reference does it, so that a seed gives its film: all frames in one draw, of
    which the last `prefix` ones are moved to the front (DiffSynth-Studio, `WanVideoUnit_NoiseInitializer`).
    """
    generator = torch.Generator(rand_device).manual_seed(seed)
    size = (*shape[:2], prefix + shape[2], *shape[3:])
    noise = torch.randn(size, generator=generator, device=rand_device, dtype=torch.float32).to(device)
    return noise.roll(prefix, 2) if prefix else noise


Evaluate = Callable[[Tensor, int], Tensor]
"""The velocity of latents at that evaluation of the present step, counted from 0."""


class Solver:
    """Turns velocities into latents along a schedule of its own.

    Attributes:
        sigmas: noise levels, one more than there are steps. Python floats, so that the loop never waits for a device.
        timesteps: what the model is given at the first evaluation of each step.
        evaluations: what it is given at all evaluations of each step.
        memory: the tensors that the next step needs from earlier ones. A run that is continued elsewhere with them goes
            on exactly as it would have; without them a solver begins again at first order.
        HIGHEST: where the unshifted schedule begins.
        WHOLE_TIMESTEPS: whether timesteps are cut off to whole numbers, as the Wan authors' solvers do.
    """

    HIGHEST = 1.0
    WHOLE_TIMESTEPS = False

    def __init__(self, sigmas: Sequence[float] | Tensor, *, seed: int = 0, rand_device: str = "cpu") -> None:
        """`seed` and `rand_device` are for solvers that draw noise."""
        self.sigmas = [float(sigma) for sigma in sigmas]
        self.evaluations = [
            tuple(self._timestep(sigma) for sigma in self.levels(index)) for index in range(len(self.sigmas) - 1)
        ]
        self.timesteps = [first for first, *_ in self.evaluations]
        self.memory: dict[str, Tensor] = {}
        self._seed, self._rand_device = seed, rand_device

    def _timestep(self, sigma: float) -> float:
        timestep = sigma * NUM_TRAIN_TIMESTEPS
        return float(int(timestep)) if self.WHOLE_TIMESTEPS else timestep

    def levels(self, index: int) -> Sequence[float]:
        """The noise levels at which step `index` evaluates the model; the first is `sigmas[index]`."""
        return self.sigmas[index : index + 1]

    def step(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        """Latents at `sigmas[index + 1]` from latents `x` and velocity at `sigmas[index]`."""
        raise NotImplementedError

    def advance(self, velocity: Tensor, index: int, x: Tensor, evaluate: Evaluate) -> Tensor:
        """`step`, of solvers that evaluate the model more than once: the first velocity is given, others are asked of
        `evaluate`.
        """
        return self.step(velocity, index, x)

    def clean(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        """The clean latents that a velocity points at."""
        return x.sub(velocity, alpha=self.sigmas[index])


class Euler(Solver):
    """First order: straight along the velocity. The reference's solver."""

    def step(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        return x.add(velocity, alpha=self.sigmas[index + 1] - self.sigmas[index])


class Heun(Euler):
    """Second order from two evaluations of a step: along the mean of the velocities at its two ends. A step to 0, where
    no noise is left to evaluate, is Euler's.
    """

    def levels(self, index: int) -> Sequence[float]:
        return self.sigmas[index : index + (2 if self.sigmas[index + 1] else 1)]

    def advance(self, velocity: Tensor, index: int, x: Tensor, evaluate: Evaluate) -> Tensor:
        end = self.step(velocity, index, x)
        if len(self.evaluations[index]) == 1:
            return end
        return self.step(torch.lerp(velocity, evaluate(end, 1), 0.5), index, x)


class LCM(Solver):
    """For models distilled to a few steps: jump to the clean latents, then add fresh noise down to the next level.

    The noise of step k is that of seed + k + 1, so a continued run draws the same.
    """

    def step(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        clean, sigma = self.clean(velocity, index, x), self.sigmas[index + 1]
        if sigma == 0:
            return clean
        seed = (self._seed + index + 1) % 2**64
        noise = initial_noise(tuple(x.shape), seed, self._rand_device, x.device)
        return torch.lerp(clean, noise, sigma)


def log_snr(sigma: float) -> float:
    """Half the logarithm of the signal-to-noise ratio, `ln(1 - sigma) - ln(sigma)`; infinite at the ends."""
    if sigma in (0, 1):
        return -math.inf if sigma else math.inf
    return math.log1p(-sigma) - math.log(sigma)


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


SOLVERS: dict[str, type[Solver]] = {"euler": Euler, "unipc": UniPC, "dpm++": DPMpp2M, "lcm": LCM, "heun": Heun}


def build_solver(settings: SamplerSettings) -> Solver:
    """The chosen solver on its own schedule, or on the noise levels that the user gave."""
    solver = SOLVERS[settings.solver]
    sigmas: Sequence[float] | None = settings.sigmas
    if sigmas is None:
        highest = min(settings.denoise, solver.HIGHEST)
        sigmas = shifted_sigmas(settings.steps, settings.shift, highest).tolist()
    return solver(sigmas, seed=settings.seed, rand_device=settings.rand_device)
