"""Conversions of pixels: PIL images, arrays, IMAGE tensors, and the models' (B, 3, T, H, W).

`to_unit` is the one rule for what a number means. Files are read by `reader` and written by `writer`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.config import DEFAULT_GEOMETRY

FPS = DEFAULT_GEOMETRY.fps
"""Frame rate of the videos that Wan 2.1 was trained on."""

GROUND = "white"
"""The background of transparent pictures."""

WHITE = {torch.bool: 1.0, torch.uint8: 255.0, torch.uint16: 65535.0}
"""The number for white, by dtypes that decide it."""

WHITES = (1.0, 255.0, 65535.0)
"""The candidates for white of other dtypes, of which the smallest that is above all values counts; 1 only for floats.
"""

OVERSHOOT = 0.5
"""How far floats may lie outside of their range, as a fraction of white: sharp resize filters overshoot at edges."""


class PictureSequence(Protocol):
    """A sequence of pictures, such as a `VideoData`, which reads them on demand."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


Frames = Iterable[Image.Image] | PictureSequence | Tensor | np.ndarray
"""Frames as PIL images, or as one array (T, H, W, C) of any number type, with 1, 3 or 4 channels."""


def as_tensor(values: Tensor | np.ndarray) -> Tensor:
    """Numbers of any type as a tensor on the CPU.

    Raises:
        ValueError: the array does not hold real numbers.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        if values.is_complex():
            raise ValueError(f"pixels must be real numbers; got {values.dtype}")
        return values
    if values.dtype.kind not in "buif":
        raise ValueError(f"pixels must be real numbers; got an array of {values.dtype}")
    native = values.dtype.newbyteorder("=") if values.dtype.itemsize <= 8 else np.float64
    return torch.from_numpy(np.array(values, dtype=native, order="C"))


def white_level(values: Tensor) -> float:
    """The number for white in `values`: 1 for bool, 255 for uint8, 65535 for uint16; for floats the smallest of 1, 255
    and 65535 that no value exceeds (by more than `OVERSHOOT`), for other integers the smallest of 255 and 65535.

    Raises:
        ValueError: they hold NaN or infinity, or are outside of all these ranges.
    """
    if values.dtype in WHITE or not values.numel():
        return WHITE.get(values.dtype, 1.0)
    low, high = (float(end) for end in torch.aminmax(values.float()))
    if not np.isfinite((low, high)).all():
        raise ValueError("pixels hold NaN or infinity")
    slack, whites = (OVERSHOOT, WHITES) if values.is_floating_point() else (0.0, WHITES[1:])
    white = next((white for white in whites if high <= white * (1 + slack)), None)
    if white is None or low < -white * slack:
        ranges = " or ".join(f"0 to {white:g}" for white in whites)
        raise ValueError(f"pixels of {values.dtype} must be from {ranges}; got {low:g} to {high:g}")
    return white


def to_unit(values: Tensor | np.ndarray, white: float | None = None) -> Tensor:
    """Numbers of any type scaled to [0, 1], float32 on the CPU; `white` is by default that of `white_level`.

    Raises:
        ValueError: as of `white_level`.
    """
    values = as_tensor(values)
    white = white_level(values) if white is None else white
    unit = values.float()
    # `float()` does not copy float32, and the caller's tensor must not change.
    return unit.div(white).clamp_(0, 1) if unit is values else unit.div_(white).clamp_(0, 1)


def to_colour(unit: Tensor) -> Tensor:
    """(..., C) in [0, 1] of 1, 3 or 4 channels as (..., 3): grey repeated, alpha composited on white."""
    if unit.shape[-1] == 4:
        colour, alpha = unit[..., :3], unit[..., 3:]
        return colour * alpha + (1 - alpha)
    return unit.expand(*unit.shape[:-1], 3)


def picture_levels(image: Image.Image) -> np.ndarray:
    """A picture of any mode as (H, W, 3): uint8, or uint16 or float32 for grey pictures of more bits. Transparent
    pixels are white.

    Raises:
        ValueError: 32-bit integers exceed 16 bits, or Pillow cannot convert this mode to RGB.
    """
    if image.mode.startswith(("I", "F")):
        grey = np.array(image)
        if image.mode == "I":
            # Older versions of Pillow open depth maps of 16 bits in this mode.
            if grey.min() < 0 or grey.max() > 65535:
                raise ValueError(
                    f"a picture of 32-bit integers must be from 0 to 65535; got {grey.min()} to {grey.max()}"
                )
            grey = grey.astype(np.uint16)
        return np.repeat(grey[..., None], 3, 2)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, GROUND), layer)
    return np.array(image.convert("RGB"))


def frames_to_tensor(frames: Sequence[Image.Image]) -> Tensor:
    """PIL images of one size and any mode as IMAGE (T, H, W, 3) in [0, 1], float32."""
    levels = [picture_levels(frame) for frame in frames]
    if len({level.dtype for level in levels}) > 1:
        return torch.stack([to_unit(level) for level in levels])
    return to_unit(np.stack(levels))


def pixels_to_images(pixels: Tensor) -> list[Image.Image]:
    """One video (1, 3, T, H, W) in [-1, 1] as PIL images, rounded down as the reference does."""
    frames = ((pixels[0] + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0)
    return [Image.fromarray(frame) for frame in frames.cpu().numpy()]


def pixels_to_frames(pieces: Iterable[Tensor], num_frames: int) -> Tensor:
    """Pieces of pixels (B, 3, t, H, W) in [-1, 1], of `num_frames` frames in all, as ComfyUI's IMAGE (B * T, H, W, 3)
    in [0, 1], float32 on the CPU.
    """
    frames, start = torch.empty(0), 0
    for piece in pieces:
        batch, _, length, *sides = piece.shape
        if not start:
            frames = torch.empty(batch, num_frames, *sides, 3)
        frames[:, start : start + length].copy_(piece.permute(0, 2, 3, 4, 1)).add_(1).div_(2).clamp_(0, 1)
        start += length
    return frames.flatten(0, 1)


def frames_to_pixels(frames: Tensor) -> Tensor:
    """ComfyUI's IMAGE (T, H, W, 3) in [0, 1] as one video (1, 3, T, H, W) in [-1, 1], float32."""
    return frames[..., :3].float().mul(2).sub_(1).permute(3, 0, 1, 2).unsqueeze(0)


