"""Long videos as a chain of clips: each begins with the last latent frames of the one before."""

import dataclasses

import torch
from torch import Tensor

from ..types import Conditioning, StepInfo
from .predictor import Predictor


class Anchored:
    """A predictor whose first frames after the reference frames are known: their velocity points at `known`.

    A solver then arrives there exactly, and the frames after them see what came before at every noise level.
    """

    def __init__(self, predict: Predictor, known: Tensor, prefix: int, sigmas: list[float]) -> None:
        """`known` (B, 16, n, h, w) are clean latents; `sigmas` the solver's noise levels."""
        self._predict, self._known, self._sigmas = predict, known, sigmas
        self._place = slice(prefix, prefix + known.shape[2])

    def __call__(self, x: Tensor, t: float, cond: Conditioning, info: StepInfo) -> Tensor:
        velocity = self._predict(x, t, cond, info)
        velocity[:, :, self._place] = (x[:, :, self._place] - self._known) / self._sigmas[info.index]
        return velocity


def stating(cond: Conditioning, known: Tensor) -> Conditioning:
    """The conditioning of a clip whose first frames are `known` (B, 16, n, h, w), stated where the model reads it.

    Image-to-video models are told of known frames by a mask and their latents beside the noise, control and camera
    models by the latent of the first frame: without it, every clip but the first would be told that nothing is known.
    The image tokens stay those of the user's pictures, and VACE inputs stay as they are: both are made of pixels, which
    a chain never has.
    """
    if cond.concat is None or cond.layout is None:
        return cond
    concat, frames, start = cond.concat.clone(), known.shape[2], 0
    for slot in cond.layout:
        place = concat[:, start : start + slot.channels]
        match slot.states:
            case "mask":
                place[:, :, :frames] = 1
            case "frames":
                place[:, :, :frames] = known
            case "first":
                place[:, :, :1] = known[:, :, :1]
        start += slot.channels
    return dataclasses.replace(cond, concat=concat)


def colour_corrected(clip: Tensor, like: Tensor, overlap: int, limit: float) -> Tensor:
    """`clip` (B, 16, F, h, w) with each channel pulled towards mean and contrast of the video `like`.

    A channel's mean moves by at most `limit` and its contrast by at most that fraction, so that slow drift is undone
    while a change of scene stays. The pull grows over the first `overlap` frames, so that the clip still joins the one
    before.
    """
    if not limit:
        return clip
    mean, deviation = _channels(clip)
    wanted_mean, wanted_deviation = _channels(like)
    gain = (wanted_deviation / deviation.clamp_min(1e-6)).clamp(1 / (1 + limit), 1 + limit)
    shift = (wanted_mean - mean).clamp(-limit, limit)
    strength = torch.ones(clip.shape[2], device=clip.device)
    ramp = min(overlap, clip.shape[2])
    strength[:ramp] = torch.arange(1, ramp + 1, device=clip.device) / (ramp + 1)
    corrected = (clip - mean) * gain + mean + shift
    return torch.lerp(clip, corrected, strength.view(-1, 1, 1))


def _channels(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((2, 3, 4), keepdim=True), x.std((2, 3, 4), keepdim=True)
