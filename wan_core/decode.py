"""Latents to pixels and pixels to latents on a device that may be too small for them."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from .models import kernels
from .models.pixel_decoder import PixelDecoder, fill
from .models.vae import WanVAE
from .parallel.layout import Layout, shares
from .parallel.mesh import Ranks, Step
from .parallel.source import Source
from .parallel.strips import Strip
from .parallel.tasks import Desk
from .planning.encoders import (
    VaePass,
    choose_tiles,
    limit_memory,
    smallest_tiles,
    strip_of,
    vae_peak_bytes,
    working_encoder,
)
from .runtime import OutOfMemoryError, Runtime, gigabytes, is_out_of_memory, log
from .sampling.checkpoint import digest_weights
from .sampling.parallel import EndRun, leading
from .sampling.predictor import check_latents, check_pixels
from .settings import MemorySettings
from .tiling import AUTO, Tiles, TileSettings
from .types import LatentSize, VideoSize

DECODERS = ("vae", "taew2")
"""What may make frames of latents: the VAE, or a tiny autoencoder, many times as fast and an approximation."""


@dataclass(frozen=True, kw_only=True, eq=False)
class VaeHandle:
    """A VAE with everything that a pass of it needs; a pass brings the weights to the device and releases them.

    Attributes:
        vae: the autoencoder, its weights wherever they are; a tiny one only decodes.
        runtime: device, progress, cancellation and memory of the host.
        tiles: of the latent frame; "auto" cuts only where memory asks for it.
        memory: what may be used of the device.
        keep: leave the weights on the device for the next use.
    """

    vae: PixelDecoder
    runtime: Runtime
    tiles: Tiles = AUTO
    memory: MemorySettings = MemorySettings()
    keep: bool = False

    @contextmanager
    def working(self) -> Iterator["VaeHandle"]:
        """Around several passes: the weights come once, and blocks that do not fit beside the others are streamed."""
        if self.vae.cards is not None:  # they have weights of their own
            yield self
            return
        # The activations depend on the tiles, which are chosen by what the weights leave free.
        with working_encoder(self.vae, self.runtime, self.memory, 0, keep=self.keep):
            yield self

    def decode_pieces(self, latents: Tensor) -> Iterator[Tensor]:
        """As `decode_pieces`; errors come with the first piece."""
        if self.vae.cards is not None:
            yield from self.vae.cards.pieces(DecodeRequest.of(self, latents), self.runtime)
            return
        with self.working():
            yield from decode_pieces(self.vae, latents, self.tiles, limit_memory(self.runtime, self.memory))

    def decode(self, latents: Tensor) -> Tensor:
        """As `decode`."""
        if self.vae.cards is not None:
            return torch.cat(list(self.decode_pieces(latents)), 2)
        with self.working():
            return decode(self.vae, latents, self.tiles, limit_memory(self.runtime, self.memory))

    def encode(self, pixels: Tensor) -> Tensor:
        """As `encode`, by a VAE."""
        assert isinstance(self.vae, WanVAE), "a tiny autoencoder is given latents only"
        with working_encoder(self.vae, self.runtime, self.memory, 0, keep=self.keep):
            return encode(self.vae, pixels, self.tiles, limit_memory(self.runtime, self.memory))


def decode(vae: PixelDecoder, latents: Tensor, tiles: Tiles, runtime: Runtime, budget: int | None = None) -> Tensor:
    """Normalised latents (B, z, F, h, w) to pixels (B, 3, T, H, W) in [-1, 1], float32, on the CPU: `decode_pieces` as
    one tensor. Sides are `config.upscale` times as long as those that the VAE encodes.
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
    vae: PixelDecoder, latents: Tensor, tiles: Tiles, runtime: Runtime, budget: int | None = None
) -> Iterator[Tensor]:
    """Pixels (B, 3, t, H, W) in [-1, 1], float32, on the CPU, a few frames at a time: each piece can be written to a
    file before the next is computed, so that a long video is never in memory as a whole.

    With tiles "auto" the picture is decoded at once if that fits in `budget` bytes beside the weights, else in strips
    or tiles, with a warning. Without a budget it is the free memory of the device; a CPU then never needs tiles. When
    the device runs out of memory nevertheless, it begins again in smaller tiles, with a warning, and gives no frame
    twice. Each tile is decoded over the whole time, so with tiles there is one piece.

    Raises:
        NonFiniteError: the latents, which are checked by this call, or a piece hold NaN or infinity.
        OutOfMemoryError: the smallest tiles do not fit either.
    """
    check_latents(latents, "before decoding")
    latents = latents.cpu()
    size = LatentSize.of(latents, vae.config.geometry)
    try:
        if tiles == AUTO:
            tiles = _auto_tiles(vae, size, len(latents), "decode", runtime, budget)
    except OutOfMemoryError as error:
        raise OutOfMemoryError(str(error), latents) from error
    # A generator of its own: what is above runs now and not when the first piece is asked for.
    return _decode_pieces(vae, latents, tiles, size, runtime)


@torch.no_grad()
def _decode_pieces(
    vae: PixelDecoder, latents: Tensor, tiles: TileSettings | None, size: LatentSize, runtime: Runtime
) -> Iterator[Tensor]:
    ranks = None if tiles else _ranks_for(vae, runtime)
    decoder = vae if ranks is None else StripDecoder(vae, ranks)

    def work(choice: TileSettings | None) -> Iterator[Tensor]:
        return (decoder if choice == tiles else vae).decode_pieces(latents, choice, runtime.chunks("Decoding"))

    try:
        for piece in _retry_smaller(work, tiles, size, "decode"):
            check_pixels(piece)
            yield piece
    except OutOfMemoryError as error:
        raise OutOfMemoryError(str(error), latents) from error


