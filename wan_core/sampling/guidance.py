"""Classifier-free guidance around a model."""

import torch
from torch import Tensor

from ..settings import GuidanceSettings
from ..types import Conditioning, StepInfo
from .predictor import BranchPredictor


class Guided:
    """A predictor that runs the conditional and, for a scale other than 1, the unconditional branch.

    Both branches share every input but the text.
    """

    def __init__(self, model: BranchPredictor, settings: GuidanceSettings) -> None:
        self._model = model
        self._settings = settings

    def __call__(self, x: Tensor, t: float, cond: Conditioning, info: StepInfo) -> Tensor:
        if self._settings.scale == 1:
            return self._model(x, t, {"positive": cond}, info)[0]
        positive, negative = self._branches(x, t, cond, info)
        return torch.lerp(negative, positive, self._settings.scale)

    def _branches(self, x: Tensor, t: float, cond: Conditioning, info: StepInfo) -> tuple[Tensor, Tensor]:
        branches = {"positive": cond, "negative": cond.negative()}
        match self._settings.mode:
            case "interleaved":
                positive, negative = self._model(x, t, branches, info)
            case "batched":
                both = branches["positive"].joined(branches["negative"])
                positive, negative = self._model(torch.cat((x, x)), t, {"both": both}, info)[0].chunk(2)
            case "sequential":
                positive, negative = (self._model(x, t, {name: branch}, info)[0] for name, branch in branches.items())
        return positive, negative
