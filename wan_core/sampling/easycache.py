"""EasyCache: which steps to leave out, judged during the run (Zhou et al. 2025)."""

from collections.abc import Container

import torch
from torch import Tensor

from ..settings import EasyCacheSettings
from ..types import StepInfo

SAMPLE = 4096
"""About this many tokens are looked at, evenly spread; they tell the change of a sequence well enough."""


class EasyCache:
    """Leaves a step out while the estimated change of the blocks' output adds up to less than the threshold.

    The change is estimated as that of the input times the rate at which the blocks turned one into the other when they
    last ran. The first and last step are computed, and so are `start_step` first ones and those in `forced`. What it
    sees decides, so unlike a plan it waits for the device in every step. `memory` holds, per window: seen, the last
    input; given and made, input and output of the last computed step; rate and change, as numbers.
    """

    def __init__(self, settings: EasyCacheSettings, total: int, forced: Container[int] = ()) -> None:
        self._settings, self._total, self._forced = settings, total, forced
        self.memory: dict[str, Tensor] = {}

    def may_skip(self, index: int) -> bool:
        return max(1, self._settings.start_step) <= index < self._total - 1 and index not in self._forced

    def skips(self, tokens: Tensor, info: StepInfo) -> bool:
        sample, change, rate = _sample(tokens), self._get("change", info), self._get("rate", info)
        seen, made = self._get("seen", info), self._get("made", info)
        self._set("seen", info, sample)
        if rate is None or seen is None or made is None or not self.may_skip(info.index):
            self._set("change", info, torch.zeros((), dtype=torch.float64))
            return False
        estimate = rate * _size(sample, seen) / _size(made)
        change = estimate if change is None else change + estimate
        skips = change.item() < self._settings.threshold
        self._set("change", info, change if skips else torch.zeros((), dtype=torch.float64))
        return skips

    def computed(self, tokens: Tensor, info: StepInfo) -> None:
        sample, given = _sample(tokens), self._get("seen", info)
        last_given, last_made = self._get("given", info), self._get("made", info)
        if given is None:
            raise RuntimeError("`computed` was called before `skips`, which keeps the tokens of the step.")
        if last_given is not None and last_made is not None:
            self._set("rate", info, _size(sample, last_made) / _size(given, last_given))
        self._set("given", info, given)
        self._set("made", info, sample)

    def _get(self, name: str, info: StepInfo) -> Tensor | None:
        return self.memory.get(f"{name}.{info.window}")

    def _set(self, name: str, info: StepInfo, value: Tensor) -> None:
        self.memory[f"{name}.{info.window}"] = value


def _sample(tokens: Tensor) -> Tensor:
    return tokens[:, :: max(1, tokens.shape[1] // SAMPLE)].clone()


def _size(x: Tensor, other: Tensor | None = None) -> Tensor:
    """The mean magnitude of `x`, or of its difference from `other`, as a float64 number on the CPU."""
    difference = x.float() if other is None else x.float() - other.float()
    return difference.abs().mean().cpu().double()