def eight_bit(frames: Frames) -> Iterator[np.ndarray]:
    """Each frame as (H, W, 3), uint8, lazily.

    An array or a list has one white level for all frames. Floats that come one by one must be in [0, 1].

    Raises:
        ValueError: there is no frame, one is not a picture or holds NaN, or they differ in size; sequences and arrays
            are checked before the first frame.
    """
    white = None
    if isinstance(frames, (Tensor, np.ndarray)):
        if frames.ndim != 4 or not len(frames) or frames.shape[-1] not in (1, 3, 4):
            raise ValueError(f"A video needs at least one frame, as (T, H, W, 3); got {tuple(frames.shape)}.")
        frames = as_tensor(frames)
        white = white_level(frames)
    elif isinstance(frames, (list, tuple)):
        arrays = [as_tensor(frame) for frame in frames if isinstance(frame, (Tensor, np.ndarray))]
        white = max(map(white_level, arrays), default=None)
        sizes = {_size(frame) for frame in frames if isinstance(frame, Image.Image) or getattr(frame, "ndim", 0) == 3}
        if len(sizes) > 1:
            raise ValueError(f"All frames of a video must have one size; got {sorted(sizes)}.")
    size = None
    for index, frame in enumerate(each(frames)):
        try:
            levels = _eight_bit(frame, white)
        except ValueError as error:
            raise ValueError(f"Frame {index} of the video: {error}.") from error
        height, width = levels.shape[:2]
        if not height or not width:
            raise ValueError(f"Frame {index} of the video has no pixels: {width}x{height}.")
        if size not in (None, (width, height)):
            raise ValueError(f"All frames of a video must have one size; got {[size, (width, height)]}.")
        size = width, height
        yield levels
    if size is None:
        raise ValueError("A video needs at least one frame; got none.")


def each(frames: Frames) -> Iterator[Any]:
    """An iterator over frames, also over objects with `__len__` and `__getitem__` only.

    Raises:
        ValueError: it is not iterable.
    """
    if hasattr(frames, "__len__") and hasattr(frames, "__getitem__") and not hasattr(frames, "__iter__"):
        return (frames[index] for index in range(len(frames)))
    if isinstance(frames, type) or not hasattr(frames, "__iter__"):
        raise ValueError(f"frames must be pictures, one by one or as an array (T, H, W, 3); got {frames!r}.")
    return iter(frames)


def _size(frame: Any) -> tuple[int, int]:
    return frame.size if isinstance(frame, Image.Image) else (frame.shape[-2], frame.shape[-3])


def _eight_bit(frame: Any, white: float | None) -> np.ndarray:
    if isinstance(frame, Image.Image):
        return to_eight_bit(picture_levels(frame))
    if not isinstance(frame, (Tensor, np.ndarray)) or frame.ndim != 3 or frame.shape[-1] not in (1, 3, 4):
        shape = tuple(frame.shape) if hasattr(frame, "shape") else type(frame).__name__
        raise ValueError(f"it must be a picture, or an array (H, W, 3); got {shape}")
    levels = as_tensor(frame)
    if white is None and levels.is_floating_point():
        white = white_level(levels)
        if white != 1:
            raise ValueError("floats that come frame by frame must be in [0, 1]; use uint8 instead")
    return to_eight_bit(levels, white)


def to_eight_bit(levels: Tensor | np.ndarray, white: float | None = None) -> np.ndarray:
    """Levels (..., C) of any number type as uint8 (..., 3); see `to_unit` and `to_colour`."""
    levels = as_tensor(levels)
    if levels.dtype != torch.uint8 or levels.shape[-1] != 3:
        levels = to_colour(to_unit(levels, white)).mul(255).round().to(torch.uint8)
    return levels.contiguous().numpy()
