"""What a Wan DiT is, decided by its structure alone: which conditioning it takes, how its extra channels are filled,
and conditioning fitted to it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .models.config import WAN_21, DiTConfig, Geometry
from .types import Conditioning, Slot, VideoSize

MASK, IMAGE = Slot("mask", "mask"), Slot("image", "frames")
CONTROL, FIRST_FRAME = Slot("control"), Slot("first_frame", "first")

SPEED = "motion_bucket_id"
READ_BY_CLIP = ("input_image", "end_image", "reference_image")
"""Inputs that models with an image encoder read through it too."""


@dataclass(frozen=True)
class Variant:
    """One structure of the family.

    Attributes:
        name: identifies the row; it is never compared with in models, sampling or memory.
        label: what users call it.
        matches: whether a configuration is of this structure; the first row that matches counts. None matches by the
            channels beside the noise and by `reads_images` alone.
        slots: the channels beside the noise, in order.
        accepts: inputs that it can use besides text.
        requires: inputs without which its result is meaningless.
        reads_images: whether it reads start, end and reference images through CLIP too, as Wan 2.1 models do.
    """

    name: str
    label: str
    matches: Callable[[DiTConfig], bool] | None
    slots: tuple[Slot, ...] = ()
    accepts: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    reads_images: bool = False

    @property
    def keyframes(self) -> Literal["any", "ends", "first", "none"]:
        """At which frames of a video it takes pictures."""
        accepts = set(self.accepts)
        if accepts & {"vace_video", "inpaint_video"}:
            return "any"
        if "end_image" in accepts:
            return "ends"
        return "first" if "input_image" in accepts else "none"

    def channels(self, geometry: Geometry) -> int:
        """How many channels there are beside the noise."""
        return sum(slot.channels(geometry) for slot in self.slots)

    def describes(self, config: DiTConfig) -> bool:
        """Whether a DiT of this configuration is of this structure."""
        if self.matches is not None:
            return self.matches(config)
        return (config.concat_channels, config.has_image_input) == (self.channels(config.geometry), self.reads_images)


def _of_5b(config: DiTConfig) -> bool:
    """Whether a DiT works on the latents of Wan 2.2, and so takes clean frames among noisy ones."""
    return config.geometry.frame_times


def _of_a14b(config: DiTConfig) -> bool:
    """Whether a DiT works on the latents of Wan 2.1 but reads no image tokens, as the pairs of Wan 2.2 do."""
    return config.geometry.matches(WAN_21) and not config.has_image_input


VARIANTS = (
    Variant(
        "vace",
        "VACE",
        lambda c: bool(c.vace_layers),
        accepts=("vace_video", "vace_video_mask", "vace_reference_image"),
    ),
    Variant(
        "fun_5b_camera",
        "Wan 2.2 Fun-5B Control-Camera",
        lambda c: c.camera_channels > 0 and _of_5b(c),
        (MASK, IMAGE),
        accepts=("input_image", "end_image", "inpaint_video", "camera"),
        requires=("camera",),
    ),
    Variant(
        "fun_5b_control",
        "Wan 2.2 Fun-5B Control",
        lambda c: c.has_reference and _of_5b(c),
        (CONTROL, MASK, IMAGE),
        accepts=("control_video", "input_image", "end_image", "inpaint_video", "reference_image"),
        requires=("control_video",),
    ),
    Variant(
        "fun_5b_inp",
        "Wan 2.2 Fun-5B InP",
        lambda c: c.concat_channels > 0 and _of_5b(c),
        (MASK, IMAGE),
        accepts=("input_image", "end_image", "inpaint_video"),
    ),
    Variant("ti2v_5b", "Wan 2.2 text and image to video", _of_5b, accepts=("input_image",)),
    Variant(
        "fun_a14b_camera",
        "Wan 2.2 Fun Control-Camera",
        lambda c: c.camera_channels > 0 and _of_a14b(c),
        (MASK, IMAGE),
        accepts=("input_image", "end_image", "inpaint_video", "camera"),
        requires=("camera",),
    ),
    Variant(
        "fun_camera",
        "Fun Control-Camera",
        lambda c: c.camera_channels > 0,
        (FIRST_FRAME,),
        accepts=("input_image", "camera"),
        requires=("input_image", "camera"),
        reads_images=True,
    ),
    Variant(
        "fun_a14b_control",
        "Wan 2.2 Fun Control",
        lambda c: c.has_reference and _of_a14b(c),
        (CONTROL, MASK, IMAGE),
        accepts=("control_video", "input_image", "end_image", "inpaint_video", "reference_image"),
        requires=("control_video",),
    ),
    Variant(
        "fun_v1_1_control",
        "Fun V1.1 Control",
        lambda c: c.has_reference,
        (CONTROL, FIRST_FRAME),
        accepts=("control_video", "input_image", "reference_image"),
        requires=("control_video",),
        reads_images=True,
    ),
    Variant(
        "fun_control",
        "Fun Control",
        None,
        (CONTROL, FIRST_FRAME),
        accepts=("control_video", "input_image"),
        requires=("control_video",),
        reads_images=True,
    ),
    Variant(
        "flf2v",
        "first-last-frame to video",
        lambda c: c.image_positions > 0,
        (MASK, IMAGE),
        accepts=("input_image", "end_image"),
        requires=("input_image", "end_image"),
        reads_images=True,
    ),
    Variant(
        "i2v",
        "image to video or Fun InP",
        None,
        (MASK, IMAGE),
        accepts=("input_image", "end_image", "inpaint_video"),
        reads_images=True,
    ),
    Variant(
        "i2v_a14b",
        "Wan 2.2 image to video or Fun InP",
        None,
        (MASK, IMAGE),
        accepts=("input_image", "end_image", "inpaint_video"),
    ),
    Variant("t2v", "text to video", None, accepts=(SPEED,)),
)


def match_variant(config: DiTConfig) -> Variant:
    """The row that describes a DiT of this configuration.

    Raises:
        ValueError: no row does.
    """
    for variant in VARIANTS:
        if variant.describes(config):
            return variant
    known = sorted({config.out_channels + variant.channels(config.geometry) for variant in VARIANTS})
    raise ValueError(
        f"No {config.geometry.name} model has {config.in_channels} input channels "
        f"({', '.join(map(str, known[:-1]))} and {known[-1]} are known)."
    )


def check(variant: Variant, inputs: Sequence[str], label: str, has_motion_controller: bool = False) -> None:
    """Raise ValueError when a model of this structure, called `label`, cannot use `inputs` or lacks one that it
    needs.
    """
    strange = [name for name in inputs if name not in variant.accepts]
    if strange:
        takers = sorted({v.label for v in VARIANTS if set(strange) <= set(v.accepts)})
        hint = f", or load a model that takes it ({' or '.join(takers)})" if takers else ""
        raise ValueError(f"{label} takes {_listed(variant.accepts)}, but got {_listed(strange)}. Remove it{hint}.")
    if not set(variant.requires) <= set(inputs):
        raise ValueError(f"{label} ({variant.label}) needs {_listed(variant.requires)}; got {_listed(inputs)}.")
    if SPEED in inputs and not has_motion_controller:
        raise ValueError(f"{SPEED} needs the speed-control adapter beside {label}; load it with the model.")


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:]))) or "nothing besides text"


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
    if cond.without_tokens and variant.reads_images:
        raise ValueError(
            f"{label} reads {' and '.join(cond.without_tokens)} through the CLIP image encoder too: encode it with "
            "one (open-clip XLM-RoBERTa ViT-H/14)."
        )
    if tokens is not None and config.has_image_input:
        if tokens.shape[1] < config.num_image_tokens:
            raise ValueError(f"{label} reads the image tokens of a start and an end image; give both images.")
        tokens = tokens[:, : config.num_image_tokens]
    fitted = dataclasses.replace(cond, image_tokens=tokens, slots=None, size=None, without_tokens=None)
    if cond.slots:
        if "input_image" in (cond.inputs or ()) and IMAGE in variant.slots and IMAGE.name not in cond.slots:
            raise ValueError(
                f"{label} reads input_image as the first frame of a masked video, but it was encoded for control "
                "models of Wan 2.1: encode it with Image Encode (image_conditioning)."
            )
        concat = assemble_concat(cond.slots, variant.slots, config.geometry)
        fitted = dataclasses.replace(fitted, concat=concat, layout=variant.slots or None)
    return fitted.expanded(len(cond.encoded_text))


def _check_channels(cond: Conditioning, geometry: Geometry, label: str) -> None:
    """Raise ValueError when an input was encoded by the VAE of another model family."""
    latents = {name: tensor for name, tensor in (cond.slots or {}).items() if name != MASK.name}
    encoded = [*latents.items(), ("reference_image", cond.reference), ("input_image", cond.clean)]
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
