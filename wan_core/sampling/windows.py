"""Videos longer than the model was trained on: sliding windows over time, and chains of clips."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.config import Geometry
from ..settings import SamplerSettings, WindowSettings
from ..tiling import Span, blend_weights, plan_spans
from ..types import Conditioning, StepInfo, VaceInput
from .predictor import Predictor
from .preview import latents_to_rgb
from .solvers import Solver

RAMP_OFFSET = 0.5
"""Weights rise as (i + 0.5) / overlap, so that two windows add up to one (DiffSynth-Studio 2.1.12)."""


class Windowed:
    """A predictor that runs another one in windows and blends their velocities where they overlap.

    Positions restart at 0 in every window. Each window has the reference frames in front, whose velocity is the mean
    over all windows.
    """

    def __init__(
        self, predict: Predictor, settings: WindowSettings, frames: int, prompts: Sequence[Conditioning] = ()
    ) -> None:
        """`frames`: latent frames of the video; `prompts`: the text of each window, the last one for all after it."""
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
            # The references and the window's frames lie apart in the whole.
            within = slice(prefix + span.start, prefix + span.end)
            for part, place in ((slice(prefix), slice(prefix)), (slice(prefix, None), within)):
                total[:, :, place] += velocity[:, :, part]
                weights[place] += share[part]
        return total.div_(weights.view(-1, 1, 1))


def cut(x: Tensor, span: Span, prefix: int, axis: int) -> Tensor:
    """The first `prefix` positions of an axis and then those of `span`, which are counted from `prefix`."""
    video = x.narrow(axis, prefix + span.start, span.length)
    return torch.cat((x.narrow(axis, 0, prefix), video), axis) if prefix else video


def window_of(cond: Conditioning, span: Span, prefix: int) -> Conditioning:
    """`cond` for the latent frames of `span`: each field is cut along the time axis that it declares, and keeps its
    `prefix` reference frames if it has them.
    """

    def piece(tensor: Tensor, metadata: Mapping[str, Any]) -> Tensor:
        axis = metadata["time"]
        if axis is None:
            return tensor
        return cut(tensor, span, prefix if metadata["prefixed"] else 0, axis)

    return cond.map(piece)


def continuing(settings: SamplerSettings, cond: Conditioning) -> SamplerSettings:
    """`settings` with the chain of clips in which `cond` continues a film; unchanged where it continues none.

    Raises:
        ValueError: they start from a video too, hold other windows, or select a part of the steps.
    """
    film = cond.continues
    if film is None:
        return settings
    clips = film.clip, film.clip - film.keep
    chain = WindowSettings(size=clips[0], stride=clips[1], mode="chain", colour_limit=film.colour_limit)
    if settings.windows not in (None, chain):
        raise ValueError("A film is continued in clips of its own; leave the windows out.")
    if settings.starts_clean:
        raise ValueError("The new frames of a film start from noise; set denoise to 1.")
    return dataclasses.replace(settings, windows=chain)


def with_text(cond: Conditioning, prompts: Sequence[Conditioning], number: int) -> Conditioning:
    """`cond` with the text of window `number`, if there are prompts; the last prompt serves all further windows."""
    if not prompts:
        return cond
    prompt = prompts[min(number, len(prompts) - 1)]
    return dataclasses.replace(cond, text=prompt.text, negative_text=prompt.negative_text)


class Anchored:
    """A predictor whose first frames after the reference frames are known: their velocity leads to `known`.

    A solver then arrives there exactly, and at every noise level the other frames attend to those before them.
    """

    def __init__(self, predict: Predictor, known: Tensor, prefix: int, solver: Solver) -> None:
        """`known` (B, z, n, h, w) are clean latents."""
        self._predict, self._known, self._solver = predict, known, solver
        self._place = slice(prefix, prefix + known.shape[2])

    def __call__(self, x: Tensor, t: float, cond: Conditioning, info: StepInfo) -> Tensor:
        velocity = self._predict(x, t, cond, info)
        # x = clean + sigma * velocity, solved for the velocity.
        sigma = self._solver.levels(info.index)[info.evaluation]
        velocity[:, :, self._place] = (x[:, :, self._place] - self._known) / sigma
        return velocity


class CleanFrames:
    """A predictor for a video some of whose frames are clean at every step: they have no velocity."""

    def __init__(self, predict: Predictor, cond: Conditioning, prefix: int) -> None:
        """`cond` holds the frames; `prefix` reference frames stand before them."""
        assert cond.clean is not None, "asked for where there are clean frames"
        self._predict, self._clean, self._prefix, self._places = predict, cond.clean, prefix, cond.clean_places

    def __call__(self, x: Tensor, t: float, cond: Conditioning, info: StepInfo) -> Tensor:
        velocity = self._predict(x, t, cond, info)
        for place in self._places:
            velocity[:, :, self._prefix + place] = 0
        return velocity

    def put(self, x: Tensor) -> Tensor:
        """A copy of latents `x` (B, z, R + F, h, w) with the frames in their places."""
        x = x.clone()
        for place in self._places:
            x[:, :, self._prefix + place] = self._clean[:, :, place]
        return x


def with_known_frames(cond: Conditioning, known: Tensor, frames: int, geometry: Geometry) -> Conditioning:
    """`cond` for a clip of `frames` latent frames whose first ones are `known` (B, z, n, h, w).

    Models that take clean frames get them so. In the channels beside the noise image-to-video models read known frames
    from a mask and their latents, control and camera models from the latent of the first frame. VACE models read them
    as the part of each input that is kept. Image tokens stay as they are: they are made from pixels, and a chain of
    clips has only latents.
    """
    if geometry.frame_times:
        cond = cond.with_clean_frames(known, frames)
    if cond.vace:
        cond = dataclasses.replace(cond, vace=tuple(_keeping(vace, known, frames) for vace in cond.vace))
    if cond.concat is None or cond.layout is None:
        return cond
    concat, count, start = cond.concat.clone(), known.shape[2], 0
    for slot in cond.layout:
        channels = slot.channels(geometry)
        place = concat[:, start : start + channels]
        match slot.known:
            case "mask":
                place[:, :, :count] = 1
            case "frames":
                place[:, :, :count] = known
            case "first":
                place[:, :, :1] = known[:, :, :1]
        start += channels
    return dataclasses.replace(cond, concat=concat)


def _keeping(vace: VaceInput, known: Tensor, frames: int) -> VaceInput:
    """A VACE input of `frames` frames whose first ones are `known` (B, z, n, h, w): they are what it keeps, and nothing
    of them is generated.

    Where all of a frame was to be generated, what it kept is encoded grey, which now stands for what it generates.
    """
    context, (channels, count) = vace.context.clone(), known.shape[1:3]
    first = context.shape[2] - frames
    kept, drawn, mask = (
        context[:, part, first : first + count]
        for part in (slice(channels), slice(channels, 2 * channels), slice(2 * channels, None))
    )
    whole = (mask == 1).all((1, 3, 4), keepdim=True)
    drawn.copy_(torch.where(whole, kept, drawn))
    kept.copy_(known)
    mask.zero_()
    return dataclasses.replace(vace, context=context)


def colour_corrected(clip: Tensor, like: Tensor, overlap: int, limit: float) -> Tensor:
    """`clip` (B, z, F, h, w) with the mean and contrast of each channel moved towards those of the video `like`.

    A channel's mean moves by at most `limit` and its contrast by at most that fraction: enough against slow drift, too
    little to undo a change of scene. The correction grows over the first `overlap` frames, so that the clip still
    matches the end of the one before.
    """
    if not limit:
        return clip
    axes = (2, 3, 4)
    mean, deviation = clip.mean(axes, keepdim=True), clip.std(axes, keepdim=True)
    gain = (like.std(axes, keepdim=True) / deviation.clamp_min(1e-6)).clamp(1 / (1 + limit), 1 + limit)
    shift = (like.mean(axes, keepdim=True) - mean).clamp(-limit, limit)
    strength = torch.ones(clip.shape[2], device=clip.device)
    ramp = min(overlap, clip.shape[2])
    strength[:ramp] = torch.arange(1, ramp + 1, device=clip.device) / (ramp + 1)
    corrected = (clip - mean) * gain + mean + shift
    return torch.lerp(clip, corrected, strength.view(-1, 1, 1))


@dataclass(frozen=True)
class WindowReport:
    """One window of latent frames `start` to `end` (exclusive): `mean` and `contrast` (standard deviation) of its
    brightness in [0, 1], and `sharpness`, the mean step of brightness between neighbouring cells."""

    start: int
    end: int
    mean: float
    contrast: float
    sharpness: float

    def __str__(self) -> str:
        return (
            f"frames {self.start}-{self.end - 1}: mean {self.mean:.3f}, contrast {self.contrast:.3f}, "
            f"sharpness {self.sharpness:.4f}"
        )


def window_reports(latents: Tensor, spans: Iterable[Span], geometry: Geometry) -> list[WindowReport]:
    """Brightness statistics of each window of normalised latents (B, z, F, h, w), one window at a time."""
    found = []
    for span in spans:
        grey = latents_to_rgb(latents[:, :, span.start : span.end], geometry).mean(-1)
        steps = [grey.diff(dim=axis).abs().mean() for axis in (2, 3)]
        mean, contrast, sharpness = (v.item() for v in (grey.mean(), grey.std(), (steps[0] + steps[1]) / 2))
        found.append(WindowReport(span.start, span.end, mean, contrast, sharpness))
    return found
