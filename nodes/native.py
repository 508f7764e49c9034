"""ComfyUI's own CONDITIONING as ours, and ours as ComfyUI's.

CONDITIONING is a list of (text embeddings, values by name). The names are those that `comfy_extras/nodes_wan.py` writes
and `comfy/model_base.py` (`WAN21` and its children) reads. Latents in it are raw; masks are 1 where the model draws.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_core.models.config import CLIP_TOKENS, DEFAULT_GEOMETRY, GEOMETRIES, TEXT_TOKENS, DiTConfig, Geometry
from wan_core.models.vae import denormalise, normalise
from wan_core.planning.encoders import checked_size
from wan_core.runtime import log
from wan_core.types import Conditioning, Curve, LatentSize, Slot, VaceInput, VideoSize
from wan_core.variants import CONTROL, FIRST_FRAME, IMAGE, MASK, assemble_concat

from . import host, sockets
from .vae import latent_of

Native = Sequence[tuple[Tensor, Mapping[str, Any]]]

PARTIAL = {
    "area": "an area",
    "mask": "a mask",
    "start_percent": "a range of steps",
    "end_percent": "a range of steps",
    "control": "a ControlNet",
    "hooks": "hooks",
}
"""Values that limit conditioning to a part of a picture or run, with their names for users."""

READ = frozenset(
    {
        "concat_latent_image", "concat_mask", "clip_vision_output", "reference_latents", "camera_conditions",
        "vace_frames", "vace_mask", "vace_strength",
    }
)  # fmt: skip
UNUSED = frozenset(
    {"pooled_output", "concat_mask_index", "guidance", "attention_mask", "strength", "set_area_to_bounds"}
)
"""Values that no Wan model reads."""

ZERO = 1e-3
"""Normalised latents up to this are zeros that were converted to raw latents and back in any dtype."""


def from_native(
    positive: Native, negative: Native, clip_vision_output: Any = None, geometry: Geometry | None = None
) -> Conditioning:
    """Conditioning with the text of both branches and everything else that `positive` holds.

    Args:
        clip_vision_output: image tokens, in place of those that `positive` holds.
        geometry: of the model that the conditioning was made for; None is that whose latents are in it, if there are
            any, else Wan 2.1's.

    Raises:
        ValueError: there is not exactly one entry, it is limited to a part of the run or picture, the branches differ
            in more than text, or a value has another shape than ComfyUI's Wan nodes give it.
    """
    text, values = _entry(positive, "positive")
    negative_text, other = _entry(negative, "negative")
    _require_same(values, other)
    text, negative_text = _pad_texts(text, negative_text)
    cond = Conditioning(text=text, negative_text=negative_text)
    geometry = geometry or _geometry_of(values)
    tokens = clip_vision_output if clip_vision_output is not None else values.get("clip_vision_output")
    if tokens is not None:
        cond = cond.with_inputs(image_tokens=_tokens(tokens))
    readers: dict[str, Callable[[Conditioning, Mapping[str, Any], Geometry], Conditioning]] = {
        "concat_latent_image": _with_concat,
        "reference_latents": _with_reference,
        "camera_conditions": _with_camera,
        "vace_frames": _with_vace,
    }
    for name, read in readers.items():
        if values.get(name) is not None:
            cond = read(cond, values, geometry)
    return cond


def _entry(native: Native, which: str) -> tuple[Tensor, Mapping[str, Any]]:
    """The one entry of CONDITIONING, without unset and unused values."""
    if len(native) != 1:
        raise ValueError(
            f"The {which} conditioning has {len(native)} entries, but Wan models take one prompt: leave out "
            "Conditioning (Combine). Prompts that change over a video go into Window Prompts (WanCore)."
        )
    text, values = native[0]
    values = {name: value for name, value in values.items() if value is not None and name not in UNUSED}
    partial = sorted({PARTIAL[name] for name in values if name in PARTIAL})
    if partial:
        raise ValueError(
            f"The {which} conditioning has {' and '.join(partial)}, which a WanCore sampler does not support; remove "
            "the node that set it."
        )
    if unknown := sorted(values.keys() - READ):
        log.warning("Left out of the %s conditioning, as Wan models do not read it: %s.", which, ", ".join(unknown))
    return text.float(), {name: value for name, value in values.items() if name in READ}


def _require_same(positive: Mapping[str, Any], negative: Mapping[str, Any]) -> None:
    """Raise ValueError unless both branches have the same pictures: a WanCore sampler has one set for both."""
    differing = [name for name in sorted(READ) if not _same(positive.get(name), negative.get(name))]
    if differing:
        raise ValueError(
            f"The positive and the negative conditioning differ in {', '.join(differing)}. Pass both through the same "
            "node: only their text may differ."
        )


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first is second or (first.shape == second.shape and torch.equal(first, second))
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(_same, first, second))
    return first is second or first == second


def _pad_texts(*texts: Tensor) -> tuple[Tensor, ...]:
    """Embeddings padded with zeros to one length, at least that of the training, as the models expect them."""
    length = max(TEXT_TOKENS, *(text.shape[1] for text in texts))
    return tuple(F.pad(text, (0, 0, 0, length - text.shape[1])) for text in texts)


def _tokens(output: Any) -> Tensor:
    tokens = getattr(output, "penultimate_hidden_states", None)
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or tokens.shape[1] % CLIP_TOKENS:
        got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(output).__name__
        raise ValueError(
            f"Wan models read {CLIP_TOKENS} tokens of each picture, from clip_vision_h.safetensors (ViT-H/14); got "
            f"{got}."
        )
    return tokens.float()


def _geometry_of(values: Mapping[str, Any]) -> Geometry:
    """That of the latents among `values`, by their channels; ComfyUI joins one or two of them."""
    latents = [values.get("concat_latent_image"), *(values.get("reference_latents") or ())[-1:]]
    counts = {latent.shape[1] for latent in latents if isinstance(latent, Tensor) and latent.ndim == 5}
    found = (g for channels, g in GEOMETRIES.items() if counts & {channels, 2 * channels})
    return next(found, DEFAULT_GEOMETRY)


def _by_latents(convert: Callable[[Tensor, Geometry], Tensor], joined: Tensor, geometry: Geometry) -> Tensor:
    """`convert` on each of the latents that are joined on channels."""
    return torch.cat([convert(part, geometry) for part in joined.split(geometry.channels, 1)], 1)


def _with_concat(cond: Conditioning, values: Mapping[str, Any], geometry: Geometry) -> Conditioning:
    """The channels that are concatenated to the noise: pictures at their frames, or control video and start image."""
    raw = values["concat_latent_image"]
    channels = geometry.channels
    if raw.ndim != 5 or raw.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"concat_latent_image should be (B, {channels} or {2 * channels}, frames, height, width) for "
            f"{geometry.name}; got {tuple(raw.shape)}."
        )
    latents, size = _by_latents(normalise, raw, geometry), LatentSize.of(raw, geometry).video
    slots, names = {}, []
    if latents.shape[1] > channels:
        slots[CONTROL.name], latents = latents.split(channels, 1)
        names = ["control_video"]
        if values.get("concat_mask") is None:  # of Wan 2.1, which has the latent of one frame and no mask
            names += ["input_image"] * bool(latents.abs().max() > ZERO)
            return cond.with_inputs(*names, size=size, slots={**slots, FIRST_FRAME.name: latents})
    known = _known_frames(values.get("concat_mask"), latents, geometry.mask_channels)
    slots |= {MASK.name: known, IMAGE.name: latents, FIRST_FRAME.name: latents}
    if geometry.frame_times and bool((known[:, :, 0] > 0.5).all()):
        cond = cond.with_clean_frames(latents[:, :, :1], latents.shape[2])
    if not names or bool((known > 0.5).any()):
        names += _input_names(known)
    return cond.with_inputs(*names, size=size, slots=slots)


def _known_frames(mask: Tensor | None, latents: Tensor, channels: int) -> Tensor:
    """1 where a frame is known (B, channels, F, h, w), by a mask as `comfy.model_base.WAN21.concat_cond` reads it."""
    batch, _, frames, height, width = latents.shape
    if mask is None:
        return latents.new_zeros(batch, channels, frames, height, width)
    if mask.ndim != 5:
        raise ValueError(f"concat_mask should be (B, 1 or {channels}, frames, height, width); got {tuple(mask.shape)}.")
    if mask.shape[1] != channels:
        mask = mask.mean(1, keepdim=True).expand(-1, channels, -1, -1, -1)
    known = 1 - mask.to(latents)
    known = F.interpolate(known, (known.shape[2], height, width), mode="trilinear")[:, :, :frames]
    return F.pad(known, (0, 0, 0, 0, 0, frames - known.shape[2])).expand(batch, -1, -1, -1, -1)


def _input_names(known: Tensor) -> list[str]:
    """The names of the inputs whose frames a mask marks as known."""
    ends = {"input_image": known[:, :, 0], "end_image": known[:, -1, -1]}
    names = [name for name, part in ends.items() if bool((part > 0.5).all())]
    return names or ["inpaint_video" if bool((known > 0.5).any()) else "input_image"]


def _with_reference(cond: Conditioning, values: Mapping[str, Any], geometry: Geometry) -> Conditioning:
    """The last of the reference latents (B, z, 1, h, w): ComfyUI's Wan models read only that. Zeros: none."""
    latent = normalise(values["reference_latents"][-1], geometry)
    if latent.abs().max() < ZERO:
        return cond
    return cond.with_inputs("reference_image", reference=latent[:, :, 0])


