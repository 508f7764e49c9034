"""Sliding windows over the time axis, for videos longer than the model was trained on."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..settings import WindowSettings
from ..tiling import Span, blend_weights, plan_spans
from ..types import Conditioning, StepInfo
from .predictor import Predictor

RAMP_OFFSET = 0.5
"""Weights rise as (i + 0.5) / overlap, so that two windows add up to one (DiffSynth-Studio 2.1.12)."""


class Windowed:
    """A predictor that runs another in windows and blends what they say where they overlap.

    Positions restart at 0 in every window. Reference frames in front of the video are attached to each, and their
    velocity is the mean of the windows'.
    """

    def __init__(
        self, predict: Predictor, settings: WindowSettings, frames: int, prompts: Sequence[Conditioning] = ()
    ) -> None:
        """`frames` latent frames are the video; `prompts` give the text of each window, the last one for all after."""
        self._predict, self._frames, self._prompts = predict, frames, prompts
        self._spans = plan_spans(frames, settings.size, settings.stride)
        self._border = settings.size - settings.stride

    def __call__(self, x: Tensor, t: float, cond: Conditioning, info: StepInfo) -> Tensor:
        prefix = x.shape[2] - self._frames
        total, weights = torch.zeros_like(x), x.new_zeros(x.shape[2])
        for number, span in enumerate(self._spans):
            inside = with_text(window_of(cond, span, prefix), self._prompts, number)
            velocity = self._predict(cut(x, span, prefix, 2), t, inside, dataclasses.replace(info, window=number))
            share = torch.cat((x.new_ones(prefix), blend_weights(span, self._border, x.device, RAMP_OFFSET)))
            velocity *= share.view(-1, 1, 1)
            for part, place in ((slice(prefix), slice(prefix)), (slice(prefix, None), _place(span, prefix))):
                total[:, :, place] += velocity[:, :, part]
                weights[place] += share[part]
        return total.div_(weights.view(-1, 1, 1))


def _place(span: Span, prefix: int) -> slice:
    return slice(prefix + span.start, prefix + span.end)


def cut(x: Tensor, span: Span, prefix: int, axis: int) -> Tensor:
    """The first `prefix` positions of an axis, followed by those of `span` counted after them."""
    video = x.narrow(axis, prefix + span.start, span.length)
    return torch.cat((x.narrow(axis, 0, prefix), video), axis) if prefix else video


def window_of(cond: Conditioning, span: Span, prefix: int) -> Conditioning:
    """What of `cond` describes the latent frames of `span`, with the `prefix` reference frames where a field has them.

    Each field is cut along the time axis that it declares.
    """

    def piece(tensor: Tensor, metadata: Mapping[str, Any]) -> Tensor:
        axis = metadata["time"]
        if axis is None:
            return tensor
        return cut(tensor, span, prefix if metadata["prefixed"] else 0, axis)

    return cond.map(piece)


def with_text(cond: Conditioning, prompts: Sequence[Conditioning], number: int) -> Conditioning:
    """`cond` with the text of window `number`, if there are prompts; the last one holds for all further windows."""
    if not prompts:
        return cond
    prompt = prompts[min(number, len(prompts) - 1)]
    return dataclasses.replace(cond, text=prompt.text, negative_text=prompt.negative_text)
