"""What a model file is, read from tensor names and shapes alone."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn

from ..models.config import (
    HEAD_DIM,
    DiTConfig,
    ImageEncoderConfig,
    MotionControllerConfig,
    TextEncoderConfig,
    VAEConfig,
)
from .dialects import Kind
from .files import describe_files, resolve_model
from .header import CheckpointError, Header, read_header
from .keymap import FP8_DTYPES, LORA, Source, convert, find_dialect, strip_prefix

Config = DiTConfig | MotionControllerConfig | TextEncoderConfig | VAEConfig | ImageEncoderConfig

CLIP_HEAD_DIM = 80
"""Attention head width of the one CLIP tower that Wan 2.1 was trained with, ViT-H/14."""

CAMERA_FOLD = 64
"""Pixels of an 8 x 8 cell, which the camera adapter sees as channels."""

BASE_LAYERS = {15: 30, 8: 40}
"""Blocks of the published base model for each number of VACE blocks."""

BASE_CHANNELS = {16: False, 36: True, 48: True, 32: True}
"""Input channels of the Wan 2.1 models, and whether those models read image tokens."""

KINDS: Mapping[Kind, tuple[str, str]] = {
    "dit": ("a Wan DiT", "model loader"),
    "vace": ("a VACE branch", "VACE input of the model loader"),
    "motion_controller": ("a Wan motion controller", "speed control loader"),
    "text_encoder": ("a UMT5 text encoder", "text encoder loader"),
    "vae": ("a Wan VAE", "VAE loader"),
    "image_encoder": ("a CLIP image encoder", "CLIP vision loader"),
    "lora": ("a LoRA", "LoRA loader"),
}
"""What each kind is called, and where it is loaded."""

OTHER_WAN = {
    r"casual_audio_encoder\..+": "Wan 2.2 S2V",
    r"face_adapter\..+|face_encoder\..+": "Wan 2.2 Animate",
    r"audio_proj\..+|audio_model\..+|.+\.audio_cross_attn\..+": "a Wan model that listens to audio (HuMo, MultiTalk)",
    r"cam_encoder\..+|blocks\.\d+\.cam_encoder\..+": "ReCamMaster",
}
"""Parts that only relatives of Wan 2.1 have."""

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
    names = strip_prefix(header)
    dtype = _predominant_dtype(header)
    if any(LORA.fullmatch(name) for name in names):
        return Component(
            kind="lora", layout="lora", config=None, sources=MappingProxyType({}), header=header, dtype=dtype
        )
    dialect = find_dialect(names)
    if dialect is None:
        raise CheckpointError(_unknown(header, names))
    sources = convert(dialect, header, names)
    file = describe_files(header.files)
    config = _READERS[dialect.kind](_Shapes(sources, f"{file} ({KINDS[dialect.kind][0]})"))
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


def vace_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """The blocks after which the hints of `count` VACE blocks are added: evenly spaced from the first.

    Raises:
        CheckpointError: there are more VACE blocks than blocks.
    """
    if count > num_layers:
        raise CheckpointError(f"A model of {num_layers} blocks cannot carry {count} VACE blocks.")
    return tuple(range(0, num_layers, num_layers // count)[:count]) if count else ()


def fingerprint(header: Mapping[str, object]) -> str:
    """DiffSynth-Studio's MD5 over names and shapes, for messages and cross-checks; independent of dtype and order."""
    shaped = [f"{name}:{'_'.join(map(str, info.shape))}" for name, info in header.items()]
    return hashlib.md5(",".join(sorted([*shaped, *header])).encode(), usedforsecurity=False).hexdigest()


class _Shapes:
    """Shapes by original name; a name that is not there is the user's incomplete file."""

    def __init__(self, sources: Mapping[str, Source], owner: str) -> None:
        self.sources, self.owner = sources, owner

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self.sources:
            raise self.error(f"lacks the tensor {name!r}; the file is incomplete, download it again")
        return self.sources[name].shape

    def any(self, pattern: str) -> bool:
        return any(re.match(pattern, name) for name in self.sources)

    def count(self, pattern: str) -> int:
        """How many blocks there are, by the highest index that `pattern` captures."""
        found = (re.match(pattern, name) for name in self.sources)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.owner} {text}.")


def _read_dit(shapes: _Shapes) -> DiTConfig:
    patch = shapes["patch_embedding.weight"][2:]
    layers, branch = shapes.count(r"blocks\.(\d+)\."), shapes.count(r"vace_blocks\.(\d+)\.")
    has_vace = branch > 0 or shapes.any(r"vace_")
    has_image = shapes.any(r"img_emb\.|blocks\.\d+\.cross_attn\.\w*_img\.")
    config = DiTConfig(
        dim=shapes["head.modulation"][-1],
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
        num_layers=layers,
        in_channels=shapes["patch_embedding.weight"][1],
        out_channels=shapes["head.head.weight"][0] // prod(patch),
        patch_size=patch,
        text_dim=shapes["text_embedding.0.weight"][1],
        freq_dim=shapes["time_embedding.0.weight"][1],
        has_image_input=has_image,
        image_dim=shapes["img_emb.proj.0.weight"][0] if shapes.any(r"img_emb\.") else DiTConfig.image_dim,
        image_positions=shapes["img_emb.emb_pos"][1] if shapes.any(r"img_emb\.emb_pos") else 0,
        has_reference=shapes.any(r"ref_conv\."),
        camera_channels=(
            shapes["control_adapter.conv.weight"][1] // CAMERA_FOLD if shapes.any(r"control_adapter\.") else 0
        ),
        vace_layers=vace_layers(layers, branch),
        vace_channels=shapes["vace_patch_embedding.weight"][1] if has_vace else 0,
    )
    _require_wan21(shapes, config)
    return config


