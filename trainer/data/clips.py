"""The inputs a model can be trained with, the frames of a clip that are trained, and masks over them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from wan_core.conditioning.camera import DEFAULT_SPEED, MOVES
from wan_core.conditioning.inputs import FASTEST, SLOWEST
from wan_core.media import Clip, MediaError, frames, to_unit
from wan_core.media.fitting import resized
from wan_core.models.config import DEFAULT_GEOMETRY, Geometry

InputKind = Literal["start", "end", "clip", "mask", "picture", "pictures", "poses", "number", "word"]
"""`start` and `end` are pictures of the trained clip itself; `clip` and `mask` follow it frame by frame."""

FILE_KINDS = ("clip", "mask", "picture", "pictures", "poses")
ALIGNED_KINDS = ("clip", "mask")


@dataclass(frozen=True, kw_only=True)
class ExtraInput:
    """One input.

    Attributes:
        name: what `--extra_inputs` calls it, and its column.
        kind: how a cell is read.
        gives: the name by which `wan_core.variants` knows it.
        help: what the column holds.
        droppable: whether condition dropout may leave it out where a model does not require it.
        needs: another input without which it means nothing.
        choices: the words that the column may hold.
        low, high: the range of its numbers.
        default: what an empty cell means; None makes it an error.
    """

    name: str
    kind: InputKind
    gives: str
    help: str
    droppable: bool = False
    needs: str | None = None
    choices: tuple[str, ...] = ()
    low: float = float("-inf")
    high: float = float("inf")
    default: float | None = None

    @property
    def column(self) -> str | None:
        """The column that it is read from; None when it is taken from the trained clip."""
        return None if self.kind in ("start", "end") else self.name

    @property
    def is_file(self) -> bool:
        return self.kind in FILE_KINDS


INPUTS: dict[str, ExtraInput] = {
    row.name: row
    for row in (
        ExtraInput(
            name="input_image", kind="start", gives="input_image", droppable=True, help="the first frame of the clip"
        ),
        ExtraInput(name="end_image", kind="end", gives="end_image", droppable=True, help="the last frame of the clip"),
        ExtraInput(name="control_video", kind="clip", gives="control_video", help="a control video"),
        ExtraInput(
            name="reference_image", kind="picture", gives="reference_image", droppable=True, help="a reference picture"
        ),
        ExtraInput(name="vace_video", kind="clip", gives="vace_video", help="a VACE source video"),
        ExtraInput(
            name="vace_video_mask", kind="mask", gives="vace_video_mask", help="a mask video, white where to draw"
        ),
        ExtraInput(
            name="vace_reference_image",
            kind="pictures",
            gives="vace_reference_image",
            droppable=True,
            help="one or more reference pictures",
        ),
        ExtraInput(
            name="motion_bucket_id",
            kind="number",
            gives="motion_bucket_id",
            low=SLOWEST,
            high=FASTEST,
            help="the speed of the motion, 0 to 100",
        ),
        ExtraInput(
            name="camera_control_direction",
            kind="word",
            gives="camera",
            choices=tuple(MOVES),
            help="the direction of the camera",
        ),
        ExtraInput(
            name="camera_control_speed",
            kind="number",
            gives="camera",
            needs="camera_control_direction",
            default=DEFAULT_SPEED,
            help="the speed of the camera",
        ),
        ExtraInput(name="camera_path", kind="poses", gives="camera", help="a text file of camera poses"),
    )
}

SWITCHES = (
    "input_image",
    "end_image",
    "control_video",
    "reference_image",
    "vace_video",
    "vace_video_mask",
    "vace_reference_image",
    "motion_bucket_id",
)
"""Inputs that `--input_contains_<name>` turns on, the older spelling of `--extra_inputs`."""


def input_names(names: Sequence[str]) -> tuple[str, ...]:
    """What `wan_core.variants` calls the inputs `names`, each once."""
    return tuple(dict.fromkeys(INPUTS[name].gives for name in names))


def frames_at_rate(clip: Clip, fps: float | None) -> list[int]:
    """Which frames make up `clip` at `fps`: at each time the nearest one. None is every frame as stored."""
    if fps is None or clip.fps is None:
        return list(range(clip.num_frames))
    times = np.array(clip.times)
    count = int(times[-1] * fps + 1e-6) + 1
    wanted = np.arange(count) / fps
    after = np.searchsorted(times, wanted).clip(0, len(times) - 1)
    before = (after - 1).clip(0)
    nearer = wanted - times[before] <= times[after] - wanted
    return np.where(nearer, before, after).tolist()


def usable_frames(count: int, num_frames: int, geometry: Geometry = DEFAULT_GEOMETRY) -> int:
    """The longest that a video can be which is neither above `count` nor above `num_frames`."""
    return geometry.video_frames(geometry.latent_frames(min(count, num_frames)))


def pick_frames(count: int, num_frames: int, pick: str, fraction: float = 0.0) -> list[int]:
    """Which `num_frames` of `count` frames are used.

    Args:
        pick: `head` the first, `middle` the middle ones, `spread` some from start to end at even distances, `random`
            consecutive ones from a place that `fraction` in [0, 1) chooses.
    """
    spare = count - num_frames
    if pick == "spread":
        return np.linspace(0, count - 1, num_frames).round().astype(int).tolist()
    start = {"head": 0, "middle": spare // 2, "random": int(fraction * (spare + 1))}[pick]
    return list(range(start, start + num_frames))


def native_size(width: int, height: int, max_pixels: int, geometry: Geometry = DEFAULT_GEOMETRY) -> tuple[int, int]:
    """The largest width and height that a video can have and that are neither above the file's nor above
    `max_pixels`.
    """
    scale, multiple = min(1.0, (max_pixels / (width * height)) ** 0.5), geometry.side_multiple
    own_width, own_height = (max(1, int(side * scale / multiple + 1e-6)) * multiple for side in (width, height))
    return own_width, own_height


def read(clip: Clip, indices: Sequence[int], width: int | None = None, height: int | None = None) -> Tensor:
    """Frames (T, height, width, 3) in [0, 1] of `clip`, float32, cropped around the centre to `width` x `height`.

    Raises:
        MediaError: a frame cannot be decoded; the message names file and frame.
    """
    size = (width or clip.width, height or clip.height)
    found = torch.empty(len(indices), size[1], size[0], 3)
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index, []).append(place)
    for index, levels in enumerate(frames(clip.path)):
        if index in places:
            found[places.pop(index)] = resized(to_unit(levels)[None], *size, "crop")
        if not places:
            return found
    raise MediaError(f"{clip.path}: frame {min(places)} cannot be decoded")


WHOLE, START, BOTH, BOX, SPAN = "whole", "start", "start and end", "box", "span"
MASKS = {WHOLE: 0.1, START: 0.35, BOTH: 0.25, BOX: 0.15, SPAN: 0.15}
"""What is to be drawn, and how often: all of the clip, all but its first frame, all but its first and last frame, a
rectangle in all frames, or whole frames in its middle.

