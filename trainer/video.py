"""Which frames of a clip are trained, and those frames at a chosen size."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from wan_core.fitting import resized
from wan_core.media import Clip, MediaError, frames, probe, to_unit
from wan_core.types import SIZE_MULTIPLE, VAE_STRIDE

__all__ = ["Clip", "MediaError", "at_rate", "own_size", "picked", "probe", "read", "usable_frames"]


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
