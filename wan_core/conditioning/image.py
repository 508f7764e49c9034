"""Pictures and clips to conditioning: start and end images, inpainting, Fun control videos, reference images."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..media import frames_to_pixels
from ..media.fitting import ASPECTS, LENGTH_POLICIES, Aspect, LengthPolicy, fit_length, fit_size
from ..models.image_encoder import ImageEncoder
from ..models.vae import WanVAE
from ..settings import check_choice
from ..types import Conditioning, VideoSize
from ..variants import CONTROL, FIRST_FRAME, IMAGE, MASK, first_frame


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How pictures and clips are resized to the size of a video."""

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
    """A VAE on its device, and how it is run: frames in [0, 1] to normalised latents.

    Attributes:
        encode: pixels (B, 3, T, H, W) in [-1, 1] to latents, such as `decode.encode`; None is the VAE's own, untiled.
    """

    vae: WanVAE
    encode: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def frames(self, frames: Tensor) -> Tensor:
        """Frames (T, H, W, 3) in [0, 1] to latents (1, z, F, h, w) on the VAE's device."""
        return self.pixels(frames_to_pixels(frames))

    @torch.no_grad()
    def pixels(self, pixels: Tensor) -> Tensor:
        """Pixels (1, 3, T, H, W) in [-1, 1] to latents (1, z, F, h, w) on the VAE's device."""
        encode = self.encode or self.vae.encode
        return encode(pixels).to(self.vae.conv2.weight.device)


@torch.no_grad()
def encode_pictures(encoder: ImageEncoder, *pictures: Tensor) -> Tensor:
    """CLIP tokens (1, 257 * pictures, 1280) of pictures (1, H, W, 3) in [0, 1], each at its own size."""
    tokens = [encoder(picture[:1, ..., :3].permute(0, 3, 1, 2).float() * 2 - 1) for picture in pictures]
    return torch.cat(tokens, 1)


def image_conditioning(
    cond: Conditioning,
    size: VideoSize,
    encoder: LatentEncoder,
    image_encoder: ImageEncoder | None,
    *,
    start: Tensor | None = None,
    end: Tensor | None = None,
    video: Tensor | None = None,
    mask: Tensor | None = None,
    fit: Fit | None = None,
) -> Conditioning:
    """`cond` with the slots `mask` and `image` of I2V, FLF2V and Fun-InP models, and the image tokens of start and end
    image.

    Args:
        start, end: pictures (T, H, W, 3) in [0, 1], whose first frames become the first and the last frame.
        video, mask: a clip (T, H, W, 3), and where (T, H, W) it is generated again: 1, or kept: 0.
        fit: how they are resized to `size`; the image tokens are made from the pictures before that.

    Raises:
        ValueError: nothing is given, or a mask without a video, or pictures without the image encoder.
    """
    fit = fit or Fit()
    if start is None and end is None and video is None:
        raise ValueError("Image conditioning needs a start image, an end image, or a video with a mask.")
    if mask is not None and video is None:
        raise ValueError("inpaint_mask marks the part of a video that is generated again; give inpaint_video too.")
    pictures = [picture for picture in (start, end) if picture is not None]
    if pictures and image_encoder is None:
        raise ValueError("Start and end images need the CLIP image encoder; load it (open-clip XLM-RoBERTa ViT-H/14).")
    pixels, known = _known_pixels(size, start, end, video, mask, fit)
    slots = {**(cond.slots or {}), MASK.name: fold_frames(known, size), IMAGE.name: encoder.pixels(pixels)}
    device = slots[IMAGE.name].device
    slots[MASK.name] = slots[MASK.name].to(device)
    tokens = cond.image_tokens
    if start is not None and image_encoder is not None:
        tokens = encode_pictures(image_encoder, *pictures)
    inputs = {"input_image": start, "end_image": end, "inpaint_video": video}
    names = [name for name, value in inputs.items() if value is not None]
    return cond.with_inputs(*names, size=size, slots=slots, image_tokens=tokens)


