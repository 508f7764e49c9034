"""Noise levels of rectified flow.

`x = (1 - sigma) * clean + sigma * noise`; the model predicts the velocity `noise - clean`; its timestep is `1000 *
sigma`.
"""

import torch
from torch import Tensor

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
