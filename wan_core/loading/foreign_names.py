"""Names of modules and parameters in the files of other programs, as tables that are read both ways."""

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

Combine = Literal["identity", "cat", "transpose", "reshape"]


@dataclass(frozen=True)
class RenameRule:
    """One rewriting step on a name. `part` of `parts` says which piece of the target this tensor is."""

    pattern: str
    replacement: str
    combine: Combine = "identity"
    part: int = 0
    parts: int = 1


PLACEHOLDERS = {
    "block": r"(?:vace_)?blocks\.\d+",
    "vace": r"vace_blocks\.\d+",
    "qkv": "[qkv]",
    "kv": "[kv]",
    "in": "time|text",
    "qkvo": "[qkvo]",
    "n": r"\d+",
}
"""What stands in braces in tables of names; it is the same text in both names."""

DIFFUSERS_NAMES = (
    ("{block}.self_attn.{qkv}", "{block}.attn1.to_{qkv}"),
    ("{block}.self_attn.o", "{block}.attn1.to_out.0"),
    ("{block}.self_attn", "{block}.attn1"),
    ("{block}.cross_attn.{qkv}", "{block}.attn2.to_{qkv}"),
    ("{block}.cross_attn.o", "{block}.attn2.to_out.0"),
    ("{block}.cross_attn.{kv}_img", "{block}.attn2.add_{kv}_proj"),
    ("{block}.cross_attn.norm_k_img", "{block}.attn2.norm_added_k"),
    ("{block}.cross_attn", "{block}.attn2"),
    ("{block}.ffn.0", "{block}.ffn.net.0.proj"),
    ("{block}.ffn.2", "{block}.ffn.net.2"),
    ("{block}.norm3", "{block}.norm2"),
    ("{block}.modulation", "{block}.scale_shift_table"),
    ("{vace}.before_proj", "{vace}.proj_in"),
    ("{vace}.after_proj", "{vace}.proj_out"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    ("{in}_embedding.0", "condition_embedder.{in}_embedder.linear_1"),
    ("{in}_embedding.2", "condition_embedder.{in}_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
)
"""Modules and parameters of the DiT by their original name and by that of diffusers' `WanTransformer3DModel`; what is
below a module keeps its name. The longer of two that overlap stands first.
"""


def _renaming(source: str, target: str) -> RenameRule:
    """The rule that gives what is called `source`, and what is below it, the name `target`."""
    pattern = re.escape(source).replace(r"\{", "{").replace(r"\}", "}")
    pattern = pattern.format(**{name: f"(?P<{name}>{text})" for name, text in PLACEHOLDERS.items()})
    replacement = target.format(**{name: rf"\g<{name}>" for name in PLACEHOLDERS})
    return RenameRule(rf"^{pattern}(?=\.|$)", replacement)


HUGGING_FACE_NAMES = (
    ("token_embedding", "shared"),
    ("token_embedding", "encoder.embed_tokens"),
    ("norm", "encoder.final_layer_norm"),
    ("blocks.{n}.norm1", "encoder.block.{n}.layer.0.layer_norm"),
    ("blocks.{n}.norm2", "encoder.block.{n}.layer.1.layer_norm"),
    ("blocks.{n}.pos_embedding.embedding", "encoder.block.{n}.layer.0.SelfAttention.relative_attention_bias"),
    ("blocks.{n}.attn", "encoder.block.{n}.layer.0.SelfAttention"),
    ("blocks.{n}.ffn.gate.0", "encoder.block.{n}.layer.1.DenseReluDense.wi_0"),
    ("blocks.{n}.ffn.fc1", "encoder.block.{n}.layer.1.DenseReluDense.wi_1"),
    ("blocks.{n}.ffn.fc2", "encoder.block.{n}.layer.1.DenseReluDense.wo"),
)
"""The same for UMT5, by Hugging Face's names. Of two names the first is written."""

LLAMA_CPP_NAMES = (
    ("token_embedding", "token_embd"),
    ("norm", "enc.output_norm"),
    ("blocks.{n}.norm1", "enc.blk.{n}.attn_norm"),
    ("blocks.{n}.norm2", "enc.blk.{n}.ffn_norm"),
    ("blocks.{n}.pos_embedding.embedding", "enc.blk.{n}.attn_rel_b"),
    ("blocks.{n}.attn.{qkvo}", "enc.blk.{n}.attn_{qkvo}"),
    ("blocks.{n}.ffn.gate.0", "enc.blk.{n}.ffn_gate"),
    ("blocks.{n}.ffn.fc1", "enc.blk.{n}.ffn_up"),
    ("blocks.{n}.ffn.fc2", "enc.blk.{n}.ffn_down"),
)
"""The same by llama.cpp's names of a T5 encoder, which GGUF files have."""

Names = tuple[tuple[str, str], ...]


def to_original(names: Names) -> tuple[RenameRule, ...]:
    """The rules from the names of a table to the original ones."""
    return tuple(_renaming(theirs, original) for original, theirs in names)


def foreign_name(path: str, names: Names) -> str:
    """The name, by one of the tables above, of the module or parameter that is `path` in the original model."""
    for rule in _from_original(names):
        path = re.sub(rule.pattern, rule.replacement, path)
    return path


@cache
def _from_original(names: Names) -> tuple[RenameRule, ...]:
    return tuple(_renaming(original, theirs) for original, theirs in names)


def diffusers_name(path: str) -> str:
    """The path in diffusers' `WanTransformer3DModel` of the module or parameter that is `path` in the original DiT."""
    return foreign_name(path, DIFFUSERS_NAMES)