def _with_camera(cond: Conditioning, values: Mapping[str, Any], geometry: Geometry) -> Conditioning:
    rays = values["camera_conditions"].float()
    frames, height, width = rays.shape[2:]
    return cond.with_inputs(
        "camera", size=VideoSize(width, height, geometry.video_frames(frames), geometry), camera=rays
    )


def _with_vace(cond: Conditioning, values: Mapping[str, Any], geometry: Geometry) -> Conditioning:
    frames = [_by_latents(normalise, raw, geometry) for raw in values["vace_frames"]]
    shapes = {tuple(latents.shape) for latents in frames}
    if len(shapes) > 1:
        raise ValueError(
            f"VACE inputs of different shapes cannot be mixed: {', '.join(map(str, sorted(shapes)))}. Give each a "
            "reference image or none of them, or use VACE Encode (WanCore)."
        )
    whole = [x.new_ones(len(x), geometry.vace_mask_channels, *x.shape[2:]) for x in frames]
    masks = values.get("vace_mask") or whole
    strengths = values.get("vace_strength") or [1.0] * len(frames)
    contexts = [torch.cat((latents, mask.to(latents)), 1) for latents, mask in zip(frames, masks, strict=True)]
    inputs = tuple(
        VaceInput(context=context, strength=Curve.of(float(strength)))
        for context, strength in zip(contexts, strengths, strict=True)
    )
    references = min(_references(context, geometry) for context in contexts)
    latent = LatentSize.of(contexts[0], geometry)
    size = replace(latent, frames=latent.frames - references).video
    names = ["vace_video"] + ["vace_reference_image"] * bool(references)
    return cond.with_inputs(*names, size=size, vace=inputs)


