"""Start and end images, and inpainting: what is known of a video, as its models were trained to be told."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.image_encoder import ImageEncoder
from ..types import VAE_STRIDE, Conditioning, VideoSize
from ..variants import FIRST_FRAME, IMAGE, MASK
from .encoders import FUN_FIT, Fit, LatentEncoder, image_tokens
from .slots import first_frame


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
    """`cond` with the mask and image slots of I2V, FLF2V and Fun-InP models, and the image tokens of start and end
    image.

    Args:
        start, end: pictures (T, H, W, 3) in [0, 1], of which the first frame counts; they become the first and last
            frame.
        video, mask: a clip (T, H, W, 3) of which the parts where the mask (T, H, W) is 1 are drawn anew.
        fit: how they are brought to `size`; the tokens are made of the pictures as they are.

    Raises:
        ValueError: nothing is given, or a mask without a video, or pictures without the image encoder.
    """
    fit = fit or Fit()
    if start is None and end is None and video is None:
        raise ValueError("Give a start image, an end image, or a video with a mask.")
    if mask is not None and video is None:
        raise ValueError("A mask tells which part of a video is drawn anew; give the video too.")
    pictures = [picture for picture in (start, end) if picture is not None]
    if pictures and image_encoder is None:
        raise ValueError("Start and end images need the CLIP image encoder; load it (open-clip XLM-RoBERTa ViT-H/14).")
    pixels, known = _known_pixels(size, start, end, video, mask, fit)
    slots = {**(cond.slots or {}), MASK.name: fold_mask(known, size), IMAGE.name: encoder.pixels(pixels)}
    device = slots[IMAGE.name].device
    slots[MASK.name] = slots[MASK.name].to(device)
    clip = cond.clip
    if start is not None and image_encoder is not None:
        clip = image_tokens(image_encoder, *pictures)
    given = {"input_image": start, "end_image": end, "inpaint_video": video}
    names = [name for name, value in given.items() if value is not None]
    return cond.given(*names, size=size, slots=slots, clip=clip)


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


def fold_mask(known: Tensor, size: VideoSize) -> Tensor:
    """What is known of each pixel frame (T, H, W) as 4 channels of each latent frame, (1, 4, F, h, w).

    The first frame counts four times, so that the frames make whole groups; a channel is the place in its group. The
    first latent frame is resized by itself, the others together (VideoX-Fun `resize_mask`).
    """
    group = VAE_STRIDE[0]
    latent = size.latent
    repeated = torch.cat((known[:1].expand(group - 1, -1, -1), known))
    folded = repeated.unflatten(0, (latent.frames, group)).transpose(0, 1)[None]
    first = F.interpolate(folded[:, :, :1], (1, latent.height, latent.width), mode="trilinear", align_corners=False)
    if latent.frames == 1:
        return first
    rest = F.interpolate(folded[:, :, 1:], (latent.frames - 1, latent.height, latent.width), mode="trilinear")
    return torch.cat((first, rest), 2)


def first_frame_conditioning(
    cond: Conditioning,
    size: VideoSize,
    encoder: LatentEncoder,
    image_encoder: ImageEncoder | None,
    start: Tensor,
    fit: Fit | None = None,
) -> Conditioning:
    """`cond` with the start image of control and camera models: the latent of one frame, zeros after it.

    Raises:
        ValueError: the image encoder is missing.
    """
    if image_encoder is None:
        raise ValueError("A start image needs the CLIP image encoder; load it (open-clip XLM-RoBERTa ViT-H/14).")
    latents = encoder.frames((fit or FUN_FIT).picture(start, size))
    slots = {**(cond.slots or {}), FIRST_FRAME.name: first_frame(latents, size.latent.frames)}
    return cond.given("input_image", size=size, slots=slots, clip=image_tokens(image_encoder, start))
