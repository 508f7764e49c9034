"""Classifier-free guidance around a model."""

import torch
from torch import Tensor

from ..settings import GuidanceSettings
from ..types import Conditioning, Curve, StepInfo
from .predictor import BranchPredictor, joined_branches


class Guided:
    """A predictor that runs the conditional and, for a scale other than 1, the unconditional branch.

    Both branches share every input but the text.
    """

    def __init__(self, model: BranchPredictor, settings: GuidanceSettings) -> None:
        self._model = model
        self._settings = settings

    def __call__(self, x: Tensor, t: float, cond: Conditioning, info: StepInfo) -> Tensor:
        if info.index < self._settings.zero_steps:
            return torch.zeros_like(x)  # CFG-Zero*: the first steps leave the latents as they are
        scale = scale_at(self._settings, info.index, info.total)
        if not guides(scale):
            return self._model(x, t, {"positive": cond}, info)[0]
        positive, negative = self._branches(x, t, cond, info)
        if self._settings.zero_star:
            negative = negative * projection(positive, negative)
        return torch.lerp(negative, positive, scale)

    def _branches(self, x: Tensor, t: float, cond: Conditioning, info: StepInfo) -> tuple[Tensor, Tensor]:
        branches = {"positive": cond, "negative": cond.negative()}
        match self._settings.mode:
            case "interleaved":
                positive, negative = self._model(x, t, branches, info)
            case "batched":
                both = {joined_branches(branches): branches["positive"].joined(branches["negative"])}
                positive, negative = self._model(torch.cat((x, x)), t, both, info)[0].chunk(2)
            case "sequential":
                positive, negative = (self._model(x, t, {name: branch}, info)[0] for name, branch in branches.items())
        return positive, negative


def scale_at(settings: GuidanceSettings, index: int, total: int) -> float:
    """The guidance scale of step `index` of `total`; 1 outside of the interval."""
    return Curve.of(settings.scale, start=settings.start, end=settings.end, outside=1.0).at(index, total)


def guides(scale: float) -> bool:
    """Whether a step of that scale needs the unconditional branch."""
    return scale != 1


def first_steps(settings: GuidanceSettings, total: int) -> set[int]:
    """The steps at which a branch runs for the first time, or again after a step without it: no cached result of the
    step before exists for it.
    """
    runs = [index >= settings.zero_steps for index in range(total)]
    both = [run and guides(scale_at(settings, index, total)) for index, run in enumerate(runs)]
    return {
        index
        for index in range(total)
        if (runs[index] and not (index and runs[index - 1])) or (both[index] and not (index and both[index - 1]))
    }


def projection(positive: Tensor, negative: Tensor) -> Tensor:
    """The factor (B, 1, ...) that brings each unconditional velocity closest to the conditional one (CFG-Zero*)."""
    dims = tuple(range(1, positive.ndim))
    return (positive * negative).sum(dims, keepdim=True) / negative.square().sum(dims, keepdim=True).clamp_min(1e-8)