def _references(context: Tensor, geometry: Geometry) -> int:
    """How many latent frames of a VACE context (B, 2 z + mask, R + F, h, w) are references in front of the video."""
    # A reference has a zero mask and a zero second latent. In a video the second latent is that of the reactive part,
    # which is the VAE's encoding of grey where nothing is generated, and never zero.
    empty = context[:, geometry.channels :].abs().amax((0, 1, 3, 4)) < ZERO
    return int(empty.long().cumprod(0).sum())


def to_native(
    cond: Conditioning, size: VideoSize, clip_vision_output: Callable[[Tensor], Any]
) -> tuple[list[list[Any]], list[list[Any]], Tensor, int]:
    """`cond` as ComfyUI's Wan nodes return it: positive and negative CONDITIONING, empty latent, frames to trim.

    Where the model expects image tokens or a reference and there are none, they are zeros, as in our models.

    Args:
        clip_vision_output: makes ComfyUI's object of image tokens.

    Raises:
        ValueError: `cond` was made for another size, or has an input that ComfyUI's conditioning does not support.
    """
    if cond.size and cond.size != size:
        raise ValueError(
            f"{', '.join(cond.inputs or ())} was made for {cond.size}, but the video is {size}: make them equal."
        )
    if cond.motion_bucket is not None:
        raise ValueError("ComfyUI's conditioning does not support speed control; sample with Sampler (WanCore).")
    text, negative_text = cond.encoded_text, cond.negative().encoded_text
    batch, latent, geometry = len(text), size.latent, size.geometry
    values: dict[str, Any] = {}
    clip, reference = cond.image_tokens, cond.reference
    if cond.slots:
        layout = _layout(cond.slots, has_camera=cond.camera is not None)
        concat = assemble_concat(cond.slots, layout, geometry)
        assert concat is not None, "a layout has at least one slot"
        if MASK in layout:
            start = geometry.channels * layout.index(MASK)
            before, mask, after = concat.tensor_split([start, start + geometry.mask_channels], 1)
            values["concat_mask"], concat = 1 - mask.float(), torch.cat((before, after), 1)
            values["concat_mask_index"] = start
        values["concat_latent_image"] = _by_latents(denormalise, concat, geometry)
        if clip is None:
            clip = text.new_zeros(1, CLIP_TOKENS, DiTConfig.image_dim)
        if reference is None and CONTROL in layout:
            reference = concat.new_zeros(1, geometry.channels, latent.height, latent.width)
    if clip is not None:
        values["clip_vision_output"] = clip_vision_output(clip.float())
    if reference is not None:
        values["reference_latents"] = [denormalise(reference[:, :, None], geometry)]
    if cond.camera is not None:
        values["camera_conditions"] = cond.camera
    if cond.vace:
        values |= _vace_values(cond.vace, geometry)
    references = cond.prefix_frames(latent.frames)
    empty = torch.zeros(batch, geometry.channels, references + latent.frames, latent.height, latent.width)
    return [[text.float(), dict(values)]], [[negative_text.float(), dict(values)]], empty, references


