"""Pictures and clips of any type, size and length, converted to frames of a video's size and length."""

import logging
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import isqrt
from typing import Any, Literal, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import PictureSequence, as_tensor, frames_to_tensor, to_colour, to_unit

log = logging.getLogger("wancore.fitting")

Aspect = Literal["stretch", "crop", "letterbox"]
ASPECTS: tuple[str, ...] = ("crop", "stretch", "letterbox")
"""`crop` fills the video and crops at the centre, `stretch` distorts, `letterbox` shows the whole picture on white."""

LengthPolicy = Literal["repeat last", "loop", "error"]
LENGTH_POLICIES: tuple[str, ...] = ("repeat last", "loop", "error")
"""How a clip that is too short is extended."""

SizeRule = Literal["exact", "area", "area and crop"]
SIZE_RULES: tuple[str, ...] = ("exact", "area", "area and crop")
"""How the size of a video follows from a typed one and its start image: `exact` takes the typed one. The others keep
the picture's aspect at about the typed area, as the authors do for I2V-A14B (Wan-Video/Wan2.2 wan/image2video.py) and
for TI2V-5B (`best_output_size` in wan/utils/utils.py), which leaves less to crop.
"""

Pictures = Image.Image | PictureSequence | Tensor | np.ndarray
"""One picture, or a clip: PIL images of any mode, whatever gives pictures by number, or an array (T, H, W, C), (H, W,
C) or (H, W) of any number type; see `media.to_unit`.
"""


def as_frames(value: Pictures, name: str) -> Tensor:
    """`value` as frames (T, H, W, 3) in [0, 1], float32 on the CPU. Transparent pixels are white.

    Raises:
        ValueError: there is no frame, frames differ in size, it is neither pictures nor an array of such a shape, or
        its values are not pixels.
    """
    try:
        frames = _frames(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}.") from error
    if frames is None or not frames.numel():
        shape = tuple(value.shape) if hasattr(value, "shape") else type(value).__name__
        raise ValueError(f"{name} must be a picture, a list of pictures, or an array (T, H, W, 3); got {shape}.")
    return frames