def _ranks_for(vae: PixelDecoder, runtime: Runtime) -> Ranks | None:
    """Those that decode by `vae` in strips, if there are any that can load it."""
    return None if vae.source is None else runtime.ranks


class StripDecoder(PixelDecoder):
    """A VAE on several ranks, of which each decodes some rows of the picture."""

    def __init__(self, vae: PixelDecoder, ranks: Ranks) -> None:
        super().__init__()
        self.config, self._vae, self._ranks = vae.config, vae, ranks

    def decode_chunks(self, latents: Tensor) -> Iterator[Tensor]:
        source, ranks = self._vae.source, self._ranks
        assert source is not None and isinstance(self._vae, WanVAE), "asked for where it is"
        with leading(ranks, FollowDecode(source, digest_weights(self._vae), latents)):
            pieces = _strips(self._vae, latents, ranks)
            for index in range(latents.shape[2]):
                with ranks.together():
                    ranks.tell(Step(index, 0))
                    piece = next(pieces)
                assert piece is not None, "the first rank has the picture"
                yield piece


@dataclass(frozen=True, eq=False)
class FollowDecode:
    """Take part in decoding normalised latents (B, z, F, h, w) by a VAE; `digest` is that of its weights at rank 0."""

    source: Source
    digest: str
    latents: Tensor

    def __call__(self, desk: Desk) -> None:
        vae, ranks = desk.model("vae", self.source), desk.runtime.ranks
        assert ranks is not None, "a rank follows others"
        if digest_weights(vae) != self.digest:
            raise ValueError("The file of the VAE has changed since it was loaded; load it again.")
        with torch.no_grad(), kernels.run(), working_encoder(vae, desk.runtime, MemorySettings(), 0):
            pieces = _strips(vae, self.latents, ranks)
            while not isinstance(ranks.hear(), EndRun):
                next(pieces)


@dataclass(frozen=True, eq=False)
class DecodeRequest:
    """`VaeHandle.decode_pieces` for another process."""

    source: Source
    latents: Tensor
    dtype: torch.dtype
    tiles: Tiles
    memory: MemorySettings

    @classmethod
    def of(cls, handle: VaeHandle, latents: Tensor) -> "DecodeRequest":
        assert handle.vae.source is not None, "cards are given to what they can load"
        return cls(handle.vae.source, latents.cpu(), handle.vae.dtype, handle.tiles, handle.memory)

    def __call__(self, desk: Desk) -> Iterator[Tensor]:
        runtime = replace(desk.runtime, dtype=self.dtype)
        vae = desk.model("vae", self.source)
        return VaeHandle(vae=vae, runtime=runtime, tiles=self.tiles, memory=self.memory).decode_pieces(self.latents)


def _strips(vae: WanVAE, latents: Tensor, ranks: Ranks) -> Iterator[Tensor | None]:
    """The whole picture of one latent frame after another at the first rank, nothing at the others."""
    count = min(ranks.count, latents.shape[3])
    mesh = ranks.arranged(Layout(1, count))
    if ranks.rank >= count:
        yield from [None] * latents.shape[2]
        return
    strip = Strip(mesh, shares(latents.shape[3], count))
    yield from map(strip.at_first, vae.decode_chunks(latents[..., strip.place, :], strip))


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
        tiles = _auto_tiles(vae, size, len(pixels), "encode", runtime, budget)

    def work(tiles: TileSettings | None) -> Iterator[Tensor]:
        yield vae.encode(pixels, tiles, runtime.chunks("Encoding"))

    return next(_retry_smaller(work, tiles, size, "encode"))


def _auto_tiles(
    vae: PixelDecoder, size: LatentSize, batch: int, what: VaePass, runtime: Runtime, budget: int | None
) -> TileSettings | None:
    """The tiles with which a pass fits in memory, after the host was asked to free some; None where the whole fits.

    Raises:
        OutOfMemoryError: the smallest tiles need more than `budget`.
    """
    if budget is None and runtime.unbounded:
        return None
    plan, whole = (vae.config, vae.dtype, size), size
    if what == "decode" and (ranks := _ranks_for(vae, runtime)) is not None:
        whole = strip_of(size, ranks.count)
    needed = vae_peak_bytes(*plan[:2], whole, None, what, batch)
    available = runtime.request_memory(needed) if budget is None else budget
    if available is None or needed <= available:
        return None
    try:
        tiles = choose_tiles(*plan, available, what, batch)
    except OutOfMemoryError:
        if budget is not None:
            raise
        # The free memory of a device is an estimate, so the smallest tiles are tried even where they seem too large.
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


def _retry_smaller(
    work: Callable[[TileSettings | None], Iterator[Tensor]], tiles: TileSettings | None, size: LatentSize, what: VaePass
) -> Iterator[Tensor]:
    """The pieces (B, C, t, ...) of `work` with `tiles`; each time the device runs out of memory it begins again with
    smaller ones, and the frames that were yielded before are not yielded again.
    """
    smaller = [choice for choice in (TileSettings(), smallest_tiles(size)) if _area(choice, size) < _area(tiles, size)]
    tried = [tiles, *smaller]
    doing, done = {"decode": "decoding", "encode": "encoding"}[what], 0
    for attempt, choice in enumerate(tried):
        try:
            start = 0
            for piece in work(choice):
                new = piece[:, :, max(0, done - start) :]
                start += piece.shape[2]
                if new.shape[2]:
                    done = start
                    yield new
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Outside of `except`, where the traceback holds the tensors of the failed pass.
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
