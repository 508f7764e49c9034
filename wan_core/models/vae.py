"""The causal video autoencoder, streamed in time and tiled in space."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..parallel.strips import Strip
from ..tiling import TileSettings, chunk_bounds
from .config import Geometry, VAEConfig
from .ops import add_
from .pixel_decoder import OnChunk, PixelDecoder
from .vae_blocks import (
    CausalConv3d,
    ChannelNorm,
    Downsample,
    FeatureCache,
    ResidualBlock,
    SpatialAttention,
    Upsample,
    averaged,
    container,
    levels_of,
)

WIDTHS = (1, 2, 4, 4)
"""Channel multiples of the four resolutions, finest first."""

FINEST_FRAMES = {torch.float32: 1}
"""Frames that are decoded at a time at the finest resolution, by dtype, where it is not two: one takes a sixteenth less
memory, and copies the cached frames twice as often.
"""


def normalise(raw: Tensor, geometry: Geometry) -> Tensor:
    """Raw VAE latents (B, z, ...) in the DiT's unit-variance space, float32.

    Raises:
        ValueError: they have another number of channels.
    """
    mean, std = _statistics(raw, geometry)
    return (raw.float() - mean) / std


def denormalise(latents: Tensor, geometry: Geometry) -> Tensor:
    """The inverse of `normalise`: what ComfyUI's LATENT holds."""
    mean, std = _statistics(latents, geometry)
    return latents.float() * std + mean


