"""Noise schedules of rectified flow and the solvers that step along them.

`x = (1 - sigma) * clean + sigma * noise`; the model predicts the velocity `noise - clean`; its timestep is `1000 *
sigma`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


def shifted_sigmas(steps: int, shift: float, denoise: float = 1.0, *, exact_ends: bool = True) -> Tensor:
    """Noise levels (steps + 1,) in float64, from the highest down to a final 0.

    `u` falls evenly from `denoise`, and `sigma = shift * u / (1 + (shift - 1) * u)` (DiffSynth-Studio
    `FlowMatchScheduler`).

    Args:
        exact_ends: count `u` from both ends, as PyTorch does. Without it `u` is NumPy's, which counts from the first:
            where a timestep is a whole number, this decides what the authors' solvers truncate it to.
    """
    u = torch.linspace(denoise, 0, steps + 1, dtype=torch.float64)
    if not exact_ends:
        u = torch.from_numpy(np.linspace(denoise, 0, steps + 1))
    return shift * u / (1 + (shift - 1) * u)


def training_weights(shift: float = 5.0) -> Tensor:
    """Loss weight of each of the 1000 training timesteps, (1000,), with mean 1: a bell around timestep 500, shifted so
    that its lowest value is zero (DiffSynth-Studio `FlowMatchScheduler.set_training_weight`).

    Index 0 is the noisiest timestep. The shift puts many timesteps at high noise, which the weights balance.
    """
    timesteps = shifted_sigmas(NUM_TRAIN_TIMESTEPS, shift)[:-1].float() * NUM_TRAIN_TIMESTEPS
    bell = torch.exp(-2 * ((timesteps - NUM_TRAIN_TIMESTEPS / 2) / NUM_TRAIN_TIMESTEPS) ** 2)
    bell = bell - bell.min()
    return bell * (NUM_TRAIN_TIMESTEPS / bell.sum())


def add_noise(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """`clean` with the fraction `sigma` replaced by noise, the forward process of rectified flow."""
    return (1 - sigma) * clean + sigma * noise


def initial_noise(
    shape: tuple[int, ...], seed: int, rand_device: torch.device | str, device: torch.device, prefix: int = 0
) -> Tensor:
    """Standard normal noise (B, C, prefix + F, h, w) in float32 for `shape` = (B, C, F, h, w), drawn on `rand_device`.

    Drawn on the CPU it is the same on every machine, and without a prefix equal to ComfyUI's for the same shape and
    seed. All frames are drawn at once and the last `prefix` of them moved to the front, so that a seed gives the video
    that it gives in DiffSynth-Studio (`WanVideoUnit_NoiseInitializer`).
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
        timesteps: the model's timestep at the first evaluation of each step.
        evaluations: its timesteps at all evaluations of each step.
        memory: the tensors that the next step needs from earlier ones. With them a run that is continued elsewhere
            gives exactly the same result; without them a solver begins again at first order.
        HIGHEST: where the unshifted schedule begins.
        WHOLE_TIMESTEPS: whether timesteps are truncated to whole numbers, as the Wan authors' solvers do.
    """

    HIGHEST = 1.0
    WHOLE_TIMESTEPS = False

    def __init__(self, sigmas: Sequence[float] | Tensor, *, seed: int = 0, rand_device: str = "cpu") -> None:
        """`seed` and `rand_device` are for solvers that draw noise."""
        self.sigmas = [float(sigma) for sigma in sigmas]
        timesteps = ([sigma * NUM_TRAIN_TIMESTEPS for sigma in self.levels(i)] for i in range(len(self.sigmas) - 1))
        self.evaluations = [tuple(float(int(t)) if self.WHOLE_TIMESTEPS else t for t in step) for step in timesteps]
        self.timesteps = [first for first, *_ in self.evaluations]
        self.memory: dict[str, Tensor] = {}
        self._seed, self._rand_device = seed, rand_device

    def levels(self, index: int) -> Sequence[float]:
        """The noise levels at which step `index` evaluates the model; the first is `sigmas[index]`."""
        return self.sigmas[index : index + 1]

    def step(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        """Latents at `sigmas[index + 1]` from latents `x` and velocity at `sigmas[index]`."""
        raise NotImplementedError

    def advance(self, velocity: Tensor, index: int, x: Tensor, evaluate: Evaluate) -> Tensor:
        """As `step`; a solver that needs further velocities within the step calls `evaluate` for them."""
        return self.step(velocity, index, x)

    def clean(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        """The estimate of the clean latents: `x - sigma * velocity`."""
        return x.sub(velocity, alpha=self.sigmas[index])

    def noise(self, index: int, x: Tensor) -> Tensor:
        """Fresh standard normal noise for step `index`, that of seed + index + 1, so a continued run draws the same."""
        seed = (self._seed + index + 1) % 2**64
        return initial_noise(tuple(x.shape), seed, self._rand_device, x.device)


class Euler(Solver):
    """First order: straight along the velocity. The reference's solver."""

    def step(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        return x.add(velocity, alpha=self.sigmas[index + 1] - self.sigmas[index])


class Heun(Euler):
    """Second order: along the mean of the velocities at both ends of the step. The step to 0 is Euler's, because there
    is no noise left to predict at its end.
    """

    def levels(self, index: int) -> Sequence[float]:
        return self.sigmas[index : index + (2 if self.sigmas[index + 1] else 1)]

    def advance(self, velocity: Tensor, index: int, x: Tensor, evaluate: Evaluate) -> Tensor:
        end = self.step(velocity, index, x)
        if len(self.evaluations[index]) == 1:
            return end
        return self.step(torch.lerp(velocity, evaluate(end, 1), 0.5), index, x)


class LCM(Solver):
    """For models distilled to a few steps: jump to the clean latents, then add fresh noise down to the next level."""

    def step(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        clean, sigma = self.clean(velocity, index, x), self.sigmas[index + 1]
        if sigma == 0:
            return clean
        return torch.lerp(clean, self.noise(index, x), sigma)


class EulerAncestral(Solver):
    """First order with fresh noise: a step of Euler to below the next level, then noise up to it (ComfyUI
    comfy/k_diffusion/sampling.py `sample_euler_ancestral_RF` with eta 1).
    """

    def step(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        start, end = self.sigmas[index], self.sigmas[index + 1]
        down = end * end / start
        out = x.add(velocity, alpha=down - start)
        if end == 0:
            return out
        scale = (1 - end) / (1 - down)
        return out.mul_(scale).add_(self.noise(index, x), alpha=math.sqrt(max(0.0, end**2 - (down * scale) ** 2)))


def log_snr(sigma: float) -> float:
    """Half the logarithm of the signal-to-noise ratio, `ln(1 - sigma) - ln(sigma)` (lambda in the papers); infinite at
    the ends.
    """
    if sigma in (0, 1):
        return -math.inf if sigma else math.inf
    return math.log1p(-sigma) - math.log(sigma)


class UniPC(Solver):
    """Order 2 with B(h) = e^-h - 1, predicting the clean latents, first order in the first and the last step
    (Wan-Video/Wan2.1 wan/utils/fm_solvers_unipc.py; Zhao et al. 2023).

    Each step first corrects the latents that the step before predicted, by the velocity that the model gives for them.
    `memory`: x, the latents of the last step; now and before, the clean latents estimated by the last two steps.
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
        # x is scaled by sigma_t / sigma_s, the clean estimate by alpha_t * (e^-h - 1); alpha = 1 - sigma.
        phi = math.expm1(-self._rise(index + 1))
        out = x.mul(end / start).sub_(clean, alpha=(1 - end) * phi)
        if before is not None and index < len(self.sigmas) - 2:
            difference = before.sub(clean)
            out.sub_(difference, alpha=(1 - end) * phi / 2 / self._ratio(index + 1))
        return out

    def _corrected(self, clean: Tensor, index: int) -> Tensor:
        """The latents at `index`, corrected by the clean latents that the model estimates there."""
        x, now, before = self.memory["x"], self.memory["now"], self.memory.get("before")
        start, end, h = self.sigmas[index - 1], self.sigmas[index], self._rise(index)
        phi = math.expm1(-h)
        out = x.mul(end / start).sub_(now, alpha=(1 - end) * phi)
        weight_now = 0.5
        if before is not None:
            # The weights solve the paper's 2 x 2 system R rho = b, with b = (first, 2 * second) / phi.
            first = phi / -h - 1
            second = first / -h - 0.5
            ratio = self._ratio(index)
            weight_before = (2 * second / phi - first / phi) / (ratio - 1)
            weight_now = first / phi - weight_before
            out.sub_(before.sub(now), alpha=(1 - end) * phi * weight_before / ratio)
        return out.sub_(clean.sub(now), alpha=(1 - end) * phi * weight_now)

    def _rise(self, index: int) -> float:
        """h, by how much `log_snr` rises in the step to `index`."""
        return log_snr(self.sigmas[index]) - log_snr(self.sigmas[index - 1])

    def _ratio(self, index: int) -> float:
        return -self._rise(index - 1) / self._rise(index)


class DPMpp2M(Solver):
    """Second order from two model evaluations, predicting the clean latents, first order in the first and the last step
    (Wan-Video/Wan2.1 wan/utils/fm_solvers.py; Lu et al. 2022). `memory`: before, the clean latents that the last step
    estimated.
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


class DPMpp2MSDE(Solver):
    """DPM-Solver++ of second order with fresh noise, "sde-dpmsolver++" of the scheduler that `DPMpp2M` follows, first
    order in the first and the last step. `memory`: before, the clean latents that the last step estimated.
    """

    WHOLE_TIMESTEPS = True

    def step(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        clean, before = self.clean(velocity, index, x), self.memory.get("before")
        self.memory = {"before": clean}
        start, end = self.sigmas[index], self.sigmas[index + 1]
        h = log_snr(end) - log_snr(start)
        part = -math.expm1(-2 * h)  # of the noise that is replaced
        out = x.mul(end / start * math.exp(-h)).add_(clean, alpha=(1 - end) * part)
        if before is not None and index < len(self.sigmas) - 2:
            ratio = (log_snr(start) - log_snr(self.sigmas[index - 1])) / h
            out.add_(clean.sub(before), alpha=(1 - end) * part / 2 / ratio)
        return out if end == 0 else out.add_(self.noise(index, x), alpha=end * math.sqrt(part))


class ResMultistep(Solver):
    """Second order from two model evaluations, exponential in the logarithm of sigma; first order in the first step and
    in that to 0 (ComfyUI comfy/k_diffusion/sampling.py `sample_res_multistep`; Zhang et al. 2023, arXiv 2308.02157).
    `memory`: before, the clean latents that the last step estimated.
    """

    def step(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        clean, before = self.clean(velocity, index, x), self.memory.get("before")
        self.memory = {"before": clean}
        start, end = self.sigmas[index], self.sigmas[index + 1]
        out = x.mul(end / start).add_(clean, alpha=1 - end / start)
        if before is None or end == 0:
            return out
        h, last = math.log(start / end), math.log(self.sigmas[index - 1] / start)
        # h * phi_2(-h) over the distance of both estimates, in steps
        return out.add_(clean.sub(before), alpha=(1 + math.expm1(-h) / h) * h / last)


class ErSde(Solver):
    """Third order from three model evaluations, with fresh noise: a solver of extended reverse-time SDEs (Cui et al.
    2023, arXiv 2309.06169; ComfyUI comfy/k_diffusion/sampling.py `sample_er_sde`). First order in the first step and in
    that to 0, second order in the second.

    `memory`: before, the clean latents that the last step estimated; slope, how fast they changed in it.
    """

    LARGEST = 1 - 1e-4
    """Where a schedule from 1 begins, because sigma / (1 - sigma) is infinite at 1."""
    POINTS = 200
    """Points of the rectangle rule, as in the published code."""

    def __init__(self, sigmas: Sequence[float] | Tensor, *, seed: int = 0, rand_device: str = "cpu") -> None:
        first, *others = (float(sigma) for sigma in sigmas)
        first = first if first < 1 else max(self.LARGEST, (1 + others[0]) / 2)
        super().__init__([first, *others], seed=seed, rand_device=rand_device)

    def step(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        clean, before, slope = self.clean(velocity, index, x), self.memory.get("before"), self.memory.get("slope")
        self.memory = {"before": clean}
        end = self.sigmas[index + 1]
        if end == 0:
            return clean
        start, alpha = self.sigmas[index], 1 - end
        high, low = self._ratio(index), self._ratio(index + 1)
        kept = float(_er_scale(low) / _er_scale(high))
        out = x.mul(alpha / (1 - start) * kept).add_(clean, alpha=alpha * (1 - kept))
        if before is not None:
            width = (high - low) / self.POINTS
            places = low + np.arange(self.POINTS) * width
            weights = width * float(_er_scale(low)) / _er_scale(places)
            change = clean.sub(before).div_(high - self._ratio(index - 1))
            self.memory["slope"] = change
            out.add_(change, alpha=alpha * (low - high + float(weights.sum())))
            if slope is not None:
                bend = change.sub(slope).div_((high - self._ratio(index - 2)) / 2)
                second = (low - high) ** 2 / 2 + float((weights * (places - high)).sum())
                out.add_(bend, alpha=alpha * second)
        return out.add_(self.noise(index, x), alpha=alpha * math.sqrt(max(0.0, low**2 - (high * kept) ** 2)))

    def _ratio(self, index: int) -> float:
        """Noise over signal, lambda in the paper."""
        return self.sigmas[index] / (1 - self.sigmas[index])


def _er_scale(ratio: Any) -> Any:
    """The paper's noise scale function "ER-SDE 5" of numbers or arrays."""
    return ratio * (np.exp(ratio**0.3) + 10)


SOLVERS: dict[str, type[Solver]] = {
    "euler": Euler,
    "unipc": UniPC,
    "dpm++": DPMpp2M,
    "lcm": LCM,
    "heun": Heun,
    "euler_ancestral": EulerAncestral,
    "dpm++_sde": DPMpp2MSDE,
    "res_multistep": ResMultistep,
    "er_sde": ErSde,
}
"""By name. A solver is a class and its row here."""
