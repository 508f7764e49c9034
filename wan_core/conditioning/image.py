"""Pictures and clips to conditioning: start and end images, inpainting, Fun control videos, reference images."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..checks import check_choice
from ..media import frames_to_pixels
from ..media.fitting import ASPECTS, LENGTH_POLICIES, Aspect, LengthPolicy, fit_length, fit_size
from ..models.image_encoder import ImageEncoder
from ..models.vae import WanVAE
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


def _with_tokens(cond: Conditioning, encoder: ImageEncoder | None, **pictures: Tensor | None) -> Conditioning:
    """`cond` with the image tokens of `pictures`; without an encoder with their names, for models that need none."""
    given = {name: picture for name, picture in pictures.items() if picture is not None}
    if not given:
        return cond
    if encoder is None:
        return dataclasses.replace(cond, without_tokens=tuple(dict.fromkeys((*(cond.without_tokens or ()), *given))))
    return dataclasses.replace(cond, image_tokens=encode_pictures(encoder, *given.values()))


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
    image if there is an encoder for them.

    Where the models have a timestep for each frame, a first frame that is known is clean at every step, else known
    parts have less of the timestep (VideoX-Fun `pipeline_wan2_2_fun_inpaint.py`).

    Args:
        start, end: pictures (T, H, W, 3) in [0, 1], whose first frames become the first and the last frame.
        video, mask: a clip (T, H, W, 3), and where (T, H, W) it is generated again: 1, or kept: 0.
        fit: how they are resized to `size`; the image tokens are made from the pictures before that.

    Raises:
        ValueError: nothing is given, or a mask without a video.
    """
    fit = fit or Fit()
    if start is None and end is None and video is None:
        raise ValueError("Image conditioning needs a start image, an end image, or a video with a mask.")
    if mask is not None and video is None:
        raise ValueError("inpaint_mask marks the part of a video that is generated again; give inpaint_video too.")
    pixels, known = _known_pixels(size, start, end, video, mask, fit)
    slots = {**(cond.slots or {}), MASK.name: fold_frames(known, size), IMAGE.name: encoder.pixels(pixels)}
    device = slots[IMAGE.name].device
    slots[MASK.name] = slots[MASK.name].to(device)
    if start is not None or image_encoder is None:
        cond = _with_tokens(cond, image_encoder, input_image=start, end_image=end)
    if size.geometry.frame_times:
        cond = _with_known_times(cond, known, slots[IMAGE.name], size)
    inputs = {"input_image": start, "end_image": end, "inpaint_video": video}
    names = [name for name, value in inputs.items() if value is not None]
    return cond.with_inputs(*names, size=size, slots=slots)


TIMESTEP_LEVELS = 16
"""Fractions of a timestep are rounded to as many: at the edge of a mask each token would have one of its own."""


def _with_known_times(cond: Conditioning, known: Tensor, latents: Tensor, size: VideoSize) -> Conditioning:
    """`cond` with the clean frames, or the timesteps, that follow from what is known of each pixel (T, H, W); `latents`
    (1, z, F, h, w) are of the known pixels.
    """
    geometry, latent = size.geometry, size.latent
    # The first frame of each group stands for it (VideoX-Fun takes the first channel of the folded mask).
    unknown = torch.cat((known[:1], known[1 :: geometry.temporal_stride]))[:, None].neg() + 1
    unknown = F.interpolate(unknown, (latent.height, latent.width), mode="bilinear", align_corners=True)[:, 0]
    if not unknown[0].any():
        return cond.with_clean_frames(latents[:, :, :1], latent.frames)
    if unknown.all():
        return cond
    _, rows, columns = geometry.patch
    index = unknown[:, ::rows, ::columns].mul(TIMESTEP_LEVELS).round().long()
    factors = torch.arange(TIMESTEP_LEVELS + 1, device=latents.device) / TIMESTEP_LEVELS
    return dataclasses.replace(cond, clean=None, timestep_factors=factors[None], timestep_index=index[None])


def clean_start_conditioning(
    cond: Conditioning, size: VideoSize, encoder: LatentEncoder, start: Tensor, fit: Fit | None = None
) -> Conditioning:
    """`cond` with a start image, or the frames of a clip to continue, as clean latent frames: for models that read
    nothing beside the noise (Wan 2.2 TI2V-5B).

    Args:
        start: frames (T, H, W, 3) in [0, 1]; of a clip as many as whole latent frames hold.

    Raises:
        ValueError: they are as long as the video.
    """
    geometry = size.geometry
    count = geometry.video_frames(geometry.latent_frames(len(start)))
    if count >= size.num_frames:
        raise ValueError(
            f"input_image holds {len(start)} frames, which leaves none of the video's {size.num_frames} to generate; "
            "give fewer, or raise num_frames."
        )
    pictures = fit_size(start[:count], size.width, size.height, (fit or Fit()).aspect)
    latents = encoder.frames(pictures)
    return cond.with_inputs("input_image", size=size).with_clean_frames(latents, size.latent.frames)


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
    """`cond` with the start image of control and camera models: the latent of one frame, and zeros after it."""
    latents = encoder.frames((fit or FUN_FIT).picture(start, size))
    slots = {**(cond.slots or {}), FIRST_FRAME.name: first_frame(latents, size.latent.frames)}
    cond = _with_tokens(cond, image_encoder, input_image=start)
    return cond.with_inputs("input_image", size=size, slots=slots)


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
    """
    latents = encoder.frames((fit or FUN_FIT).picture(reference, size))
    cond = _with_tokens(cond, image_encoder, reference_image=reference)
    return cond.with_inputs("reference_image", size=size, reference=latents[:, :, 0])