def _statistics(x: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    if x.ndim < 2 or x.shape[1] != geometry.channels:
        raise ValueError(
            f"Latents of {geometry.name} have {geometry.channels} channels, (B, {geometry.channels}, F, h, w); got "
            f"{tuple(x.shape)}: they are another model's. Use the VAE that belongs to the model."
        )
    shape = (1, -1, *(1,) * (x.ndim - 2))
    mean, std = (torch.tensor(v, device=x.device).view(shape) for v in (geometry.mean, geometry.std))
    return mean, std


class Encoder(nn.Module):
    """Pixels (B, 3, T, H, W) to moments (B, 2 * latent channels, F, h, w), one chunk of frames at a time."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.patch, self.shortcuts = config.patch, config.shortcuts
        base = channels = config.base_dim
        self.conv1 = CausalConv3d(3 * config.patch**2, base, (3, 3, 3))
        levels: list[list[nn.Module]] = []
        for level, multiple in enumerate(WIDTHS):
            blocks = [ResidualBlock(channels, base * multiple), ResidualBlock(base * multiple, base * multiple)]
            channels = base * multiple
            halved = [Downsample(channels, temporal=level > 0)] if level < len(WIDTHS) - 1 else []
            levels.append([*blocks, *halved])
        self.downsamples = container(levels, "downsamples" if config.shortcuts else None)
        self._layers_per_level = [len(layers) for layers in levels]
        self.middle = nn.Sequential(*_middle(channels))
        self.head = nn.Sequential(
            ChannelNorm(channels, 3), nn.SiLU(), CausalConv3d(channels, 2 * config.latent_channels, (3, 3, 3))
        )

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        fine, coarse = self.stages()
        # The tensors of the two finest resolutions are the largest: two frames at a time pass them, and become one.
        pairs = [self._shrink(fine, self.conv1(self._folded(pair), cache), cache) for pair in x.split(2, 2)]
        return _run_head(self.head, _run(self.middle, self._shrink(coarse, torch.cat(pairs, 2), cache), cache), cache)

    def stages(self) -> tuple[list[list[nn.Module]], list[list[nn.Module]]]:
        """The layers of each of the two finest resolutions, and those of each of the coarser ones."""
        levels = levels_of(self.downsamples, self._layers_per_level)
        return levels[:2], levels[2:]

    def _folded(self, pixels: Tensor) -> Tensor:
        if self.patch == 1:
            return pixels
        x = rearrange(pixels, PATCHES, r=self.patch, q=self.patch)
        return x.contiguous(memory_format=torch.channels_last_3d)

    def _shrink(self, levels: list[list[nn.Module]], x: Tensor, cache: FeatureCache) -> Tensor:
        for layers in levels:
            last = layers[-1]
            sides = (1 + last.temporal, 2) if isinstance(last, Downsample) else (1, 1)
            shortcut = averaged(x, *sides) if self.shortcuts else None
            for layer in layers:
                x = layer(x, cache)
            x = x if shortcut is None else add_(x, shortcut)
        return x


class Decoder(nn.Module):
    """Latents (B, latent channels, F, h, w) to pixels (B, 3, T, H, W), one latent frame at a time."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.patch, self.upscale, self.shortcuts = config.patch, config.upscale, config.shortcuts
        base = config.decoder_dim or config.base_dim
        channels = base * WIDTHS[-1]
        self.conv1 = CausalConv3d(config.latent_channels, channels, (3, 3, 3))
        self.middle = nn.Sequential(*_middle(channels))
        levels: list[list[nn.Module]] = []
        for level, multiple in enumerate(reversed(WIDTHS)):
            layers: list[nn.Module] = []
            for _ in range(3):
                layers.append(ResidualBlock(channels, base * multiple))
                channels = base * multiple
            if level < len(WIDTHS) - 1:
                wider, channels = channels, channels if config.shortcuts else channels // 2
                layers.append(Upsample(wider, channels, temporal=level < 2))
            levels.append(layers)
        self.upsamples = container(levels, "upsamples" if config.shortcuts else None)
        self._layers_per_level = [len(layers) for layers in levels]
        pixels = 3 * (config.patch * config.upscale) ** 2
        self.head = nn.Sequential(ChannelNorm(channels, 3), nn.SiLU(), CausalConv3d(channels, pixels, (3, 3, 3)))

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        x, shortcut = self._stage(0, _run(self.middle, self.conv1(x, cache), cache), None, cache)
        x, shortcut = self._stage(1, x, shortcut, cache)
        # The tensors of the two finest resolutions are the largest: one frame at a time passes them, and becomes two.
        frames = zip(x.split(1, 2), _split(shortcut, 1, x.shape[2]), strict=True)
        return torch.cat([self._fine(frame, part, cache) for frame, part in frames], 2)

    def stages(self) -> list[list[nn.Module]]:
        """The layers of each resolution, coarsest first; all but the first begin with the enlargement to it."""
        stages: list[list[nn.Module]] = [[]]
        for layers in levels_of(self.upsamples, self._layers_per_level):
            stages[-1] += [layer for layer in layers if not isinstance(layer, Upsample)]
            stages += [[layer] for layer in layers if isinstance(layer, Upsample)]
        return stages

    def _stage(
        self, number: int, x: Tensor, shortcut: Tensor | None, cache: FeatureCache
    ) -> tuple[Tensor, Tensor | None]:
        """`x` after a stage, and where the shortcut past its blocks and the next enlargement starts."""
        layers = self.stages()[number]
        if number:
            x = layers.pop(0)(x, cache, shortcut)
        shortcut = x if self.shortcuts and number < len(WIDTHS) - 1 else None
        for layer in layers:
            x = layer(x, cache)
        return x, shortcut

    def _fine(self, x: Tensor, shortcut: Tensor | None, cache: FeatureCache) -> Tensor:
        x, shortcut = self._stage(2, x, shortcut, cache)
        count = FINEST_FRAMES.get(x.dtype, 2)
        parts, shortcuts = list(x.split(count, 2)), _split(shortcut, count, x.shape[2])
        del x, shortcut
        # Each part is let go while it passes, so that it is not held beside its enlargement.
        pieces = []
        while parts:
            pieces.append(self._to_pixels(self._stage(3, parts.pop(0), shortcuts.pop(0), cache)[0], cache))
        return torch.cat(pieces, 2)

    def _to_pixels(self, x: Tensor, cache: FeatureCache) -> Tensor:
        x = _run_head(self.head, x, cache)
        if self.patch > 1:
            return rearrange(x, UNFOLDED, r=self.patch, q=self.patch)
        return x if self.upscale == 1 else F.pixel_shuffle(x.transpose(1, 2), self.upscale).transpose(1, 2)


PATCHES = "b c t (h q) (w r) -> b (c r q) t h w"
UNFOLDED = "b (c r q) t h w -> b c t (h q) (w r)"
"""Pixels as channels in the order of Wan 2.2: the column of a pixel in its patch before its row."""


def _middle(channels: int) -> tuple[nn.Module, ...]:
    return ResidualBlock(channels, channels), SpatialAttention(channels), ResidualBlock(channels, channels)


def _split(x: Tensor | None, count: int, frames: int) -> list[Tensor | None]:
    """`x` in parts of `count` of its `frames` frames; None for each part of nothing."""
    return [None] * -(-frames // count) if x is None else [*x.split(count, 2)]


def _run(layers: Iterable[nn.Module], x: Tensor, cache: FeatureCache) -> Tensor:
    for layer in layers:
        x = layer(x, cache)
    return x


def _run_head(head: nn.Sequential, x: Tensor, cache: FeatureCache) -> Tensor:
    norm, _, conv = head
    return conv(x, cache, norm)


class WanVAE(PixelDecoder):
    """Pixels in [-1, 1] to normalised latents and back.

    `encode` takes T = 4k + 1 frames and returns k + 1 latent frames; `decode` is its counterpart. Both stream over time
    with the memory of one chunk, and over space in tiles with `TileSettings`. `on_chunk(done, total)` is called after
    each chunk of each tile; what it raises ends the pass.
    """

    config: VAEConfig

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * latent, 2 * latent, (1, 1, 1))
        self.conv2 = CausalConv3d(latent, latent, (1, 1, 1))
        self.decoder = Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv2.weight.dtype

    def use_channels_last(self) -> "WanVAE":
        """Lay the convolution weights out as the activations are: otherwise every call would convert one of them."""
        for parameter in self.parameters():
            if parameter.ndim in (4, 5):
                layout = torch.channels_last if parameter.ndim == 4 else torch.channels_last_3d
                parameter.data = parameter.data.contiguous(memory_format=layout)
        return self

    def encode(self, video: Tensor, tiles: TileSettings | None = None, on_chunk: OnChunk | None = None) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] to normalised latents (B, z, F, h, w), float32.

        They are the mean of the posterior, as in every reference at inference.

        Raises:
            ValueError: T is not 4k + 1, a side is not a multiple of the stride, or the tensor is not (B, 3, T, H, W).
        """
        geometry = self.config.geometry
        time, stride = geometry.temporal_stride, geometry.spatial_stride
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"The VAE encodes (B, 3, T, H, W); got {tuple(video.shape)}.")
        batch, _, num_frames, height, width = video.shape
        if (num_frames - 1) % time or height % stride or width % stride:
            raise ValueError(
                f"The VAE encodes {geometry.length_rule} frames with sides that are multiples of {stride}; "
                f"got {num_frames} frames of {width}x{height}."
            )
        size = (batch, geometry.channels, geometry.latent_frames(num_frames), height // stride, width // stride)
        return self._assemble(self.encode_chunks, video, size, 1, stride, tiles, on_chunk)

    def encode_chunks(self, video: Tensor) -> Iterator[Tensor]:
        """Normalised latents of one latent frame after another, on the VAE's device."""
        # The first latent frame is made of one frame alone, every other of `temporal_stride`.
        cache = FeatureCache()
        for start, end in chunk_bounds(video.shape[2], 1, self.config.geometry.temporal_stride):
            # (B, 2 z, 1, h, w): the mean of the posterior, which is used, and its logarithmic variance.
            moments = self.conv1(self.encoder(self._enter(video[:, :, start:end]), cache), cache)
            yield normalise(moments[:, : self.config.latent_channels], self.config.geometry)

    def decode_chunks(self, latents: Tensor, strip: Strip | None = None) -> Iterator[Tensor]:
        """Pixels of one latent frame after another, 1 frame and then 4 each, on the VAE's device and in its dtype. With
        `strip`, latents and pixels are its rows.
        """
        cache = FeatureCache()
        cache.strip = strip
        for index in range(latents.shape[2]):
            frame = self._enter(denormalise(latents[:, :, index : index + 1], self.config.geometry))
            yield self.decoder(self.conv2(frame, cache), cache)

    def _enter(self, x: Tensor) -> Tensor:
        weight = self.conv2.weight
        return x.to(weight.device, weight.dtype).contiguous(memory_format=torch.channels_last_3d)
