"""Conditioning fitted to a model: checked against what it takes, and its named latents joined as it was trained."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..models.config import DiTConfig
from ..models.dit import CLIP_TOKENS
from ..types import Conditioning, Slot, VideoSize
from ..variants import FIRST_FRAME, IMAGE, Variant, check


def fit(
    cond: Conditioning,
    variant: Variant,
    config: DiTConfig,
    label: str,
    size: VideoSize | None = None,
    has_motion_controller: bool = False,
) -> Conditioning:
    """`cond` as the model `label` takes it for a video of `size`.

    `concat` is assembled, image tokens are counted, and what describes one video describes each of the batch.

    Raises:
        ValueError: an input is missing, is not one that the model takes, or was made for another size.
    """
    if size and cond.size and size != cond.size:
        raise ValueError(
            f"{', '.join(cond.inputs or ())} was made for {cond.size}, but the video is {size}: make them equal."
        )
    check(variant, cond.inputs or (), label, has_motion_controller)
    clip = cond.clip
    if clip is not None and config.has_image_input:
        wanted = config.image_positions or CLIP_TOKENS
        if clip.shape[1] < wanted:
            raise ValueError(f"{label} reads the image tokens of a start and an end image; give both images.")
        clip = clip[:, :wanted]
    fitted = dataclasses.replace(cond, clip=clip, slots=None, size=None)
    if cond.slots:
        concat = assemble_concat(cond.slots, variant.slots)
        fitted = dataclasses.replace(fitted, concat=concat, layout=variant.slots or None)
    return fitted.expanded(len(cond.encoded_text))


def assemble_concat(slots: Mapping[str, Tensor], layout: Sequence[Slot]) -> Tensor | None:
    """Named latents joined on channels in the order of `layout`, (B, sum of channels, F, h, w).

    What the user did not give is zeros, as the models were trained to see it.
    """
    if not layout:
        return None
    slots = dict(slots)
    if FIRST_FRAME.name not in slots and IMAGE.name in slots:
        slots[FIRST_FRAME.name] = first_frame(slots[IMAGE.name])
    like = next(iter(slots.values()))
    parts = []
    for slot in layout:
        part = slots.get(slot.name)
        parts.append(like.new_zeros(len(like), slot.channels, *like.shape[2:]) if part is None else part)
    return torch.cat(parts, 1)


def first_frame(latents: Tensor, frames: int | None = None) -> Tensor:
    """Latents (B, 16, F, h, w) that hold the first frame of `latents` and zeros after it.

    The VAE is causal: the first latent frame of a clip is the latent of its first picture alone. A video of one latent
    frame gets zeros only, as VideoX-Fun prepares it.
    """
    frames = frames or latents.shape[2]
    out = latents.new_zeros(*latents.shape[:2], frames, *latents.shape[3:])
    if frames > 1:
        out[:, :, 0] = latents[:, :, 0]
    return out
