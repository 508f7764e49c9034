"""The training objective: noise and timestep of each sample, the target velocity, and the loss.

Pure functions that do not know models. The noise of a sample depends on (seed, epoch, position) only: not on the
process, the batch or the order of samples.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from wan_core.sampling.experts import ROUNDING
from wan_core.sampling.solvers import NUM_TRAIN_TIMESTEPS, shifted_sigmas, training_weights


@dataclass(frozen=True)
class Noising:
    """The noise of a batch and its level, on the CPU in float32.

    `noise` has the shape of the latents; `sigmas`, `timesteps` (0 to 1000) and `weights` are (B,).
    """

    noise: Tensor
    sigmas: Tensor
    timesteps: Tensor
    weights: Tensor


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The training schedule: 1000 points of the sampler's own formula, index 0 with the most noise.

    Attributes:
        sampling: `uniform` draws the index evenly, which with the reference's shift of 5 means mostly high noise;
            `logit_normal` draws its place as the logistic function of a normal number (Esser et al. 2024).
        shift: moves the points towards high noise.
        weighting: `bell` is the reference's weight around timestep 500, `none` weighs all timesteps equally.
        low, high: the part of the index range that is drawn, in fractions; `expert_range` has those of an expert.
        boundary: where both experts of a pair are trained, the fraction of the noise from which on the first one works.
    """

    sampling: str = "uniform"
    shift: float = 5.0
    weighting: str = "bell"
    low: float = 0.0
    high: float = 1.0
    boundary: float | None = None

    @cached_property
    def sigmas(self) -> Tensor:
        """Noise levels (1000,) in float32."""
        return shifted_sigmas(NUM_TRAIN_TIMESTEPS, self.shift)[:-1].float()

    @cached_property
    def weights(self) -> Tensor:
        """Loss weights (1000,) of mean 1 in float32."""
        if self.weighting == "none":
            return torch.ones(NUM_TRAIN_TIMESTEPS)
        return training_weights(self.shift)

    def draw(self, shape: Sequence[int], seed: int, epoch: int, positions: Sequence[int]) -> Noising:
        """Noise and timesteps for samples at `positions` of `epoch`, whose latents are (len(positions), *shape)."""
        noise, indices = [], []
        for position in positions:
            generator = generator_for("noise", seed, epoch, position)
            indices.append(self._index(generator))
            noise.append(torch.randn(tuple(shape), generator=generator))
        return self.at(torch.stack(noise), torch.tensor(indices))

    def at(self, noise: Tensor, indices: Tensor) -> Noising:
        """The noising with this noise and these schedule indices (B,)."""
        sigmas = self.sigmas[indices]
        return Noising(noise, sigmas, sigmas * NUM_TRAIN_TIMESTEPS, self.weights[indices])

    def expert_of(self, timestep: float) -> int:
        """The number of the expert that is trained at `timestep`, 0 to 1000, as a run of the model chooses it."""
        return 0 if self.boundary is None or bool(_works_high(timestep, self.boundary)) else 1

    def experts(self, seed: int, epoch: int, positions: Sequence[int]) -> list[int]:
        """The expert that each sample at `positions` of `epoch` trains, by the timestep that `draw` gives it."""
        if self.boundary is None:
            return [0] * len(positions)
        indices = (self._index(generator_for("noise", seed, epoch, position)) for position in positions)
        return [self.expert_of(self.sigmas[index].item() * NUM_TRAIN_TIMESTEPS) for index in indices]

    @property
    def _indices(self) -> tuple[int, int]:
        """The first schedule index that is drawn, and the one after the last."""
        return int(self.low * NUM_TRAIN_TIMESTEPS), max(1, int(self.high * NUM_TRAIN_TIMESTEPS))

    @property
    def timestep_range(self) -> tuple[float, float]:
        """The timesteps between which is drawn, 0 to 1000."""
        first, last = self._indices
        levels = (*self.sigmas.tolist(), 0.0)
        return levels[last] * NUM_TRAIN_TIMESTEPS, levels[first] * NUM_TRAIN_TIMESTEPS

    def _index(self, generator: torch.Generator) -> int:
        first, last = self._indices
        if self.sampling == "uniform":
            return int(torch.randint(min(first, last - 1), last, (), generator=generator))
        # Sampled through quantiles of the truncated normal distribution, so that no sample has to be rejected.
        bounds = torch.special.ndtr(torch.logit(1 - torch.tensor([self.high, self.low], dtype=torch.float64)))
        quantile = bounds[0] + (bounds[1] - bounds[0]) * torch.rand((), generator=generator, dtype=torch.float64)
        place = torch.sigmoid(torch.special.ndtri(quantile))
        return min(max(int((1 - place) * NUM_TRAIN_TIMESTEPS), first), last - 1)


def expert_range(is_high: bool, boundary: float, shift: float) -> tuple[float, float]:
    """The `low` and `high` of an `Objective` that trains one expert of a pair on the timesteps at which it works.

    Args:
        is_high: the expert of the noisier timesteps, from 1000 * `boundary` on; else that of all others.
        boundary: 0 to 1.
        shift: of the objective.
    """
    split = int(_works_high(Objective(shift=shift).sigmas * NUM_TRAIN_TIMESTEPS, boundary).sum()) / NUM_TRAIN_TIMESTEPS
    return (0.0, split) if is_high else (split, 1.0)


def _works_high(timesteps: Any, boundary: float) -> Any:
    """Whether the first expert of a pair works at `timesteps`, a number or a tensor."""
    return timesteps >= NUM_TRAIN_TIMESTEPS * boundary - ROUNDING


def generator_for(purpose: str, *numbers: int) -> torch.Generator:
    """A generator of its own for a purpose and a place in the run."""
    return torch.Generator().manual_seed(seed_for(purpose, *numbers))


def seed_for(purpose: str, *numbers: int) -> int:
    """A seed that differs in all its bits when the purpose or one number differs."""
    text = "/".join((purpose, *map(str, numbers)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def noisy(latents: Tensor, noising: Noising) -> Tensor:
    """`latents` (B, ...) at the drawn noise levels, in float32."""
    sigmas = _per_sample(noising.sigmas, latents)
    return (1 - sigmas) * latents.float() + sigmas * noising.noise.to(latents.device)


def errors(velocity: Tensor, latents: Tensor, noising: Noising, without: Sequence[int] = ()) -> Tensor:
    """Mean squared error of each sample's velocity (B,), in float32, without the weight.

    The latent frames `without`, which the model is given as they are, do not count.
    """
    target = noising.noise.to(latents.device) - latents.float()
    squared = (velocity.float() - target).square()
    if without:
        counted = [frame for frame in range(squared.shape[2]) if frame not in without]
        squared = squared[:, :, counted]
    return squared.flatten(1).mean(1)


def weighted(error: Tensor, noising: Noising) -> Tensor:
    """The loss of each sample (B,): its error times the weight of its timestep."""
    return error * noising.weights.to(error.device)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device).reshape(-1, *(1,) * (like.ndim - 1))
