"""The layouts in which Wan 2.1 weights are published: their names, and the way from each to the original ones."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal

import torch

from .foreign_names import DIFFUSERS_NAMES, HUGGING_FACE_NAMES, LLAMA_CPP_NAMES, Combine, RenameRule, to_original
from .stored_weights import SIDE_TENSORS, StoredWeight, plain_name

ModelKind = Literal[
    "dit", "vace", "motion_controller", "text_encoder", "vae", "image_encoder", "preview_decoder", "lora"
]


@dataclass(frozen=True)
class KeyLayout:
    """One layout of one kind of model.

    Attributes:
        marks: patterns of names; a file of this layout has more than half of them.
        absent: a pattern that no name of such a file matches.
        ignored: names that are left out.
        optional: original names that may be missing, because nothing computes with them.
    """

    kind: ModelKind
    name: str
    marks: tuple[str, ...]
    rules: tuple[RenameRule, ...] = ()
    absent: str | None = None
    ignored: str | None = None
    optional: tuple[str, ...] = ()


_VAE_PARTS = (
    RenameRule(r"\.mid_block\.resnets\.0\.", ".middle.0."),
    RenameRule(r"\.mid_block\.attentions\.0\.", ".middle.1."),
    RenameRule(r"\.mid_block\.resnets\.1\.", ".middle.2."),
    RenameRule(r"\.(downsamples|upsamples|middle)\.(\d+)\.norm1\.", r".\1.\2.residual.0."),
    RenameRule(r"\.(downsamples|upsamples|middle)\.(\d+)\.conv1\.", r".\1.\2.residual.2."),
    RenameRule(r"\.(downsamples|upsamples|middle)\.(\d+)\.norm2\.", r".\1.\2.residual.3."),
    RenameRule(r"\.(downsamples|upsamples|middle)\.(\d+)\.conv2\.", r".\1.\2.residual.6."),
    RenameRule(r"\.conv_shortcut\.", ".shortcut."),
    RenameRule(r"^(encoder|decoder)\.conv_in\.", r"\1.conv1."),
    RenameRule(r"^(encoder|decoder)\.norm_out\.", r"\1.head.0."),
    RenameRule(r"^(encoder|decoder)\.conv_out\.", r"\1.head.2."),
    RenameRule(r"^quant_conv\.", "conv1."),
    RenameRule(r"^post_quant_conv\.", "conv2."),
)

VAE_21_RULES = (
    RenameRule(r"^encoder\.down_blocks\.(\d+)\.", r"encoder.downsamples.\1."),
    # A decoder level is three residual blocks and, but for the last, an upsampler: four places in the flat list.
    *(
        RenameRule(rf"^decoder\.up_blocks\.{level}\.{name}\.{j}\.", f"decoder.upsamples.{4 * level + place}.")
        for level in range(4)
        for name, j, place in (("resnets", 0, 0), ("resnets", 1, 1), ("resnets", 2, 2), ("upsamplers", 0, 3))
    ),
    *_VAE_PARTS,
)

VAE_22_RULES = (
    RenameRule(r"\.(down|up)_blocks\.(\d+)\.resnets\.", r".\1samples.\2.\1samples."),
    # The last part of a level: after two residual blocks of the encoder, after three of the decoder.
    RenameRule(r"\.down_blocks\.(\d+)\.downsampler\.", r".downsamples.\1.downsamples.2."),
    RenameRule(r"\.up_blocks\.(\d+)\.upsampler\.", r".upsamples.\1.upsamples.3."),
    *_VAE_PARTS,
)

UNSQUEEZED = (RenameRule(r"^(.*\bmodulation|img_emb\.emb_pos)$", r"\1", "reshape"),)
"""Parameters of the DiT whose first axis has one element. GGUF files may lack it: ggml drops outermost axes of 1."""

CLIP_RULES = (
    RenameRule(r"^vision_model\.", ""),
    RenameRule(r"^embeddings\.class_embedding$", "visual.cls_embedding", "reshape"),
    RenameRule(r"^embeddings\.position_embedding\.weight$", "visual.pos_embedding", "reshape"),
    RenameRule(r"^embeddings\.patch_embedding\.", "visual.patch_embedding."),
    RenameRule(r"^visual_projection\.weight$", "visual.head", "transpose"),
    RenameRule(r"^pre_layrnorm\.", "visual.pre_norm."),
    RenameRule(r"^post_layernorm\.", "visual.post_norm."),
    RenameRule(r"^encoder\.layers\.(\d+)\.", r"visual.transformer.\1."),
    RenameRule(r"\.layer_norm([12])\.", r".norm\1."),
    *(RenameRule(rf"\.self_attn\.{name}_proj\.", ".attn.to_qkv.", "cat", i, 3) for i, name in enumerate("qkv")),
    RenameRule(r"\.self_attn\.out_proj\.", ".attn.proj."),
    RenameRule(r"\.mlp\.fc1\.", ".mlp.0."),
    RenameRule(r"\.mlp\.fc2\.", ".mlp.2."),
)

_DIFFUSERS_LEVELS = r"(encoder|decoder)\.(down|up)_blocks\.\d+\.(down|up)sampler\..+"
"""Names that only the Wan 2.2 VAE has: in that of 2.1 the resolutions of the encoder are one row."""

_BASE_BLOCKS = r"blocks\.\d+\..+"

KEY_LAYOUTS = (
    KeyLayout(
        "dit", "original",
        (r"head\.modulation", r"blocks\.0\.self_attn\.q\.weight", r"patch_embedding\.weight",
         r"time_projection\.1\.weight"),
        UNSQUEEZED,
    ),
    KeyLayout(
        "dit", "diffusers",
        (r"scale_shift_table", r"blocks\.0\.attn1\.to_q\.weight", r"patch_embedding\.weight",
         r"condition_embedder\.time_proj\.weight"),
        to_original(DIFFUSERS_NAMES),
    ),
    KeyLayout(
        "vace", "original",
        (r"vace_blocks\.0\.after_proj\.weight", r"vace_blocks\.0\.before_proj\.weight", r"vace_patch_embedding\.weight",
         r"vace_blocks\.0\.self_attn\.q\.weight"),
        UNSQUEEZED, absent=_BASE_BLOCKS,
    ),
    KeyLayout(
        "vace", "diffusers",
        (r"vace_blocks\.0\.proj_out\.weight", r"vace_blocks\.0\.proj_in\.weight", r"vace_patch_embedding\.weight",
         r"vace_blocks\.0\.attn1\.to_q\.weight"),
        to_original(DIFFUSERS_NAMES), absent=_BASE_BLOCKS,
    ),
    KeyLayout(
        "motion_controller", "original",
        (r"linear\.0\.weight", r"linear\.2\.weight", r"linear\.4\.weight", r"linear\.4\.bias"),
        absent=r"(?!linear\.).+",
    ),
    KeyLayout(
        "text_encoder", "original",
        (r"token_embedding\.weight", r"blocks\.0\.attn\.q\.weight", r"blocks\.0\.ffn\.gate\.0\.weight",
         r"blocks\.0\.pos_embedding\.embedding\.weight"),
    ),
    KeyLayout(
        "text_encoder", "Hugging Face",
        (r"shared\.weight|encoder\.embed_tokens\.weight", r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight",
         r"encoder\.block\.0\.layer\.1\.DenseReluDense\.wi_0\.weight", r"encoder\.final_layer_norm\.weight"),
        to_original(HUGGING_FACE_NAMES), ignored=r"decoder\..+|lm_head\..+",
    ),
    KeyLayout(
        "text_encoder", "llama.cpp",
        (r"token_embd\.weight", r"enc\.blk\.0\.attn_q\.weight", r"enc\.blk\.0\.ffn_gate\.weight",
         r"enc\.output_norm\.weight"),
        to_original(LLAMA_CPP_NAMES), ignored=r"dec\..+|output\.weight",
    ),
    KeyLayout(
        "vae", "original",
        (r"conv2\.weight", r"encoder\.conv1\.weight", r"decoder\.head\.2\.weight",
         r"decoder\.middle\.0\.residual\.0\.gamma", r"encoder\.middle\.0\.residual\.0\.gamma"),
    ),
    KeyLayout(
        "vae", "diffusers",
        (r"post_quant_conv\.weight", r"decoder\.mid_block\.resnets\.0\.norm1\.gamma", r"decoder\.norm_out\.gamma",
         r"encoder\.mid_block\.resnets\.0\.norm1\.gamma"),
        VAE_21_RULES, absent=_DIFFUSERS_LEVELS,
    ),
    KeyLayout(
        "vae", "diffusers",
        (r"post_quant_conv\.weight", r"decoder\.mid_block\.resnets\.0\.norm1\.gamma", r"decoder\.norm_out\.gamma",
         r"encoder\.mid_block\.resnets\.0\.norm1\.gamma", _DIFFUSERS_LEVELS),
        VAE_22_RULES,
    ),
    KeyLayout(
        "image_encoder", "original",
        (r"visual\.transformer\.0\.attn\.to_qkv\.weight", r"visual\.cls_embedding", r"visual\.pos_embedding",
         r"visual\.patch_embedding\.weight"),
    ),
    KeyLayout(
        "image_encoder", "Hugging Face",
        (r"(vision_model\.)?embeddings\.class_embedding", r"(vision_model\.)?embeddings\.position_embedding\.weight",
         r"(vision_model\.)?pre_layrnorm\.weight", r"(vision_model\.)?encoder\.layers\.0\.self_attn\.q_proj\.weight"),
        CLIP_RULES, optional=("visual.head",),
    ),
    KeyLayout(
        "preview_decoder", "original",
        (r"decoder\.1\.weight", r"decoder\.3\.conv\.0\.weight", r"decoder\.7\.conv\.weight", r"decoder\.22\.weight"),
        ignored=r"encoder\..+",
    ),
)  # fmt: skip


SPIECE_MODEL = "spiece_model"
"""Name of the byte tensor in ComfyUI's UMT5 packs that holds the SentencePiece model."""

