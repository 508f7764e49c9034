"""The decoder of the tiny autoencoders for Wan (taew2_1 and taew2_2 of madebyollin/taehv): latents to pictures, much
faster than the VAE.

Attribute names are the keys of the published file. Frames pass one after the other; each block remembers the last frame
that it saw.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import PreviewDecoderConfig
from .pixel_decoder import PixelDecoder

NAMES = {16: "taew2_1", 48: "taew2_2"}
"""The published files, without the ending, by the channels of a latent."""

Memory = dict[nn.Module, Tensor]
"""The last input frame of each block, for one pass over one video."""


def _conv(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class SoftClamp(nn.Module):
    """Latents limited to (-3, 3), smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemBlock(nn.Module):
    """Three convolutions over a frame and the one before it, beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """Consecutive frames (n, C, H, W); a frame of zeros stands before the first one of a video."""
        past = torch.cat((memory.get(self, torch.zeros_like(x[:1])), x[:-1]))
        memory[self] = x[-1:]
        return F.relu(self.conv(torch.cat((x, past), 1)) + x)


class TimeGrowth(nn.Module):
    """Each frame as `stride` frames; with `only_last` only the last of all is computed, unless all are asked for."""

    def __init__(self, width: int, stride: int, *, only_last: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)
        self._only_last = only_last

    def forward(self, x: Tensor, *, whole: bool = False) -> Tensor:
        width = x.shape[1]
        if self._only_last and not whole:
            return F.conv2d(x[-1:], self.conv.weight[-width:])
        return rearrange(self.conv(x), "b (stride c) h w -> (b stride) c h w", c=width)


class PreviewDecoder(PixelDecoder):
    """The published decoder. A preview is one picture per latent frame: the last of the four frames that it stands for.

    Nothing after the last growth in time remembers a frame, so for a preview the other three are not computed there,
    and change nothing. `decode` and `decode_pieces` give the whole video in place of the VAE, as an approximation.
    """

    config: PreviewDecoderConfig

    def __init__(self, config: PreviewDecoderConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        layers: list[nn.Module] = [SoftClamp(), _conv(config.latent_channels, widths[0]), nn.ReLU()]
        for stage, stride in enumerate((1, 2, 2)):
            width, wider = widths[stage : stage + 2]
            layers += [MemBlock(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), TimeGrowth(width, stride, only_last=stage == 2)]
            layers.append(_conv(width, wider, bias=False))
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _conv(widths[-1], 3 * config.patch**2))

    @torch.no_grad()
    def forward(self, latents: Tensor, context: int = 0) -> Tensor:
        """Pictures (F - context, 3, 8h, 8w) in [0, 1] of normalised latents (z, F, h, w), `patch` times as large.

        The first `context` frames only fill the memory. With seven of them a picture is the same as in the whole video,
        with fewer it is an approximation.
        """
        memory: Memory = {}
        pictures = []
        for x in latents.transpose(0, 1).split(1):  # (1, z, h, w), one latent frame after the other
            for layer in self.decoder:
                x = layer(x, memory) if isinstance(layer, MemBlock) else layer(x)
            pictures.append(x)
        return F.pixel_shuffle(torch.cat(pictures[context:]), self.config.patch).clamp_(0, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        weight = self.decoder[1].weight
        assert isinstance(weight, Tensor), "of the first convolution"
        return weight

    @torch.no_grad()
    def decode_chunks(self, latents: Tensor) -> Iterator[Tensor]:
        """All frames of normalised latents (B, z, F, h, w), as pixels (B, 3, t, 8h, 8w) in [-1, 1], `patch` times as
        large, on the decoder's device: one of the first latent frame, as of the VAE, and four of each after it.
        """
        latents = latents.to(self._weight)
        for chunks in zip(*map(self._frames, latents), strict=True):
            yield torch.stack([chunk.movedim(0, 1) for chunk in chunks]).clamp_(0, 1).mul_(2).sub_(1)

    def _frames(self, latents: Tensor) -> Iterator[Tensor]:
        """The frames (t, 3, H, W) of each latent frame of one video (z, F, h, w)."""
        memory: Memory = {}
        for number, x in enumerate(latents.transpose(0, 1).split(1)):
            for layer in self.decoder:
                if isinstance(layer, MemBlock):
                    x = layer(x, memory)
                else:
                    x = layer(x, whole=True) if isinstance(layer, TimeGrowth) else layer(x)
            # The published code drops what comes before the last frame of the first group.
            yield F.pixel_shuffle(x if number else x[-1:], self.config.patch)
