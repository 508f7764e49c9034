"""Conditioning fitted to a model: inputs checked, named latents concatenated in the order of its training."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..models.config import DiTConfig, Geometry
from ..types import Conditioning, Slot, VideoSize
from ..variants import FIRST_FRAME, IMAGE, MASK, Variant, check


def fit(
    cond: Conditioning,
    variant: Variant,
    config: DiTConfig,
    label: str,
    size: VideoSize | None = None,
    has_motion_controller: bool = False,
) -> Conditioning:
    """`cond` as the model `label` takes it for a video of `size`.

    `concat` is assembled, surplus image tokens are dropped, and tensors of one video are repeated for the batch.

    Raises:
        ValueError: an input is missing, is not one that the model takes, or was made for another size.
    """
    if size and cond.size and size != cond.size:
        raise ValueError(
            f"{', '.join(cond.inputs or ())} was made for {cond.size}, but the video is {size}; use one size."
        )
    check(variant, cond.inputs or (), label, has_motion_controller)
    _check_channels(cond, config.geometry, label)
    tokens = cond.image_tokens
    if tokens is not None and config.has_image_input:
        if tokens.shape[1] < config.num_image_tokens:
            raise ValueError(f"{label} reads the image tokens of a start and an end image; give both images.")
        tokens = tokens[:, : config.num_image_tokens]
    fitted = dataclasses.replace(cond, image_tokens=tokens, slots=None, size=None)
    if cond.slots:
        concat = assemble_concat(cond.slots, variant.slots, config.geometry)
        fitted = dataclasses.replace(fitted, concat=concat, layout=variant.slots or None)
    return fitted.expanded(len(cond.encoded_text))


def _check_channels(cond: Conditioning, geometry: Geometry, label: str) -> None:
    """Raise ValueError when an input was encoded by the VAE of another model family."""
    latents = {name: tensor for name, tensor in (cond.slots or {}).items() if name != MASK.name}
    encoded = [*latents.items(), ("reference_image", cond.reference)]
    wanted = [(name, tensor, geometry.channels) for name, tensor in encoded if tensor is not None]
    wanted += [("vace_video", vace.context, geometry.vace_channels) for vace in cond.vace or ()]
    for name, tensor, channels in wanted:
        if tensor.shape[1] != channels:
            raise ValueError(
                f"{name} was encoded to {tensor.shape[1]} channels, but {label} works on those of {geometry.name}, "
                f"where it has {channels}: encode it with the VAE that belongs to the model."
            )


def assemble_concat(slots: Mapping[str, Tensor], layout: Sequence[Slot], geometry: Geometry) -> Tensor | None:
    """Named latents concatenated on channels in the order of `layout`, (B, sum of channels, F, h, w).

    Missing ones are zeros, as in the training of the models.
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
        parts.append(like.new_zeros(len(like), slot.channels(geometry), *like.shape[2:]) if part is None else part)
    return torch.cat(parts, 1)


def first_frame(latents: Tensor, frames: int | None = None) -> Tensor:
    """Latents (B, z, F, h, w) that hold the first frame of `latents` and zeros after it.

    The VAE is causal: the first latent frame of a clip is the latent of its first picture alone. A video of one latent
    frame gets zeros only, as VideoX-Fun prepares it.
    """
    frames = frames or latents.shape[2]
    out = latents.new_zeros(*latents.shape[:2], frames, *latents.shape[3:])
    if frames > 1:
        out[:, :, 0] = latents[:, :, 0]
    return out
