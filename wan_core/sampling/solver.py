"""What the loop knows of a solver, and the two that need no history."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .noise import initial_noise
from .schedule import NUM_TRAIN_TIMESTEPS


class Solver:
    """Turns velocities into latents along a schedule of its own.

    Attributes:
        sigmas: noise levels, one more than there are steps. Python floats, so that the loop never waits for a device.
        timesteps: what the model is told at each step.
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
        self.timesteps = [sigma * NUM_TRAIN_TIMESTEPS for sigma in self.sigmas[:-1]]
        if self.WHOLE_TIMESTEPS:
            self.timesteps = [float(int(timestep)) for timestep in self.timesteps]
        self.memory: dict[str, Tensor] = {}
        self._seed, self._rand_device = seed, rand_device

    def step(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        """Latents at `sigmas[index + 1]` from latents `x` and velocity at `sigmas[index]`."""
        raise NotImplementedError

    def clean(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        """The clean latents that a velocity points at."""
        return x.sub(velocity, alpha=self.sigmas[index])


class Euler(Solver):
    """First order: straight along the velocity. The reference's solver."""

    def step(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        return x.add(velocity, alpha=self.sigmas[index + 1] - self.sigmas[index])


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
