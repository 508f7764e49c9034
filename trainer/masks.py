"""Random masks over a clip, for models that draw what is missing."""

import torch
from torch import Tensor

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
