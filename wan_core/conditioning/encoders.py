"""The frozen encoders that turn pictures into latents and tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..fitting import ASPECTS, LENGTH_POLICIES, Aspect, LengthPolicy, fit_length, fit_size
from ..media import frames_to_pixels
from ..models.image_encoder import ImageEncoder
from ..models.vae import WanVAE
from ..settings import check_choice
from ..types import VideoSize


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How pictures and clips are brought to the size of a video."""

    aspect: Aspect = "crop"
    length: LengthPolicy = "repeat last"

    def __post_init__(self) -> None:
        check_choice("aspect", self.aspect, ASPECTS)
        check_choice("length policy", self.length, LENGTH_POLICIES)

    def clip(self, frames: Tensor, size: VideoSize, name: str) -> Tensor:
        """`frames` (T, H, W, C) at the size and length of the video."""
        return fit_size(fit_length(frames, size.num_frames, self.length, name), size.width, size.height, self.aspect)

    def picture(self, frames: Tensor, size: VideoSize) -> Tensor:
        """The first of `frames` (T, H, W, C) at the size of the video, (1, height, width, C)."""
        return fit_size(frames[:1], size.width, size.height, self.aspect)


FUN_FIT = Fit(aspect="stretch")
"""How VideoX-Fun fits control videos, start and reference images of its control and camera models."""


@dataclass(frozen=True, kw_only=True)
class LatentEncoder:
    """A VAE on its device with the way to run it: frames in [0, 1] in, normalised latents out.

    Attributes:
        encode: pixels (B, 3, T, H, W) in [-1, 1] to latents, such as `decode.encode`; None is the VAE's own, untiled.
    """

    vae: WanVAE
    encode: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def frames(self, frames: Tensor) -> Tensor:
        """Frames (T, H, W, 3) in [0, 1] to latents (1, 16, F, h, w) on the VAE's device."""
        return self.pixels(frames_to_pixels(frames))

    @torch.no_grad()
    def pixels(self, pixels: Tensor) -> Tensor:
        """Pixels (1, 3, T, H, W) in [-1, 1] to latents (1, 16, F, h, w) on the VAE's device."""
        encode = self.encode or self.vae.encode
        return encode(pixels).to(self.vae.conv2.weight.device)


@torch.no_grad()
def image_tokens(encoder: ImageEncoder, *pictures: Tensor) -> Tensor:
    """CLIP tokens (1, 257 * pictures, 1280) of pictures (1, H, W, 3) in [0, 1], each at its own size."""
    tokens = [encoder(picture[:1, ..., :3].permute(0, 3, 1, 2).float() * 2 - 1) for picture in pictures]
    return torch.cat(tokens, 1)