PREFIXES = (
    "model.diffusion_model.", "diffusion_model.", "module.", "pipe.dit.", "pipe.vace.", "pipe.motion_controller.",
    "text_encoders.umt5xxl.", "text_encoders.t5xxl.", "clip_vision.", "vae.", "cond_stage_model.",
    "first_stage_model.", "transformer.", "model.", "net.",
)  # fmt: skip
"""Prefixes that programs put before every name of a model. The longer of two that overlap stands first."""

INNER_PREFIXES = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
"""Parts that FSDP, activation checkpointing and torch.compile insert anywhere in names."""

UNUSED = re.compile(
    r"spiece_model|log_scale|logit_scale|textual\..+|text_model\..+|text_projection\..+|.+\.position_ids"
)
"""Tensors that files hold beside the parameters of a model."""


@dataclass(frozen=True)
class Source:
    """How one original tensor is made: the stored weights that it is read from, how they combine, its shape."""

    parts: tuple[StoredWeight, ...]
    shape: tuple[int, ...]
    combine: Combine = "identity"

    @property
    def names(self) -> tuple[str, ...]:
        """The stored names of the numbers of each part."""
        return tuple(part.numbers for part in self.parts)

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored numbers."""
        return self.parts[0].dtype

    @property
    def is_cast(self) -> bool:
        """Whether a cast makes the weights of the stored numbers."""
        return all(part.is_cast for part in self.parts)

    @property
    def single(self) -> StoredWeight | None:
        """The stored weight that this tensor is, unchanged; None when parts are joined, reshaped or transposed."""
        return self.parts[0] if self.combine == "identity" else None


def strip_prefix(names: Iterable[str]) -> dict[str, str]:
    """The names without the prefixes that a host program put on most of them, mapped to the names in the file."""
    stripped = {INNER_PREFIXES.sub("", name): name for name in names}
    while True:
        prefix = next((p for p in PREFIXES if 2 * sum(name.startswith(p) for name in stripped) > len(stripped)), None)
        if prefix is None:
            return stripped
        stripped = {name.removeprefix(prefix): stored for name, stored in stripped.items()}


def find_layout(names: Iterable[str]) -> KeyLayout | None:
    """The layout whose marks are best found among `names` (without prefixes), None when fewer than half are."""
    weights = (name for name in names if not (UNUSED.fullmatch(name) or SIDE_TENSORS.fullmatch(name)))
    text = "\n".join(map(plain_name, weights))

    def has(pattern: str) -> bool:
        return re.search(rf"^(?:{pattern})$", text, re.MULTILINE) is not None

    def likeness(layout: KeyLayout) -> float:
        if layout.absent and has(layout.absent):
            return 0.0
        return sum(map(has, layout.marks)) / len(layout.marks)

    best = max(KEY_LAYOUTS, key=likeness)
    return best if likeness(best) > 0.5 else None


@cache
def rename(layout: KeyLayout, name: str) -> tuple[str, Combine, int, int]:
    """The original name that `name` belongs to, how it gets there, and which part of how many it is."""
    combine: Combine = "identity"
    part, parts = 0, 1
    for rule in layout.rules:
        name, count = re.subn(rule.pattern, rule.replacement, name)
        if count and rule.combine != "identity":
            combine, part, parts = rule.combine, rule.part, rule.parts
    return name, combine, part, parts


def convert(layout: KeyLayout, weights: Mapping[str, StoredWeight]) -> Mapping[str, Source]:
    """The source of every original tensor that the file holds whole; one that lacks some of its parts is left out."""
    found: dict[str, dict[int, StoredWeight]] = {}
    how: dict[str, tuple[Combine, int]] = {}
    for name, stored in weights.items():
        if UNUSED.fullmatch(name) or (layout.ignored and re.fullmatch(layout.ignored, name)):
            continue
        target, combine, part, parts = rename(layout, name)
        # Two names may stand for one tensor, such as UMT5's tied embeddings; either will do.
        found.setdefault(target, {}).setdefault(part, stored)
        how[target] = (combine, parts)
    return MappingProxyType(
        {
            target: _source(tuple(pieces[i] for i in sorted(pieces)), how[target][0])
            for target, pieces in found.items()
            if len(pieces) == how[target][1]
        }
    )


def _source(parts: tuple[StoredWeight, ...], combine: Combine) -> Source:
    shape = parts[0].shape
    if combine == "cat":
        shape = (sum(part.shape[0] for part in parts), *shape[1:])
    elif combine == "transpose":
        shape = shape[::-1]
    elif combine == "reshape":
        shape = (1,) * (3 - len(shape)) + shape
        combine = "identity" if shape == parts[0].shape else combine
    return Source(parts, shape, combine)
