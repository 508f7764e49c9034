"""The pictures, clips and masks that the end-to-end reference calls were made with, drawn from their names."""

from typing import Any

import numpy as np
from PIL import Image


def picture(name: str, width: int, height: int) -> Image.Image:
    """A smooth picture: two waves in each channel, with frequencies and phases drawn from the name."""
    generator = np.random.default_rng([7, *name.encode()])
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    frequency, phase = generator.uniform(2, 9, (3, 4)), generator.uniform(0, 6.28, (3, 4))
    channels = [
        np.sin(f[0] * x + p[0]) * np.cos(f[1] * y + p[1]) + 0.5 * np.sin(f[2] * (x + y) + p[2])
        for f, p in zip(frequency, phase, strict=True)
    ]
    waves = np.stack(channels, -1)
    return Image.fromarray(((waves - waves.min()) / (waves.max() - waves.min()) * 255).astype(np.uint8))


def clip(name: str, width: int, height: int, frames: int) -> list[Image.Image]:
    """A clip of unrelated pictures."""
    return [picture(f"{name}{i}", width, height) for i in range(frames)]


def masks(width: int, height: int, frames: int) -> list[Image.Image]:
    """White bars a third of the width wide that move to the right by five pixels a frame."""
    bars = np.zeros((frames, height, width, 3), np.uint8)
    for i, bar in enumerate(bars):
        left = (i * 5) % (width // 2)
        bar[:, left : left + width // 3] = 255
    return [Image.fromarray(bar) for bar in bars]


MAKERS = {"$picture": picture, "$clip": clip, "$masks": masks}


def materialised(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with every `{maker: [...]}` replaced by what the maker draws."""
    return {
        name: MAKERS[next(iter(value))](*next(iter(value.values()))) if isinstance(value, dict) else value
        for name, value in arguments.items()
    }
