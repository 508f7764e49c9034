"""Noise levels of rectified flow, and Euler's method on them.

`x = (1 - sigma) * clean + sigma * noise`; the model predicts the velocity `noise - clean`; its timestep is `1000 *
sigma`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


def shifted_sigmas(steps: int, shift: float, denoise: float = 1.0) -> Tensor:
    """Noise levels (steps + 1,) in float32, from the highest down to a final 0.

    `u` falls evenly from `denoise`, and `sigma = shift * u / (1 + (shift - 1) * u)` (DiffSynth-Studio
    `FlowMatchScheduler`).
    """
    u = torch.linspace(denoise, 0, steps + 1)
    return shift * u / (1 + (shift - 1) * u)


def training_weights(shift: float = 5.0) -> Tensor:
    """Loss weight of each of the 1000 training timesteps, (1000,), of mean 1: a bell around timestep 500, zero at its
    lowest.

    Index 0 is the noisiest. It makes up for the points that the shift crowds at high noise (DiffSynth-Studio).
    """
    timesteps = shifted_sigmas(NUM_TRAIN_TIMESTEPS, shift)[:-1] * NUM_TRAIN_TIMESTEPS
    bell = torch.exp(-2 * ((timesteps - NUM_TRAIN_TIMESTEPS / 2) / NUM_TRAIN_TIMESTEPS) ** 2)
    bell = bell - bell.min()
    return bell * (NUM_TRAIN_TIMESTEPS / bell.sum())


def add_noise(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """`clean` with `sigma` of it replaced by noise."""
    return (1 - sigma) * clean + sigma * noise


class Solver(Protocol):
    """Turns velocities into latents. `sigmas` (steps + 1,) are Python floats: the loop never waits for the device."""

    sigmas: Sequence[float]

    def step(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        """Latents at `sigmas[index + 1]` from latents `x` and velocity at `sigmas[index]`."""
        ...


class Euler:
    """First order: straight along the velocity. The reference's solver."""

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas.tolist()

    def step(self, velocity: Tensor, index: int, x: Tensor) -> Tensor:
        return x.add(velocity, alpha=self.sigmas[index + 1] - self.sigmas[index])


SOLVERS: dict[str, Callable[[Tensor], Solver]] = {"euler": Euler}