def size_by_rule(rule: SizeRule, width: int, height: int, picture: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Width and height of the video that starts with a picture of size `picture` (width, height), where `width` and
    `height` are typed; multiples of `multiple` under any rule but `exact`.

    Computed in whole numbers: the authors' square roots give 832x464 for a picture of 832x480 at the area 832x480.
    """
    if rule == "exact":
        return width, height
    area, (across, down) = width * height, picture
    longest = max(1, area // multiple**2)

    def side(this: int, other: int) -> int:
        """The side next to `this` of the largest picture of that aspect within the area, in multiples."""
        return min(max(1, isqrt(area * this // (other * multiple**2))), longest)

    wide, high = side(across, down), side(down, across)
    if rule == "area":
        return wide * multiple, high * multiple
    candidates = [(max(1, longest // high), high), (wide, max(1, longest // wide))]
    aspect = Fraction(across, down)
    # The second side is what is left of the area; the nearer aspect wins, of two the one with the exact height.
    best = min(candidates, key=lambda sides: max(aspect / Fraction(*sides), Fraction(*sides) / aspect))
    return best[0] * multiple, best[1] * multiple


def _frames(value: Any) -> Tensor | None:
    """As `as_frames`; None for anything but pictures and clips."""
    if isinstance(value, Image.Image):
        return frames_to_tensor([value])
    if isinstance(value, (Tensor, np.ndarray)):
        value = value[..., None] if value.ndim == 2 else value
        value = value[None] if value.ndim == 3 else value
        if value.ndim != 4 or value.shape[-1] not in (1, 3, 4):
            return None
        return to_colour(to_unit(value)).contiguous()
    if not is_clip(value) or not len(value):
        return None
    pictures = [value[index] for index in range(len(value))]
    if all(isinstance(picture, Image.Image) for picture in pictures):
        sizes = {picture.size for picture in pictures}
        if len(sizes) > 1:
            raise ValueError(f"all frames of a clip must have one size; got {sorted(sizes)}")
        return frames_to_tensor(pictures)
    stacked = _stacked(pictures)
    return None if stacked is None or stacked.ndim not in (3, 4) else _frames(stacked)


def _stacked(arrays: Sequence[Any]) -> Tensor | None:
    """Arrays stacked into one, so that one white level is found for all; None for anything but arrays.

    Raises:
        ValueError: their shapes differ.
    """
    if not all(isinstance(array, (Tensor, np.ndarray)) for array in arrays):
        return None
    shapes = {tuple(array.shape) for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"all frames of a clip must have one size; got {sorted(shapes)}")
    return torch.stack([as_tensor(array) for array in arrays])


def is_clip(value: Any) -> TypeGuard[PictureSequence]:
    """Whether `value` is a sequence of pictures: a list, a tuple, or an object with a length and items."""
    if isinstance(value, (str, bytes, Mapping, Image.Image, Tensor, np.ndarray)):
        return False
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")


def as_references(value: Pictures | None, name: str) -> tuple[Tensor, ...] | None:
    """Each picture of `value` as frames (1, H, W, 3), of its own size; None for None.

    Raises:
        ValueError: as of `as_frames`.
    """
    if value is None:
        return None
    pictures = [value[index] for index in range(len(value))] if is_clip(value) and len(value) else [value]
    return tuple(as_frames(picture, name) for picture in pictures)


def as_masks(value: Pictures, name: str) -> Tensor:
    """`value` as masks (T, H, W) in [0, 1], float32 on the CPU: the first channel of pictures, or ComfyUI's MASK.

    An array of two or three axes is (H, W) or (T, H, W); one of four has channels. Integers that are all 0 or 1 mean
    0 and 1.

    Raises:
        ValueError: as `as_frames`.
    """
    try:
        levels = _mask_levels(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}.") from error
    return as_frames(levels, name)[..., 0]


def _mask_levels(value: Pictures) -> Pictures:
    """An array, or arrays of one shape, as (T, H, W, C); pictures as they are."""
    if is_clip(value) and len(value) and (stacked := _stacked([value[i] for i in range(len(value))])) is not None:
        value = stacked
    if not isinstance(value, (Tensor, np.ndarray)):
        return value
    levels = as_tensor(value)
    if levels.ndim in (2, 3) and levels.numel():
        levels = levels.reshape(-1, *levels.shape[-2:], 1)
    # A comparison gives such masks; as levels of 255 they would be black.
    if not levels.is_floating_point() and levels.numel() and levels.float().max() <= 1:
        levels = levels.float()
    return levels


def fit_size(frames: Tensor, width: int, height: int, aspect: Aspect) -> Tensor:
    """`resized`, with a log line when the size changes: a warning when the shape does."""
    old_height, old_width = frames.shape[1:3]
    if (old_width, old_height) != (width, height):
        level = logging.INFO if old_width * height == old_height * width else logging.WARNING
        log.log(level, "A picture of %dx%d is resized to %dx%d (%s).", old_width, old_height, width, height, aspect)
    return resized(frames, width, height, aspect)


def resized(frames: Tensor, width: int, height: int, aspect: Aspect) -> Tensor:
    """`frames` (T, H, W, C) in [0, 1] as (T, height, width, C), by an antialiased bicubic filter.

    With `letterbox` the filter is bilinear, onto a white canvas, as VACE's authors prepare reference pictures.
    """
    old_height, old_width = frames.shape[1:3]
    if (old_width, old_height) == (width, height):
        return frames
    images = frames.permute(0, 3, 1, 2)
    if aspect == "letterbox":
        scale = min(width / old_width, height / old_height)
        inner = (max(1, int(old_height * scale)), max(1, int(old_width * scale)))
        canvas = images.new_ones(*images.shape[:2], height, width)
        top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
        scaled = F.interpolate(images, inner, mode="bilinear", align_corners=False)
        canvas[:, :, top : top + inner[0], left : left + inner[1]] = scaled
        return canvas.permute(0, 2, 3, 1)
    inner = (height, width)
    if aspect == "crop":
        scale = max(width / old_width, height / old_height)
        inner = (max(height, round(old_height * scale)), max(width, round(old_width * scale)))
    scaled = F.interpolate(images, inner, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    top, left = (inner[0] - height) // 2, (inner[1] - width) // 2
    return scaled[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1)


def fit_length(frames: Tensor, num_frames: int, policy: LengthPolicy, name: str) -> Tensor:
    """`frames` (T, ...) as (num_frames, ...): cut, or extended by `policy`, each with a notice.

    Raises:
        ValueError: there are too few frames and the policy is `error`.
    """
    count = len(frames)
    if count >= num_frames:
        if count > num_frames:
            log.info("%s has %d frames; the first %d are used.", name, count, num_frames)
        return frames[:num_frames]
    if policy == "error":
        raise ValueError(
            f"{name} has {count} frames, but the video needs {num_frames}. Give more, or fewer num_frames."
        )
    index = torch.arange(num_frames)
    index = index % count if policy == "loop" else index.clamp(max=count - 1)
    what = "it is repeated from the start" if policy == "loop" else "its last frame is repeated"
    log.info("%s has %d frames, the video %d: %s.", name, count, num_frames, what)
    return frames[index]
