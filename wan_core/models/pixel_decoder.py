"""What the VAEs and the tiny autoencoders have in common: latents to pixels, piece by piece or in tiles."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..parallel.source import Source
from ..tiling import TiledSum, TileSettings
from .config import PreviewDecoderConfig, VAEConfig

OnChunk = Callable[[int, int], None]

FRAMES_IN_RANGE = 4
"""Frames that `_in_range` clamps at a time."""


class PixelDecoder(nn.Module):
    """What makes pixels of latents, whole or in tiles: a VAE, or a tiny autoencoder in its place.

    Attributes:
        source: how other processes load it, if that is known.
        cards: the group of processes that decodes in place of this one.
    """

    config: VAEConfig | PreviewDecoderConfig
    source: Source | None = None
    cards: Any = None

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        raise NotImplementedError

    def decode_chunks(self, latents: Tensor) -> Iterator[Tensor]:
        """Pixels of one latent frame after another, 1 frame and then `temporal_stride` each."""
        raise NotImplementedError

    def decode(self, latents: Tensor, tiles: TileSettings | None = None, on_chunk: OnChunk | None = None) -> Tensor:
        """Normalised latents (B, z, F, h, w) to pixels (B, 3, T, H, W), float32 in [-1, 1]; sides are `upscale` times
        as long as those that were encoded.

        Raises:
            ValueError: the tensor is not (B, z, F, h, w).
        """
        pieces = self.decode_pieces(latents, tiles, on_chunk)
        out = latents.new_empty(self._decoded_size(latents), dtype=torch.float32)
        fill(out, pieces)
        return out

    def decode_pieces(
        self, latents: Tensor, tiles: TileSettings | None = None, on_chunk: OnChunk | None = None
    ) -> Iterator[Tensor]:
        """The pixels of `decode` piece by piece, on the device of the latents: of each latent frame, 1 frame for the
        first and 4 for every other. Each tile is decoded over the whole time, so with tiles they come in one piece.

        Raises:
            ValueError: the tensor is not (B, z, F, h, w).
        """
        size, stride = self._decoded_size(latents), self.config.pixel_stride("decode")
        if tiles and len(tiles.plan(*latents.shape[3:])) > 1:
            yield _in_range(self._assemble(self.decode_chunks, latents, size, stride, 1, tiles, on_chunk))
            return
        report = _Counter(latents.shape[2], on_chunk)
        for chunk in self.decode_chunks(latents):
            yield _in_range(chunk.to(latents.device, torch.float32))
            report()

    def _decoded_size(self, latents: Tensor) -> tuple[int, ...]:
        if latents.ndim != 5 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"The decoder decodes (B, {self.config.latent_channels}, F, h, w); got {tuple(latents.shape)}."
            )
        batch, _, frames, height, width = latents.shape
        stride = self.config.pixel_stride("decode")
        return batch, 3, self.config.geometry.video_frames(frames), height * stride, width * stride

    def _assemble(
        self,
        run: Callable[[Tensor], Iterator[Tensor]],
        source: Tensor,
        size: tuple[int, ...],
        out_factor: int,
        in_factor: int,
        tiles: TileSettings | None,
        on_chunk: OnChunk | None,
    ) -> Tensor:
        """The output (`size`) of `run` on `source`, whole or in tiles; `out_factor` and `in_factor` are the positions
        of output and source per latent cell.
        """
        height, width = size[3] // out_factor, size[4] // out_factor
        plan = tiles.plan(height, width) if tiles else []
        chunks = max(1, len(plan)) * (size[2] if in_factor > 1 else source.shape[2])
        report = _Counter(chunks, on_chunk)
        if len(plan) < 2:
            out = source.new_empty(size, dtype=torch.float32)
            fill(out, run(source), report)
            return out
        assert tiles is not None, "a plan of several tiles is made by their settings"
        total = TiledSum(size, source.device)
        for row, column in plan:
            rows, columns = row.scaled(in_factor), column.scaled(in_factor)
            tile = source[..., rows.start : rows.end, columns.start : columns.end]
            rows, columns = row.scaled(out_factor), column.scaled(out_factor)
            out = source.new_empty((*size[:3], rows.length, columns.length), dtype=torch.float32)
            fill(out, run(tile), report)
            total.add(out, tiles.blend(row, column, out_factor, source.device), rows, columns)
        return total.mean()


class _Counter:
    def __init__(self, total: int, on_chunk: OnChunk | None) -> None:
        self.done, self.total, self.on_chunk = 0, total, on_chunk

    def __call__(self) -> None:
        self.done += 1
        if self.on_chunk is not None:
            self.on_chunk(self.done, self.total)


def _in_range(pixels: Tensor) -> Tensor:
    """Clamp pixels (B, C, T, H, W) to [-1, 1], in place. Infinity becomes NaN, so that an overflow is reported and not
    shown as a bright pixel.
    """
    # A few frames at a time, because the mask of infinities is as large as they are.
    for start in range(0, pixels.shape[2], FRAMES_IN_RANGE):
        # A slice, because autograd forbids writing into the views of `split`.
        frames = pixels[:, :, start : start + FRAMES_IN_RANGE]
        frames.masked_fill_(frames.isinf(), math.nan).clamp_(-1, 1)
    return pixels


def fill(out: Tensor, chunks: Iterable[Tensor], report: Callable[[], None] = lambda: None) -> None:
    """Write chunks (B, C, t, H, W) one behind the other into `out`, and call `report` after each."""
    start = 0
    for chunk in chunks:
        out[:, :, start : start + chunk.shape[2]] = chunk
        start += chunk.shape[2]
        report()
