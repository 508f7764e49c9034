"""Latents to pixels and pixels to latents on a device that may be too small for them."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from .models.vae import WanVAE, fill
from .planning.encoders import (
    VaePass,
    choose_tiles,
    limit_memory,
    smallest_tiles,
    vae_peak_bytes,
    working_encoder,
)
from .runtime import OutOfMemoryError, Runtime, gigabytes, is_out_of_memory, log
from .sampling.predictor import check_latents, check_pixels
from .settings import MemorySettings
from .tiling import AUTO, Tiles, TileSettings
from .types import LatentSize, VideoSize

SMALLER_TILES = (TileSettings(), TileSettings(size=(16, 16), stride=(12, 12)))
"""What is tried when memory runs out, one after the other."""


@dataclass(frozen=True, kw_only=True, eq=False)
class VaeHandle:
    """A VAE with everything that a pass of it needs; a pass brings the weights to the device and releases them.

    Attributes:
        vae: the autoencoder, its weights wherever they are.
        runtime: device, progress, cancellation and memory of the host.
        tiles: of the latent frame; "auto" cuts only where memory asks for it.
        memory: what may be used of the device.
        keep: leave the weights on the device for the next use.
    """

    vae: WanVAE
    runtime: Runtime
    tiles: Tiles = AUTO
    memory: MemorySettings = MemorySettings()
    keep: bool = False

    @contextmanager
    def working(self) -> Iterator["VaeHandle"]:
        """Around several passes: the weights come once, and blocks that do not fit beside the others are streamed."""
        # The activations depend on the tiles, which are chosen by what the weights leave free.
        with working_encoder(self.vae, self.runtime, self.memory, 0, keep=self.keep):
            yield self

    def decode_pieces(self, latents: Tensor) -> Iterator[Tensor]:
        """As `decode_pieces`; errors come with the first piece."""
        with self.working():
            yield from decode_pieces(self.vae, latents, self.tiles, limit_memory(self.runtime, self.memory))

    def decode(self, latents: Tensor) -> Tensor:
        """As `decode`."""
        with self.working():
            return decode(self.vae, latents, self.tiles, limit_memory(self.runtime, self.memory))

    def encode(self, pixels: Tensor) -> Tensor:
        """As `encode`."""
        with self.working():
            return encode(self.vae, pixels, self.tiles, limit_memory(self.runtime, self.memory))


def decode(vae: WanVAE, latents: Tensor, tiles: Tiles, runtime: Runtime, budget: int | None = None) -> Tensor:
    """Normalised latents (B, z, F, h, w) to pixels (B, 3, T, H, W) in [-1, 1], float32, on the CPU: what
    `decode_pieces` gives, in one tensor. A VAE that upscales gives sides twice as long as it encodes.
    """
    pieces = decode_pieces(vae, latents, tiles, runtime, budget)
    num_frames = vae.config.geometry.video_frames(latents.shape[2])
    first = next(pieces)
    if first.shape[2] == num_frames:
        return first
    pixels = first.new_empty(*first.shape[:2], num_frames, *first.shape[3:])
    fill(pixels, chain([first], pieces))
    return pixels


def decode_pieces(
    vae: WanVAE, latents: Tensor, tiles: Tiles, runtime: Runtime, budget: int | None = None
) -> Iterator[Tensor]:
    """Pixels (B, 3, t, H, W) in [-1, 1], float32, on the CPU, a few frames at a time: they can be converted or written
    away before the next are computed, so that a long video is never in memory as a whole.

    With tiles "auto" the whole is decoded at once where that fits into `budget` bytes beside the weights, else in
    strips or tiles, with a notice. Without a budget it is what the device has left; the CPU then never needs tiles.
    When the device runs out of memory nevertheless, what is left is done in smaller tiles, with a notice. Tiles pass
    over the whole time and give one piece.

    Raises:
        NonFiniteError: the latents hold NaN or infinity, which is found before the first piece is asked for, or a
            piece does.
        OutOfMemoryError: the smallest tiles do not fit either.
    """
    check_latents(latents, "before decoding")
    latents = latents.cpu()
    size = LatentSize.of(latents, vae.config.geometry)
    try:
        if tiles == AUTO:
            tiles = _fitting(vae, size, len(latents), "decode", runtime, budget)
    except OutOfMemoryError as error:
        raise OutOfMemoryError(str(error), latents) from error
    return _decoded(vae, latents, tiles, size, runtime)


@torch.no_grad()
def _decoded(
    vae: WanVAE, latents: Tensor, tiles: TileSettings | None, size: LatentSize, runtime: Runtime
) -> Iterator[Tensor]:
    def work(tiles: TileSettings | None) -> Iterator[Tensor]:
        return vae.decode_pieces(latents, tiles, runtime.chunks("Decoding"))

    try:
        for piece in _in_tiles(work, tiles, size, "decode"):
            check_pixels(piece)
            yield piece
    except OutOfMemoryError as error:
        raise OutOfMemoryError(str(error), latents) from error


@torch.no_grad()
def encode(vae: WanVAE, pixels: Tensor, tiles: Tiles, runtime: Runtime, budget: int | None = None) -> Tensor:
    """Pixels (B, 3, T, H, W) in [-1, 1] to normalised latents (B, z, F, h, w), float32, on the CPU; as `decode`.

    Raises:
        ValueError: the VAE cannot encode pixels of that shape.
        OutOfMemoryError: the smallest tiles do not fit.
    """
    pixels = pixels.cpu()
    frames, height, width = pixels.shape[-3:]
    size = VideoSize(width, height, frames, vae.config.geometry).latent
    if tiles == AUTO:
        tiles = _fitting(vae, size, len(pixels), "encode", runtime, budget)

    def work(tiles: TileSettings | None) -> Iterator[Tensor]:
        yield vae.encode(pixels, tiles, runtime.chunks("Encoding"))

    return next(_in_tiles(work, tiles, size, "encode"))


def _fitting(
    vae: WanVAE, size: LatentSize, batch: int, what: VaePass, runtime: Runtime, budget: int | None
) -> TileSettings | None:
    """Tiles that a pass fits into memory with, after the host was asked to free memory; None where the whole fits.

    What the device says to have left is no promise either way: when even the smallest tiles seem not to fit into that,
    they are tried. A budget that was given is kept.
    """
    if budget is None and runtime.unbounded:
        return None
    plan = (vae.config, vae.dtype, size)
    needed = vae_peak_bytes(*plan, None, what, batch)
    available = runtime.request_memory(needed) if budget is None else budget
    if available is None or needed <= available:
        return None
    try:
        tiles = choose_tiles(*plan, available, what, batch)
    except OutOfMemoryError:
        if budget is not None:
            raise
        tiles = smallest_tiles(size)
    if tiles is None:
        return None
    pieces, side = len(tiles.plan(size.height, size.width)), vae.config.pixel_stride(what)
    log.warning(
        "To %s %dx%d at once takes %s, and there are %s: working in %d tiles of %dx%d pixels.",
        what, size.width * side, size.height * side, gigabytes(needed), gigabytes(available), pieces,
        tiles.size[1] * side, tiles.size[0] * side,
    )  # fmt: skip
    return tiles


def _in_tiles(
    work: Callable[[TileSettings | None], Iterator[Tensor]], tiles: TileSettings | None, size: LatentSize, what: VaePass
) -> Iterator[Tensor]:
    """The pieces (B, C, t, ...) of `work` with these tiles, and with ever smaller ones while the device runs out of
    memory; frames that were given already are not given again.
    """
    smaller = [choice for choice in SMALLER_TILES if _area(choice, size) < _area(tiles, size)]
    tried = [tiles, *smaller]
    doing, given = {"decode": "decoding", "encode": "encoding"}[what], 0
    for attempt, choice in enumerate(tried):
        try:
            start = 0
            for piece in work(choice):
                fresh = piece[:, :, max(0, given - start) :]
                start += piece.shape[2]
                if fresh.shape[2]:
                    given = start
                    yield fresh
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if attempt < len(smaller):
            log.warning("Out of memory while %s; trying tiles of %dx%d latent cells.", doing, *smaller[attempt].size)
    last = tried[-1]
    in_tiles = "" if last is None else f", even in tiles of {last.size[0]}x{last.size[1]} latent cells"
    raise OutOfMemoryError(
        f"Out of memory while {doing} {size.video.width}x{size.video.height}, {size.frames} latent frames{in_tiles}. "
        f"Close other programs that use the device, {what} fewer frames at a time, or load the VAE with another device."
    )


def _area(tiles: TileSettings | None, size: LatentSize) -> int:
    if tiles is None:
        return size.height * size.width
    return min(tiles.size[0], size.height) * min(tiles.size[1], size.width)
