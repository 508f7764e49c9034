"""The positions of tiles and windows along an axis, and the weights that blend their overlaps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Positions `start` to `end` (exclusive) of an axis; `first` and `last`: whether it touches that end."""

    start: int
    end: int
    first: bool
    last: bool

    @property
    def length(self) -> int:
        return self.end - self.start

    def scaled(self, factor: int) -> "Span":
        return Span(self.start * factor, self.end * factor, self.first, self.last)


def plan_spans(length: int, size: int, stride: int) -> list[Span]:
    """Spans of at most `size`, `stride` apart, that cover an axis of `length`.

    A span is omitted when the one before it reaches the end, as in DiffSynth-Studio's VAE and windows.

    Raises:
        ValueError: `size` or `stride` is below 1, or `stride` is above `size`, which would leave gaps.
    """
    _check_spans(size, stride)
    spans = []
    for start in range(0, length, stride):
        if start and start - stride + size >= length:
            continue
        end = min(start + size, length)
        spans.append(Span(start, end, start == 0, end == length))
    return spans


def _check_spans(size: int, stride: int) -> None:
    if size < 1 or not 1 <= stride <= size:
        raise ValueError(f"Tiles need a size of at least 1 and a stride from 1 to the size; got {size} and {stride}.")


def blend_weights(span: Span, border: int, device: torch.device | None = None, offset: float = 1.0) -> Tensor:
    """Weights (length,) of a span: 1, but over the first and last `border` positions they rise as (i + offset) /
    border, unless the span touches that end of the axis.
    """
    weights = torch.ones(span.length, device=device)
    border = min(border, span.length)
    if border:
        ramp = (torch.arange(border, device=device) + offset) / border
        if not span.first:
            weights[:border] = torch.minimum(weights[:border], ramp)
        if not span.last:
            weights[-border:] = torch.minimum(weights[-border:], ramp.flip(0))
    return weights


@dataclass(frozen=True, kw_only=True)
class TileSettings:
    """Spatial tiles in latent cells, as (height, width). The defaults are the reference pipeline's.

    Raises:
        ValueError: a stride is below 1 or above its size.
    """

    size: tuple[int, int] = (30, 52)
    stride: tuple[int, int] = (15, 26)

    def __post_init__(self) -> None:
        for size, stride in zip(self.size, self.stride, strict=True):
            _check_spans(size, stride)

    def plan(self, height: int, width: int) -> list[tuple[Span, Span]]:
        """(rows, columns) of every tile of a latent of `height` x `width`."""
        rows = plan_spans(height, self.size[0], self.stride[0])
        columns = plan_spans(width, self.size[1], self.stride[1])
        return [(row, column) for row in rows for column in columns]

    def blend(self, row: Span, column: Span, factor: int, device: torch.device) -> Tensor:
        """Weights (rows, columns) of a tile whose output has `factor` positions per latent cell."""
        borders = ((size - stride) * factor for size, stride in zip(self.size, self.stride, strict=True))
        down, across = (
            blend_weights(span.scaled(factor), border, device)
            for span, border in zip((row, column), borders, strict=True)
        )
        return torch.minimum(down[:, None], across[None, :])


AUTO: Final = "auto"
Tiles = TileSettings | Literal["auto"] | None
"""Settings are always used; "auto" makes tiles only where memory is short; None only after memory ran out."""


class TiledSum:
    """The weighted mean of overlapping tiles, accumulated in float32."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._values = torch.zeros(shape, device=device)
        self._weights = torch.zeros(shape[-2:], device=device)

    def add(self, tile: Tensor, weights: Tensor, row: Span, column: Span) -> None:
        rows, columns = slice(row.start, row.end), slice(column.start, column.end)
        self._values[..., rows, columns] += tile.to(self._values) * weights
        self._weights[rows, columns] += weights

    def mean(self) -> Tensor:
        return self._values.div_(self._weights)


def chunk_bounds(total: int, first: int, others: int) -> Iterator[tuple[int, int]]:
    """(start, end) of a first chunk and of equal ones after it, up to `total`."""
    start = 0
    while start < total:
        end = min(start + (others if start else first), total)
        yield start, end
        start = end
