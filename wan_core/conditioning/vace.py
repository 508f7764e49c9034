"""VACE inputs: a source video with a mask, and reference images, as one context each."""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..media.fitting import fit_size
from ..types import Conditioning, Curve, VaceInput, VideoSize
from .image import Fit, LatentEncoder


def vace_conditioning(
    cond: Conditioning,
    size: VideoSize,
    encoder: LatentEncoder,
    *,
    video: Tensor | None = None,
    mask: Tensor | None = None,
    references: Sequence[Tensor] = (),
    strength: float | Sequence[float] | Curve = 1.0,
    fit: Fit | None = None,
) -> Conditioning:
    """`cond` with one more VACE input.

    Args:
        video: the source (T, H, W, 3) in [0, 1]; parts to be generated are usually painted grey. None is all grey.
        mask: (T, H, W), 1 where the model generates and 0 where it keeps the source; binarised at 0.5. None is ones.
        references: pictures (T, H, W, 3), each frame of which becomes a latent frame in front of the video,
            letter-boxed on white.
        strength: factor on the hints, a number or a curve over the steps.
        fit: how video and mask are brought to `size`.
    """
    fit = fit or Fit()
    shape = (size.num_frames, size.height, size.width)
    frames = torch.full((*shape, 3), 0.5) if video is None else fit.clip(video, size, "vace_video")
    known = torch.ones(shape) if mask is None else fit.clip(mask[..., None], size, "vace_video_mask")[..., 0]
    drawn = (known > 0.5).float()
    pixels = frames.permute(3, 0, 1, 2)[None] * 2 - 1
    # The inactive part, which is kept, and the reactive part, which is generated (ali-vilab/VACE); grey is 0.
    latents = torch.cat((encoder.pixels(pixels * (1 - drawn)), encoder.pixels(pixels * drawn)), 1)
    context = torch.cat((latents, fold_pixels(drawn, size).to(latents)), 1)
    pictures = [picture[None] for reference in references for picture in reference]
    if pictures:
        context = torch.cat((reference_context(pictures, size, encoder), context), 2)
    inputs = {"vace_video": video, "vace_video_mask": mask, "vace_reference_image": pictures or None}
    names = [name for name, value in inputs.items() if value is not None] or ["vace_video"]
    added = VaceInput(context=context, strength=Curve.of(strength))
    return cond.with_inputs(*names, size=size, vace=append_input(cond.vace or (), added, size.latent.frames))


def reference_context(pictures: Sequence[Tensor], size: VideoSize, encoder: LatentEncoder) -> Tensor:
    """Context (1, 2 z + 64, R, h, w) of reference pictures (1, H, W, 3), each encoded by itself; their mask is zero."""
    latents = [encoder.frames(fit_size(p, size.width, size.height, "letterbox")) for p in pictures]
    known = torch.cat(latents, 2)
    # No reactive part, and a mask of zeros: a reference is kept.
    empty = known.new_zeros(1, known.shape[1] + size.geometry.vace_mask_channels, *known.shape[2:])
    return torch.cat((known, empty), 1)


def fold_pixels(drawn: Tensor, size: VideoSize) -> Tensor:
    """A mask (T, H, W) as channels of each latent cell, (1, 64, F, h, w): one for each pixel that the cell covers.

    Time is resampled to F frames by nearest neighbour (ali-vilab/VACE `vace_encode_masks`).
    """
    pixels = F.pixel_unshuffle(drawn[:, None], size.geometry.spatial_stride).transpose(0, 1)[None]
    latent = size.latent
    return F.interpolate(pixels, (latent.frames, latent.height, latent.width), mode="nearest-exact")


def append_input(before: Sequence[VaceInput], added: VaceInput, frames: int) -> tuple[VaceInput, ...]:
    """`before` and `added`, all with the reference frames of all in front; at the others' references each has zeros."""
    old = before[0].context.shape[2] - frames if before else 0
    new = added.context.shape[2] - frames
    widened = [dataclasses.replace(v, context=_insert_frames(v.context, old, new)) for v in before]
    return (*widened, dataclasses.replace(added, context=_insert_frames(added.context, 0, old)))


def _insert_frames(context: Tensor, at: int, count: int) -> Tensor:
    if not count:
        return context
    empty = context.new_zeros(*context.shape[:2], count, *context.shape[3:])
    return torch.cat((context[:, :, :at], empty, context[:, :, at:]), 2)