A choice of this pack: the kinds that Fun InP's users give most are the most frequent ones.
"""

SMALLEST, LARGEST = 0.25, 0.75
"""Sides of a rectangle and length of a span, in fractions of the clip."""


def mask_kind(fraction: float) -> str:
    """The kind of mask that `fraction` in [0, 1) chooses."""
    for kind, share in MASKS.items():
        fraction -= share
        if fraction < 0:
            return kind
    return WHOLE


def draw_mask(kind: str, num_frames: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """A mask (T, H, W), 1 where the model draws.

    A clip of one frame has no middle: it is drawn whole.
    """
    mask = torch.zeros(num_frames, height, width)
    size, place = torch.rand(2, 2, generator=generator).tolist()
    sides = [SMALLEST + (LARGEST - SMALLEST) * s for s in size]
    if kind == BOX:
        (top, bottom), (left, right) = (
            _part(n, side, p) for n, side, p in zip((height, width), sides, place, strict=True)
        )
        mask[:, top:bottom, left:right] = 1
    elif kind == SPAN and num_frames > 2:
        first, last = _part(num_frames - 2, sides[0], place[0])
        mask[1 + first : 1 + last] = 1
    else:
        mask.fill_(1)
    return mask


def _part(length: int, share: float, place: float) -> tuple[int, int]:
    """Start and end of a part of `length` that takes `share` of it, at `place` in [0, 1)."""
    part = max(1, round(length * share))
    start = int(place * (length - part + 1))
    return start, start + part
