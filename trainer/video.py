"""Clips and pictures of a data set: how many frames they hold and when, and chosen frames at a chosen size."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..wan_core.fitting import resized
from ..wan_core.media import FPS
from ..wan_core.types import SIZE_MULTIPLE, VAE_STRIDE

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".wmv", ".mkv", ".flv", ".webm", ".gif")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class MediaError(ValueError):
    """A media file that is missing or cannot be decoded."""


@dataclass(frozen=True)
class Clip:
    """What a media file holds, found without decoding it. A picture is a clip of one frame.

    Attributes:
        path: the file.
        times: when each frame is shown, in seconds after the first.
        fps: the file's frame rate; None for a picture.
        width, height: in pixels, as it is to be shown.
    """

    path: Path
    times: tuple[float, ...]
    fps: float | None
    width: int
    height: int

    @property
    def num_frames(self) -> int:
        return len(self.times)


def probe(path: Path) -> Clip:
    """What the file at `path` holds; its first frame is decoded.

    Raises:
        MediaError: it is missing, of an unknown kind, or cannot be decoded; the message says why.
    """
    suffix = path.suffix.lower()
    if suffix not in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES):
        known = " ".join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)
        raise MediaError(f"{path.name}: files of the kind {suffix or 'without extension'} are not read ({known} are)")
    if suffix in IMAGE_SUFFIXES:
        height, width, _ = _picture(path).shape
        return Clip(path, (0.0,), None, width, height)
    with _opened(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        rate = stream.average_rate or stream.guessed_rate or Fraction(FPS)
        stamps = [packet.pts for packet in packets]
    if not packets:
        raise MediaError(f"{path.name} holds no video frames")
    first = next(_decoded(path))
    if None in stamps or len(set(stamps)) < len(stamps):
        times = [index / float(rate) for index in range(len(packets))]
    else:
        ordered = sorted(stamps)
        times = [float((stamp - ordered[0]) * packets[0].time_base) for stamp in ordered]
    return Clip(path, tuple(times), float(rate), first.shape[1], first.shape[0])


def at_rate(clip: Clip, fps: float | None) -> list[int]:
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


def usable_frames(count: int, num_frames: int) -> int:
    """The largest 4k + 1 that is neither above `count` nor above `num_frames`."""
    return (min(count, num_frames) - 1) // VAE_STRIDE[0] * VAE_STRIDE[0] + 1


def picked(count: int, num_frames: int, pick: str, fraction: float = 0.0) -> list[int]:
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


def own_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """The largest width and height that are multiples of 16 and neither above the file's nor above `max_pixels`."""
    scale = min(1.0, (max_pixels / (width * height)) ** 0.5)
    sides = (max(1, int(side * scale / SIZE_MULTIPLE + 1e-6)) * SIZE_MULTIPLE for side in (width, height))
    return tuple(sides)


def read(clip: Clip, indices: Sequence[int], width: int | None = None, height: int | None = None) -> Tensor:
    """Frames (T, height, width, 3) in [0, 1] of `clip`, float32; cropped to that size around the centre, if one is
    given.

    Raises:
        MediaError: a frame cannot be decoded; the message names file and frame.
    """
    size = (width or clip.width, height or clip.height)
    frames = torch.empty(len(indices), size[1], size[0], 3)
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index, []).append(place)
    arrays = iter([_picture(clip.path)]) if clip.fps is None else _decoded(clip.path)
    for index, array in enumerate(arrays):
        if index in places:
            frame = torch.from_numpy(array).float().div_(255)[None]
            frames[places.pop(index)] = resized(frame, *size, "crop")
        if not places:
            return frames
    raise MediaError(f"{clip.path.name}: frame {min(places)} cannot be decoded")


def check_decodes(clip: Clip, index: int) -> None:
    """Decode something at frame `index`, from the nearest key frame on.

    Raises:
        MediaError: nothing can be decoded there.
    """
    if clip.fps is None or index == 0:
        return
    with _opened(clip.path) as (container, stream):
        start = stream.start_time or 0
        container.seek(start + int(clip.times[index] / stream.time_base), stream=stream)
        if next(container.decode(stream), None) is None:
            raise MediaError(f"{clip.path.name}: frame {index} cannot be decoded")


def _picture(path: Path) -> np.ndarray:
    """An image file upright as (H, W, 3) uint8; what is transparent is white."""
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if "A" in image.getbands() or "transparency" in image.info:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            return np.array(image.convert("RGB"))
    except FileNotFoundError as error:
        raise MediaError(f"there is no file {path}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path.name} cannot be read as a picture: {error}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """An open container and its video stream; every failure inside is a MediaError."""
    import av

    if not path.is_file():
        raise MediaError(f"there is no file {path}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError(f"{path.name} holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{path.name} cannot be read as a video: {error}") from error


def _decoded(path: Path) -> Iterator[np.ndarray]:
    """Every frame in the order it is shown, upright, as (H, W, 3) uint8."""
    with _opened(path) as (container, stream):
        empty = True
        for frame in container.decode(stream):
            empty = False
            # A phone's clip says how it is to be turned, in degrees against the clock.
            yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
        if empty:
            raise MediaError(f"{path.name} holds no frame that can be decoded")