def _require_wan21(shapes: _Shapes, config: DiTConfig) -> None:
    relative = next((name for pattern, name in OTHER_WAN.items() if shapes.any(pattern)), None)
    if (config.in_channels, config.out_channels) == (48, 48):
        relative = "Wan 2.2 TI2V-5B"
    elif config.in_channels == 36 and not config.has_image_input:
        relative = "Wan 2.2 I2V-A14B"
    if relative:
        raise shapes.error(f"is {relative}; only Wan 2.1 models are supported")
    if config.dim % HEAD_DIM:
        raise shapes.error(f"has width {config.dim}; a Wan 2.1 width is a multiple of {HEAD_DIM}")
    if config.in_channels == 32 and not config.camera_channels:
        raise shapes.error(
            "has 32 input channels, which only camera models have, but lacks 'control_adapter.conv.weight', "
            "'control_adapter.conv.bias' and the other control_adapter.* tensors; the file is incomplete"
        )
    if BASE_CHANNELS.get(config.in_channels) != config.has_image_input or config.out_channels != 16:
        tokens = "with" if config.has_image_input else "without"
        known = ", ".join(f"{n} {'with' if image else 'without'}" for n, image in BASE_CHANNELS.items())
        raise shapes.error(
            f"has {config.in_channels} input and {config.out_channels} output channels {tokens} image tokens "
            f"(img_emb.*); Wan 2.1 has 16 output channels and {known} image tokens"
        )


def _read_vace(shapes: _Shapes) -> DiTConfig:
    count = shapes.count(r"vace_blocks\.(\d+)\.")
    layers = BASE_LAYERS.get(count, 2 * count)
    return DiTConfig(
        dim=shapes["vace_patch_embedding.weight"][0],
        ffn_dim=shapes["vace_blocks.0.ffn.0.weight"][0],
        num_layers=layers,
        patch_size=shapes["vace_patch_embedding.weight"][2:],
        vace_layers=vace_layers(layers, count),
        vace_channels=shapes["vace_patch_embedding.weight"][1],
    )


def _read_motion_controller(shapes: _Shapes) -> MotionControllerConfig:
    dim, freq_dim = shapes["linear.0.weight"]
    return MotionControllerConfig(dim=dim, freq_dim=freq_dim)


def _read_text_encoder(shapes: _Shapes) -> TextEncoderConfig:
    layers = shapes.count(r"blocks\.(\d+)\.")
    tables = sum(name.endswith(".pos_embedding.embedding.weight") for name in shapes.sources)
    if layers > 2 and tables == 1:
        raise shapes.error(
            "is T5, with one position table for all blocks; Wan needs UMT5-XXL, which has one in every block"
        )
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    vocab_size, dim = shapes["token_embedding.weight"]
    return TextEncoderConfig(
        vocab_size=vocab_size,
        dim=dim,
        attention_dim=shapes["blocks.0.attn.q.weight"][0],
        ffn_dim=shapes["blocks.0.ffn.gate.0.weight"][0],
        num_heads=heads,
        num_layers=layers,
        num_buckets=buckets,
    )


def _read_vae(shapes: _Shapes) -> VAEConfig:
    latents = shapes["conv2.weight"][0]
    if latents != VAEConfig.latent_channels:
        what = "is the VAE of Wan 2.2 TI2V-5B" if latents == 48 else "is not the Wan 2.1 VAE"
        raise shapes.error(f"{what}: it has {latents} latent channels, Wan 2.1 has {VAEConfig.latent_channels}")
    return VAEConfig(base_dim=shapes["encoder.conv1.weight"][0], latent_channels=latents)


def _read_image_encoder(shapes: _Shapes) -> ImageEncoderConfig:
    dim, _, _, patch = shapes["visual.patch_embedding.weight"]
    if dim % CLIP_HEAD_DIM:
        raise shapes.error(f"has width {dim}; Wan 2.1 needs CLIP ViT-H/14, of width 1280")
    has_head = "visual.head" in shapes.sources
    return ImageEncoderConfig(
        dim=dim,
        mlp_dim=shapes["visual.transformer.0.mlp.0.weight"][0],
        num_layers=shapes.count(r"visual\.transformer\.(\d+)\."),
        patch_size=patch,
        num_positions=shapes["visual.pos_embedding"][1],
        out_dim=shapes["visual.head"][1] if has_head else ImageEncoderConfig.out_dim,
    )


_READERS: Mapping[Kind, Callable[[_Shapes], Config]] = {
    "dit": _read_dit,
    "vace": _read_vace,
    "motion_controller": _read_motion_controller,
    "text_encoder": _read_text_encoder,
    "vae": _read_vae,
    "image_encoder": _read_image_encoder,
}


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
