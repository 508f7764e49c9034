"""What a model file is, read from tensor names and shapes alone."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn

from ..memory.quant import FP8_DTYPES
from ..reading import blamed_on
from .dialects import Kind
from .files import describe_files, resolve_model
from .header import CheckpointError, Header, read_header
from .keymap import LORA, Source, convert, find_dialect, strip_prefix
from .structure import READERS, Config, Shapes, vace_layers

KINDS: Mapping[Kind, tuple[str, str]] = {
    "dit": ("a Wan DiT", "model loader"),
    "vace": ("a VACE branch", "VACE input of the model loader"),
    "motion_controller": ("a Wan motion controller", "speed control loader"),
    "text_encoder": ("a UMT5 text encoder", "text encoder loader"),
    "vae": ("a Wan VAE", "VAE loader"),
    "image_encoder": ("a CLIP image encoder", "CLIP vision loader"),
    "preview_decoder": ("a tiny autoencoder for previews", "models folder vae_approx"),
    "lora": ("a LoRA", "LoRA loader"),
}
"""What each kind is called, and where it is loaded."""

GUESSES = {
    r".*double_blocks\.0\..+": "a FLUX or HunyuanVideo model",
    r".*joint_blocks\.0\..+": "a Stable Diffusion 3 model",
    r".*input_blocks\.0\..+": "a Stable Diffusion UNet",
    r"visual\.transformer\.resblocks\..+|transformer\.resblocks\..+": "an OpenCLIP model in its own layout; "
    "Wan uses the published models_clip_open-clip file or clip_vision_h.safetensors",
    r"text_model\.encoder\..+|.*embeddings\.token_embedding\..+": "a CLIP text encoder; Wan reads text with UMT5-XXL",
    r"(encoder|decoder)\.(up|down|mid)\..+|.*mid_block\.resnets\.0\.norm1\.weight": "the VAE of an image model",
    r"(encoder|decoder)\.\d+\..+|taesd.+": "a tiny autoencoder for previews",
    r"transformer_blocks\.0\..+": "a diffusers transformer that is not Wan",
    r"model\.layers\.0\..+|layers\.0\..+": "a language model",
    r"enc\.blk\.0\..+": "a converted GGUF text encoder",
}


@dataclass(frozen=True, kw_only=True)
class Component:
    """A model file that was understood.

    `config` is None for a LoRA; for a VACE branch alone it holds the widths and VACE fields of the model it was made
    for. `sources` gives each original tensor name its place in the files, `optional` the names that a file of this
    layout may lack. `dtype` is the one that most stored weights have.
    """

    kind: Kind
    layout: str
    config: Config | None
    sources: Mapping[str, Source]
    header: Header
    dtype: torch.dtype
    fp8: Literal[None, "plain", "scaled"] = None
    optional: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return describe_files(self.header.files)


def detect_files(path: str | Path | Sequence[str | Path]) -> Component:
    """The component in the files that `path` names (see `files.resolve_model`).

    Raises:
        CheckpointError: the files are not there, damaged, or no model this library knows.
    """
    return detect(read_header(resolve_model(path)))


def detect(header: Header) -> Component:
    """What the tensors of `header` are.

    Raises:
        CheckpointError: an unknown or unsupported model, or one that lacks a tensor its sizes are read from.
    """
    if not header:
        raise CheckpointError(f"{describe_files(header.files)} holds no tensors; download it again.")
    names = strip_prefix(header)
    dtype = _predominant_dtype(header)
    if any(LORA.fullmatch(name) for name in names):
        return Component(
            kind="lora", layout="lora", config=None, sources=MappingProxyType({}), header=header, dtype=dtype
        )
    dialect = find_dialect(names)
    if dialect is None:
        raise CheckpointError(_unknown(header, names))
    file = describe_files(header.files)
    with blamed_on(file, "holds tensors that do not fit together", error=CheckpointError):
        sources = convert(dialect, header, names)
    config = READERS[dialect.kind](Shapes(sources, f"{file} ({KINDS[dialect.kind][0]})"))
    scaled = any(source.scales for source in sources.values())
    plain = any(source.dtype in FP8_DTYPES for source in sources.values())
    return Component(
        kind=dialect.kind,
        layout=dialect.layout,
        config=config,
        sources=sources,
        header=header,
        dtype=dtype,
        fp8="scaled" if scaled else "plain" if plain else None,
        optional=frozenset(dialect.optional),
    )


def require_kind(component: Component, kinds: Kind | Sequence[Kind]) -> Component:
    """`component`, when it is of one of `kinds`; the first of them names the loader in the message.

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
    """Compare the names and shapes of `component` with those of `module`, which may stand on the meta device.

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
        parts = "; ".join(f"{len(names)} {what}: {_first(names)}" for what, names in problems.items() if names)
        raise CheckpointError(
            f"{component.name} was recognised as {KINDS[component.kind][0]}, but its tensors do not fit: {parts}. "
            "The file is incomplete or a variant that is not supported; download it again or use the published one."
        )


def join_vace(base: Component, branch: Component) -> Component:
    """The VACE model made of a text-to-video DiT and a VACE branch from another file.

    Raises:
        CheckpointError: `base` is no plain text-to-video DiT, or the branch was made for another width.
    """
    require_kind(base, "dit")
    require_kind(branch, "vace")
    plain = replace(base.config, vace_layers=(), vace_channels=0)
    if plain != base.config or plain.concat_channels or plain.has_image_input:
        raise CheckpointError(
            f"{base.name} is not a plain text-to-video model; {branch.name} can only be added to one."
        )
    if (base.config.dim, base.config.ffn_dim) != (branch.config.dim, branch.config.ffn_dim):
        raise CheckpointError(
            f"{branch.name} was made for a model of width {branch.config.dim}, {base.name} has {base.config.dim}; "
            "1.3B and 14B files do not mix."
        )
    layers = vace_layers(base.config.num_layers, len(branch.config.vace_layers))
    header = Header(
        MappingProxyType({**base.header, **branch.header}),
        (*base.header.files, *branch.header.files),
        MappingProxyType({**base.header.metadata, **branch.header.metadata}),
    )
    return replace(
        base,
        config=replace(base.config, vace_layers=layers, vace_channels=branch.config.vace_channels),
        sources=MappingProxyType({**base.sources, **branch.sources}),
        header=header,
        fp8="scaled" if "scaled" in (base.fp8, branch.fp8) else base.fp8 or branch.fp8,
    )


def fingerprint(header: Mapping[str, object]) -> str:
    """DiffSynth-Studio's MD5 over names and shapes, for messages and cross-checks; independent of dtype and order."""
    shaped = [f"{name}:{'_'.join(map(str, info.shape))}" for name, info in header.items()]
    return hashlib.md5(",".join(sorted([*shaped, *header])).encode(), usedforsecurity=False).hexdigest()


def _predominant_dtype(header: Header) -> torch.dtype:
    counts: Counter[torch.dtype] = Counter()
    for info in header.values():
        counts[info.dtype] += prod(info.shape)
    return counts.most_common(1)[0][0]


def _unknown(header: Header, names: Mapping[str, str]) -> str:
    guess = next(
        (text for pattern, text in GUESSES.items() if any(re.fullmatch(pattern, name) for name in names)), None
    )
    likeness = f"It looks like {guess}." if guess else "It is no known other model either."
    return (
        f"{describe_files(header.files)} is no Wan 2.1 model: {len(header)} tensors ({_first(list(header))}), "
        f"fingerprint {fingerprint(header)}. {likeness}"
    )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
