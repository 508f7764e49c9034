"""What a model file holds, recognised by the names and shapes of its tensors."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import nn

from ..files import errors_from
from ..lora.naming import is_lora
from ..models.config import DiTConfig
from .names import ModelKind, Source, convert, find_layout, strip_prefix
from .paths import describe_files, resolve_model
from .stored_weights import stored_weights
from .structure import CONFIG_READERS, Config, Shapes, vace_layers
from .tensor_files import CheckpointError, Header, TensorInfo, read_header

AnyConfig = TypeVar("AnyConfig", bound=Config)

KINDS: Mapping[ModelKind, tuple[str, str]] = {
    "dit": ("a Wan DiT", "model loader"),
    "vace": ("a VACE branch", "VACE input of the model loader"),
    "motion_controller": ("a Wan motion controller", "speed control loader"),
    "text_encoder": ("a UMT5 text encoder", "text encoder loader"),
    "vae": ("a Wan VAE", "VAE loader"),
    "image_encoder": ("a CLIP image encoder", "CLIP vision loader"),
    "preview_decoder": ("a tiny autoencoder for previews", "models folder vae_approx"),
    "lora": ("a LoRA", "LoRA loader"),
}
"""The name of each kind in messages, and the loader for it."""

SECTIONS = (
    r"model\.diffusion_model\.",
    r"text_encoders\.\w+\.|cond_stage_model\.|conditioner\.",
    r"(vae|first_stage_model)\.",
    r"(clip_vision|image_encoder)\.",
)
"""Prefixes of the models in an all-in-one file, as ComfyUI's CheckpointSave writes it, the video model first; several
text encoders are several models."""

GUESSES = {
    r".*(patchify_proj|adaln_single\.\w+|caption_projection)\..+": "an LTX-Video model",
    r".*single_stream_blocks\.0\..+|.*double_stream_blocks\.0\..+": "a HiDream model",
    r".*txt_in\.(individual_token_refiner|t_embedder)\..+": "a HunyuanVideo model",
    r".*double_blocks\.0\..+": "a FLUX or HunyuanVideo model",
    r".*joint_blocks\.0\..+": "a Stable Diffusion 3 model",
    r".*input_blocks\.0\..+": "a Stable Diffusion UNet",
    r".*down_blocks\.0\.(attentions|resnets|motion_modules)\..+": "a Stable Diffusion UNet in diffusers' layout",
    r".*transformer_blocks\.0\.(img_mod|txt_mod)\..+": "a Qwen-Image model",
    r".*patch_embed\.(proj|text_proj)\..+": "a CogVideoX or PixArt model",
    r".*(cap_embedder|noise_refiner)\..+": "a Lumina or Z-Image model",
    r".*t_block\.1\..+": "a PixArt or Mochi model",
    r"(visual\.)?transformer\.resblocks\..+": "an OpenCLIP model in its own layout; "
    "Wan uses the published models_clip_open-clip file or clip_vision_h.safetensors",
    r"text_model\.encoder\..+|.*embeddings\.token_embedding\..+": "a CLIP text encoder; Wan reads text with UMT5-XXL",
    r"(encoder|decoder)\.(up|down|mid)\..+|.*mid_block\.resnets\.0\.norm1\.weight|"
    r"(encoder|decoder)\.(up|down)_blocks\..+": "the VAE of an image model, or of another video model",
    r"(encoder|decoder)\.\d+\..+|taesd.+": "a tiny autoencoder for previews",
    r"transformer_blocks\.0\..+": "a diffusers transformer that is not Wan",
    r"model\.layers\.0\..+|layers\.0\..+": "a language model",
    r".*\.(oft_blocks|oft_diag|oft_R|boft_\w+|ia3_l|on_input|a1|b1)(\.weight)?": "an OFT, BOFT, IA3 or GLoRA adapter, "
    "which is not read; use a LoRA, LoHa, LoKr or DoRA",
    r".*control(net)?_(blocks|layers|net)\..+|controlnet_.+": "a ControlNet, which Wan 2.1 has none of here; "
    "use a VACE or Fun Control model",
    r"(state|optimizer|exp_avg)\..+": "the state of an optimizer",
}
"""Patterns of names that other models have, with what they are and what to do."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """A model file that was recognised.

    Attributes:
        kind: what it is; `layout` is the way its tensors are named.
        config: its sizes; None for a LoRA. That of a VACE branch in a file of its own holds the widths and VACE fields
            of the model that it was made for.
        sources: where each original tensor is in the files.
        dtype: the dtype of most stored weights.
        optional: original names that a file of this layout may lack.
    """

    kind: ModelKind
    layout: str
    config: Config | None
    sources: Mapping[str, Source]
    header: Header
    dtype: torch.dtype
    optional: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return describe_files(self.header.files)

    def config_of(self, kind: type[AnyConfig]) -> AnyConfig:
        """The sizes of the model, which must be of the class `kind`.

        Raises:
            CheckpointError: it is a model of another kind.
        """
        if not isinstance(self.config, kind):
            is_a, its_loader = KINDS[self.kind]
            raise CheckpointError(f"{self.name} is {is_a}, which is not what is loaded here; use the {its_loader}.")
        return self.config

    @property
    def quantised(self) -> str | None:
        """How the quantised weights are stored, in words, most of them first; None when none is quantised."""
        parts = (part for source in self.sources.values() for part in source.parts)
        words = Counter(part.words for part in parts if part.format.quantised)
        return " and ".join(form for form, _ in words.most_common()) or None


def detect_files(path: str | Path | Sequence[str | Path], kinds: Sequence[ModelKind] = ()) -> Component:
    """The component in the files that `path` names (`paths.resolve_model`); of an all-in-one file that of `kinds`.

    Raises:
        CheckpointError: the files are not there, damaged, or no model this library knows.
    """
    return detect(read_header(resolve_model(path)), kinds)


def detect(header: Header, kinds: Sequence[ModelKind] = ()) -> Component:
    """The model that the tensors of `header` are; of several the first that is of `kinds`, or the first of all.

    Raises:
        CheckpointError: an unknown or unsupported model, one that lacks a tensor its sizes are read from, or several of
            which none is of `kinds`.
    """
    found, errors = _detect_sections(header)
    wanted = [component for component in found if component.kind in kinds or not kinds]
    if wanted:
        return wanted[0]
    if errors:
        raise errors[0]
    if len(found) == 1:
        return found[0]
    held = " and ".join(KINDS[component.kind][0] for component in found)
    needed = " nor ".join(KINDS[kind][0].partition(" ")[2] for kind in kinds)
    raise CheckpointError(f"{describe_files(header.files)} holds {held}, but no {needed}.")


def detect_all(header: Header) -> tuple[Component, ...]:
    """The models that the tensors of `header` are: one, or the known ones of an all-in-one file.

    Raises:
        CheckpointError: as of `detect`, when none is known.
    """
    found, errors = _detect_sections(header)
    if not found:
        raise errors[0]
    return tuple(found)


def _detect_sections(header: Header) -> tuple[list[Component], list[CheckpointError]]:
    """The known models of a file, and the error of each section of an all-in-one file that is not known."""
    sections = _sections(header)
    if len(sections) < 2 or is_lora(header):
        return [_detect_one(header)], []
    found, errors = [], []
    for section in sections:
        try:
            found.append(_detect_one(section))
        except CheckpointError as error:
            errors.append(error)
    return found, errors


def _sections(header: Header) -> list[Header]:
    """The models of an all-in-one file as headers of their own; names outside of all sections are left out."""
    grouped: dict[str, dict[str, TensorInfo]] = {}
    for name, info in header.items():
        match = next(filter(None, (re.match(pattern, name) for pattern in SECTIONS)), None)
        if match:
            grouped.setdefault(match[0], {})[name] = info
    ordered = sorted(grouped, key=lambda prefix: [not re.match(pattern, prefix) for pattern in SECTIONS])
    return [replace(header, tensors=MappingProxyType(grouped[prefix])) for prefix in ordered]


def _detect_one(header: Header) -> Component:
    if not header:
        raise CheckpointError(f"{describe_files(header.files)} holds no tensors; download it again.")
    names = strip_prefix(header)
    counts: Counter[torch.dtype] = Counter()
    for info in header.values():
        counts[info.dtype] += prod(info.shape)
    dtype = counts.most_common(1)[0][0]
    if is_lora(header):
        return Component(
            kind="lora", layout="lora", config=None, sources=MappingProxyType({}), header=header, dtype=dtype
        )
    layout = find_layout(names)
    if layout is None:
        raise CheckpointError(_unknown(header, names))
    file = describe_files(header.files)
    with errors_from(file, "holds tensors that do not fit together", error=CheckpointError):
        sources = convert(layout, stored_weights(header, names))
    config = CONFIG_READERS[layout.kind](Shapes(sources, f"{file} ({KINDS[layout.kind][0]})"))
    return Component(
        kind=layout.kind,
        layout=layout.name,
        config=config,
        sources=sources,
        header=header,
        dtype=dtype,
        optional=frozenset(layout.optional),
    )


def require_kind(component: Component, kinds: ModelKind | Sequence[ModelKind]) -> Component:
    """`component`, which must be of one of `kinds`; the message names the loader of the first of them.

    Raises:
        CheckpointError: it is of another kind.
    """
    wanted = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if component.kind not in wanted:
        is_a, its_loader = KINDS[component.kind]
        needs = " or ".join(KINDS[kind][0] for kind in wanted)
        raise CheckpointError(
            f"{component.name} is {is_a}, but the {KINDS[wanted[0]][1]} needs {needs}; use the {its_loader}."
        )
    return component


def check_against(component: Component, module: nn.Module) -> None:
    """Compare the names and shapes of `component` with those of `module`, which may be on the meta device.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape; counts and first names are given.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    have = {name: source.shape for name, source in component.sources.items()}
    missing = [name for name in wanted if name not in have and name not in component.optional]
    unexpected = [name for name in have if name not in wanted]
    misshapen = [
        f"{name} {list(have[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in have and have[name] != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(problems.values()):
        parts = "; ".join(f"{len(names)} {what}: {listed(names)}" for what, names in problems.items() if names)
        verdict = (
            "The file is incomplete; download it again, or use the published one."
            if missing and not unexpected
            else "It is a variant that is not supported, or stored in a way that is not read; use the published file."
        )
        raise CheckpointError(
            f"{component.name} was recognised as {KINDS[component.kind][0]}, but its tensors do not fit: {parts}. "
            f"{verdict}"
        )


def join_vace(base: Component, branch: Component) -> Component:
    """The VACE model made of a text-to-video DiT and a VACE branch from another file.

    Raises:
        CheckpointError: `base` is no plain text-to-video DiT, or the branch was made for another width.
    """
    require_kind(base, "dit")
    require_kind(branch, "vace")
    whole, part = base.config_of(DiTConfig), branch.config_of(DiTConfig)
    plain = replace(whole, vace_layers=(), vace_channels=0)
    if plain != whole or plain.concat_channels or plain.has_image_input:
        raise CheckpointError(
            f"{base.name} is not a plain text-to-video model; {branch.name} can only be added to one."
        )
    if (whole.dim, whole.ffn_dim) != (part.dim, part.ffn_dim):
        raise CheckpointError(
            f"{branch.name} was made for a model of width {part.dim}, {base.name} has {whole.dim}; "
            "1.3B and 14B files do not mix."
        )
    layers = vace_layers(whole.num_layers, len(part.vace_layers))
    header = Header(
        MappingProxyType({**base.header, **branch.header}),
        (*base.header.files, *branch.header.files),
        MappingProxyType({**base.header.metadata, **branch.header.metadata}),
    )
    return replace(
        base,
        config=replace(whole, vace_layers=layers, vace_channels=part.vace_channels),
        sources=MappingProxyType({**base.sources, **branch.sources}),
        header=header,
    )


def fingerprint(header: Mapping[str, TensorInfo]) -> str:
    """DiffSynth-Studio's MD5 over names and shapes, for messages and cross-checks; independent of dtype and order."""
    shaped = [f"{name}:{'_'.join(map(str, info.shape))}" for name, info in header.items()]
    return hashlib.md5(",".join(sorted([*shaped, *header])).encode(), usedforsecurity=False).hexdigest()


def _unknown(header: Header, names: Mapping[str, str]) -> str:
    guess = next(
        (text for pattern, text in GUESSES.items() if any(re.fullmatch(pattern, name) for name in names)), None
    )
    likeness = f"It looks like {guess}." if guess else "It is no known other model either."
    return (
        f"{describe_files(header.files)} is no Wan model: {len(header)} tensors ({listed(list(header))}), "
        f"fingerprint {fingerprint(header)}. {likeness}"
    )


def listed(names: Sequence[str]) -> str:
    """The first five of `names`, for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