def _layout(slots: Mapping[str, Tensor], *, has_camera: bool) -> tuple[Slot, ...]:
    """The channel layout that the pictures in `slots` were encoded for."""
    if CONTROL.name in slots:
        return (CONTROL, MASK, IMAGE) if IMAGE.name in slots else (CONTROL, FIRST_FRAME)
    return (MASK, IMAGE) if IMAGE.name in slots and not has_camera else (FIRST_FRAME,)


def _vace_values(inputs: Sequence[VaceInput], geometry: Geometry) -> dict[str, Any]:
    video = 2 * geometry.channels
    for vace in inputs:
        if len(set(vace.strength.values)) > 1 or (vace.strength.start, vace.strength.end) != (0, 1):
            raise ValueError(
                "ComfyUI's conditioning does not support a VACE strength that changes over the steps; sample with "
                "Sampler (WanCore), or leave start at 0, end at 1 and end_strength at -1."
            )
    return {
        "vace_frames": [_by_latents(denormalise, vace.context[:, :video], geometry) for vace in inputs],
        "vace_mask": [vace.context[:, video:].float() for vace in inputs],
        "vace_strength": [vace.strength.values[0] for vace in inputs],
    }


class FromConditioning:
    """CONDITIONING to ours."""

    CATEGORY = "WanCore/conditioning"
    FUNCTION = "convert"
    DESCRIPTION = (
        "Use ComfyUI's own conditioning with a WanCore sampler: prompts of CLIP Text Encode, and what the nodes Wan "
        "Image to Video, Wan First Last Frame, Wan Fun Control, Wan Vace and Wan Camera add to them."
    )
    RETURN_TYPES = (sockets.CONDITIONING,)
    RETURN_NAMES = ("conditioning",)
    OUTPUT_TOOLTIPS = ("Both prompts and their pictures, for the WanCore sampler.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "positive": sockets.socket("CONDITIONING", "From CLIP Text Encode, or a Wan node after it."),
                "negative": sockets.socket("CONDITIONING", "The negative prompt, through the same nodes."),
            },
            "optional": {
                "clip_vision_output": sockets.socket(
                    "CLIP_VISION_OUTPUT", "Replaces the CLIP vision output in the conditioning."
                ),
            },
        }

    def convert(self, positive: Native, negative: Native, clip_vision_output: Any = None) -> tuple[Conditioning]:
        return (from_native(positive, negative, clip_vision_output).to(host.current.offload_device()),)


class ToConditioning:
    """Ours to CONDITIONING."""

    CATEGORY = "WanCore/conditioning"
    FUNCTION = "convert"
    DESCRIPTION = "Use WanCore's conditioning with ComfyUI's own samplers: KSampler and the like."
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT", "INT")
    RETURN_NAMES = ("positive", "negative", "latent", "trim_latent")
    OUTPUT_TOOLTIPS = (
        "The prompt, with pictures, control, camera and VACE inputs.",
        "The negative prompt, with the same.",
        "An empty video of the right length, for the sampler.",
        "Latent frames of references, for Trim Video Latent after the sampler.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "conditioning": sockets.socket(sockets.CONDITIONING, "From the prompt, or a node that adds to it."),
                **sockets.size_inputs(),
            },
        }

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """The size of every node's tiny form."""
        return dict(host.TINY_SIZE)

    def convert(
        self, conditioning: Conditioning, width: int, height: int, num_frames: int
    ) -> tuple[list[list[Any]], list[list[Any]], dict[str, Tensor], int]:
        known = conditioning.size
        size = checked_size(width, height, num_frames, known.geometry if known else DEFAULT_GEOMETRY)
        positive, negative, empty, trim = to_native(conditioning, size, host.current.clip_vision_output)
        return positive, negative, latent_of(conditioning, empty), trim
