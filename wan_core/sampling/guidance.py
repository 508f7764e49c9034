"""Classifier-free guidance around a model."""

import torch
from torch import Tensor

from ..settings import GuidanceSettings
from ..types import Conditioning, Curve, StepInfo
from .predictor import SKIPPING, BranchPredictor, joined_branches, skip_scale, skipped_blocks


class Guided:
    """A predictor that runs the conditional branch, and those that a step is led away from: the unconditional one for a
    scale other than 1, and the conditional one without some blocks (skip-layer guidance).

    Both texts share every other input.
    """

    def __init__(self, model: BranchPredictor, settings: GuidanceSettings) -> None:
        self._model = model
        self._settings = settings

    def __call__(self, x: Tensor, t: float, cond: Conditioning, info: StepInfo) -> Tensor:
        if info.index < self._settings.zero_steps:
            return torch.zeros_like(x)  # CFG-Zero*: the first steps leave the latents as they are
        scale = scale_at(self._settings, info.index, info.total)
        skip = skip_scale(self._settings, info.index, info.total)
        branches = {"positive": cond}
        if guides(scale):
            branches["negative"] = cond.negative()
        if skip:
            branches[SKIPPING] = cond
        velocities = self._velocities(x, t, branches, info)
        guided = positive = velocities["positive"]
        if guides(scale):
            negative = velocities["negative"]
            if self._settings.zero_star:
                negative = negative * projection(positive, negative)
            guided = torch.lerp(negative, positive, scale)
        return guided + skip * (positive - velocities[SKIPPING]) if skip else guided

    def _velocities(self, x: Tensor, t: float, branches: dict[str, Conditioning], info: StepInfo) -> dict[str, Tensor]:
        if len(branches) == 1 or self._settings.mode == "interleaved":
            return dict(zip(branches, self._model(x, t, branches, info), strict=True))
        alone, found = dict(branches), {}
        if self._settings.mode == "batched":
            # A batch passes through all of its blocks together, so branches that leave some out run by themselves.
            whole = [name for name in alone if not skipped_blocks(self._settings, name, info.index, info.total)]
            if len(whole) > 1:
                first, second = (alone.pop(name) for name in whole)
                both = {joined_branches(whole): first.joined(second)}
                found = dict(zip(whole, self._model(torch.cat((x, x)), t, both, info)[0].chunk(2), strict=True))
        for name, branch in alone.items():
            found[name] = self._model(x, t, {name: branch}, info)[0]
        return found


def scale_at(settings: GuidanceSettings, index: int, total: int) -> float:
    """The guidance scale of step `index` of `total`; 1 outside of the interval."""
    return Curve.of(settings.scale, start=settings.start, end=settings.end, outside=1.0).at(index, total)


def guides(scale: float) -> bool:
    """Whether a step of that scale needs the unconditional branch."""
    return scale != 1


def first_steps(settings: GuidanceSettings, total: int) -> set[int]:
    """The steps at which a branch runs for the first time, again after a step without it, or with other blocks: no
    cached result of the step before exists for it.
    """
    steps = []
    for index in range(total):
        runs = {"positive": True, "negative": guides(scale_at(settings, index, total))}
        runs[SKIPPING] = bool(skip_scale(settings, index, total))
        names = [name for name, does in runs.items() if does and index >= settings.zero_steps]
        steps.append({(name, skipped_blocks(settings, name, index, total)) for name in names})
    return {index for index, now in enumerate(steps) if now - (steps[index - 1] if index else set())}


def projection(positive: Tensor, negative: Tensor) -> Tensor:
    """The factor (B, 1, ...) that brings each unconditional velocity closest to the conditional one (CFG-Zero*)."""
    dims = tuple(range(1, positive.ndim))
    return (positive * negative).sum(dims, keepdim=True) / negative.square().sum(dims, keepdim=True).clamp_min(1e-8)