def _known_pixels(
    size: VideoSize, start: Tensor | None, end: Tensor | None, video: Tensor | None, mask: Tensor | None, fit: Fit
) -> tuple[Tensor, Tensor]:
    """Pixels (1, 3, T, H, W) in [-1, 1], grey where unknown, and what is known (T, H, W), 1 or 0."""
    pixels = torch.zeros(1, 3, size.num_frames, size.height, size.width)
    known = torch.zeros(size.num_frames, size.height, size.width)
    if video is not None:
        clip = fit.clip(video, size, "inpaint_video")
        known = torch.ones_like(known)
        if mask is not None:
            known = (fit.clip(mask[..., None], size, "inpaint_mask")[..., 0] < 0.5).float()
        pixels = (clip.permute(3, 0, 1, 2)[None] * 2 - 1) * known
    for picture, index in ((start, 0), (end, -1)):
        if picture is not None:
            pixels[0, :, index] = fit.picture(picture, size)[0].permute(2, 0, 1) * 2 - 1
            known[index] = 1
    return pixels, known


def fold_frames(known: Tensor, size: VideoSize) -> Tensor:
    """A mask of known pixels (T, H, W) as channels of each latent frame, (1, 4, F, h, w).

    The first frame is repeated four times, so that every latent frame has a group of four; channel k is frame k of the
    group. The first latent frame is resized by itself, the others together (VideoX-Fun `resize_mask`).
    """
    group, latent = size.geometry.temporal_stride, size.latent
    repeated = torch.cat((known[:1].expand(group - 1, -1, -1), known))
    folded = rearrange(repeated, "(f group) h w -> 1 group f h w", group=group)
    first = F.interpolate(folded[:, :, :1], (1, latent.height, latent.width), mode="trilinear", align_corners=False)
    if latent.frames == 1:
        return first
    others = F.interpolate(folded[:, :, 1:], (latent.frames - 1, latent.height, latent.width), mode="trilinear")
    return torch.cat((first, others), 2)


def first_frame_conditioning(
    cond: Conditioning,
    size: VideoSize,
    encoder: LatentEncoder,
    image_encoder: ImageEncoder | None,
    start: Tensor,
    fit: Fit | None = None,
) -> Conditioning:
    """`cond` with the start image of control and camera models: the latent of one frame, and zeros after it.

    Raises:
        ValueError: the image encoder is missing.
    """
    if image_encoder is None:
        raise ValueError("A start image needs the CLIP image encoder; load it (open-clip XLM-RoBERTa ViT-H/14).")
    latents = encoder.frames((fit or FUN_FIT).picture(start, size))
    slots = {**(cond.slots or {}), FIRST_FRAME.name: first_frame(latents, size.latent.frames)}
    return cond.with_inputs("input_image", size=size, slots=slots, image_tokens=encode_pictures(image_encoder, start))


def control_conditioning(
    cond: Conditioning, size: VideoSize, encoder: LatentEncoder, video: Tensor, fit: Fit | None = None
) -> Conditioning:
    """`cond` with a control video (T, H, W, 3) in [0, 1] of edges, depth or poses, encoded by the VAE."""
    latents = encoder.frames((fit or FUN_FIT).clip(video, size, "control_video"))
    return cond.with_inputs("control_video", size=size, slots={**(cond.slots or {}), CONTROL.name: latents})


def reference_conditioning(
    cond: Conditioning,
    size: VideoSize,
    encoder: LatentEncoder,
    image_encoder: ImageEncoder | None,
    reference: Tensor,
    fit: Fit | None = None,
) -> Conditioning:
    """`cond` with the reference image (T, H, W, 3) of V1.1 control models; its tokens take the place of a start
    image's.

    Raises:
        ValueError: the image encoder is missing.
    """
    if image_encoder is None:
        raise ValueError("A reference image needs the CLIP image encoder; load it (open-clip XLM-RoBERTa ViT-H/14).")
    latents = encoder.frames((fit or FUN_FIT).picture(reference, size))
    return cond.with_inputs(
        "reference_image", size=size, reference=latents[:, :, 0], image_tokens=encode_pictures(image_encoder, reference)
    )
