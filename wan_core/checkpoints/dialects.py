"""The layouts in which Wan 2.1 weights are passed around, a row of data each: names that mark it, rewriting rules."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["dit", "vace", "motion_controller", "text_encoder", "vae", "image_encoder", "preview_decoder", "lora"]
Combine = Literal["identity", "cat", "transpose", "reshape"]


@dataclass(frozen=True)
class Rule:
    """One rewriting step on a name. `part` of `parts` says which piece of the target this tensor is."""

    pattern: str
    replacement: str
    combine: Combine = "identity"
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Dialect:
    """One layout of one kind of model.

    `marks` are patterns of names, most of which are present; no name matches `absent`. Names that match `ignored` are
    left out; targets in `optional` may be missing, because nothing computes with them.
    """

    kind: Kind
    layout: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...] = ()
    absent: str | None = None
    ignored: str | None = None
    optional: tuple[str, ...] = ()


DIT_RULES = (
    Rule(r"^((?:vace_)?blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    Rule(r"^scale_shift_table$", "head.modulation"),
    Rule(r"^proj_out\.", "head.head."),
    Rule(r"\.attn1\.", ".self_attn."),
    Rule(r"\.attn2\.", ".cross_attn."),
    Rule(r"_attn\.to_([qkv])\.", r"_attn.\1."),
    Rule(r"_attn\.to_out\.0\.", "_attn.o."),
    Rule(r"_attn\.add_([kv])_proj\.", r"_attn.\1_img."),
    Rule(r"_attn\.norm_added_k\.", "_attn.norm_k_img."),
    Rule(r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    Rule(r"\.ffn\.net\.2\.", ".ffn.2."),
    Rule(r"(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    Rule(r"^condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
    Rule(r"^condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
    Rule(r"^condition_embedder\.time_proj\.", "time_projection.1."),
    Rule(r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    Rule(r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
    Rule(r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
    Rule(r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    Rule(r"^condition_embedder\.image_embedder\.pos_embed$", "img_emb.emb_pos"),
    Rule(r"^(vace_blocks\.\d+)\.proj_in\.", r"\1.before_proj."),
    Rule(r"^(vace_blocks\.\d+)\.proj_out\.", r"\1.after_proj."),
)

VAE_RULES = (
    Rule(r"^encoder\.down_blocks\.(\d+)\.", r"encoder.downsamples.\1."),
    # A decoder level is three residual blocks and, but for the last, an upsampler: four places in the flat list.
    *(
        Rule(rf"^decoder\.up_blocks\.{level}\.{name}\.{j}\.", f"decoder.upsamples.{4 * level + place}.")
        for level in range(4)
        for name, j, place in (("resnets", 0, 0), ("resnets", 1, 1), ("resnets", 2, 2), ("upsamplers", 0, 3))
    ),
    Rule(r"\.mid_block\.resnets\.0\.", ".middle.0."),
    Rule(r"\.mid_block\.attentions\.0\.", ".middle.1."),
    Rule(r"\.mid_block\.resnets\.1\.", ".middle.2."),
    Rule(r"\.(downsamples|upsamples|middle)\.(\d+)\.norm1\.", r".\1.\2.residual.0."),
    Rule(r"\.(downsamples|upsamples|middle)\.(\d+)\.conv1\.", r".\1.\2.residual.2."),
    Rule(r"\.(downsamples|upsamples|middle)\.(\d+)\.norm2\.", r".\1.\2.residual.3."),
    Rule(r"\.(downsamples|upsamples|middle)\.(\d+)\.conv2\.", r".\1.\2.residual.6."),
    Rule(r"\.conv_shortcut\.", ".shortcut."),
    Rule(r"^(encoder|decoder)\.conv_in\.", r"\1.conv1."),
    Rule(r"^(encoder|decoder)\.norm_out\.", r"\1.head.0."),
    Rule(r"^(encoder|decoder)\.conv_out\.", r"\1.head.2."),
    Rule(r"^quant_conv\.", "conv1."),
    Rule(r"^post_quant_conv\.", "conv2."),
)

UMT5_RULES = (
    Rule(r"^(shared|encoder\.embed_tokens)\.", "token_embedding."),
    Rule(r"^encoder\.final_layer_norm\.", "norm."),
    Rule(r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm\.", r"blocks.\1.norm1."),
    Rule(r"^encoder\.block\.(\d+)\.layer\.1\.layer_norm\.", r"blocks.\1.norm2."),
    Rule(
        r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.",
        r"blocks.\1.pos_embedding.embedding.",
    ),
    Rule(r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.", r"blocks.\1.attn."),
    Rule(r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.", r"blocks.\1.ffn.gate.0."),
    Rule(r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.", r"blocks.\1.ffn.fc1."),
    Rule(r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.", r"blocks.\1.ffn.fc2."),
)

CLIP_RULES = (
    Rule(r"^vision_model\.", ""),
    Rule(r"^embeddings\.class_embedding$", "visual.cls_embedding", "reshape"),
    Rule(r"^embeddings\.position_embedding\.weight$", "visual.pos_embedding", "reshape"),
    Rule(r"^embeddings\.patch_embedding\.", "visual.patch_embedding."),
    Rule(r"^visual_projection\.weight$", "visual.head", "transpose"),
    Rule(r"^pre_layrnorm\.", "visual.pre_norm."),
    Rule(r"^post_layernorm\.", "visual.post_norm."),
    Rule(r"^encoder\.layers\.(\d+)\.", r"visual.transformer.\1."),
    Rule(r"\.layer_norm([12])\.", r".norm\1."),
    *(Rule(rf"\.self_attn\.{name}_proj\.", ".attn.to_qkv.", "cat", i, 3) for i, name in enumerate("qkv")),
    Rule(r"\.self_attn\.out_proj\.", ".attn.proj."),
    Rule(r"\.mlp\.fc1\.", ".mlp.0."),
    Rule(r"\.mlp\.fc2\.", ".mlp.2."),
)

_BASE_BLOCKS = r"blocks\.\d+\..+"

DIALECTS = (
    Dialect(
        "dit", "original",
        (r"head\.modulation", r"blocks\.0\.self_attn\.q\.weight", r"patch_embedding\.weight",
         r"time_projection\.1\.weight"),
    ),
    Dialect(
        "dit", "diffusers",
        (r"scale_shift_table", r"blocks\.0\.attn1\.to_q\.weight", r"patch_embedding\.weight",
         r"condition_embedder\.time_proj\.weight"),
        DIT_RULES,
    ),
    Dialect(
        "vace", "original",
        (r"vace_blocks\.0\.after_proj\.weight", r"vace_blocks\.0\.before_proj\.weight", r"vace_patch_embedding\.weight",
         r"vace_blocks\.0\.self_attn\.q\.weight"),
        absent=_BASE_BLOCKS,
    ),
    Dialect(
        "vace", "diffusers",
        (r"vace_blocks\.0\.proj_out\.weight", r"vace_blocks\.0\.proj_in\.weight", r"vace_patch_embedding\.weight",
         r"vace_blocks\.0\.attn1\.to_q\.weight"),
        DIT_RULES, absent=_BASE_BLOCKS,
    ),
    Dialect(
        "motion_controller", "original",
        (r"linear\.0\.weight", r"linear\.2\.weight", r"linear\.4\.weight", r"linear\.4\.bias"),
        absent=r"(?!linear\.).+",
    ),
    Dialect(
        "text_encoder", "original",
        (r"token_embedding\.weight", r"blocks\.0\.attn\.q\.weight", r"blocks\.0\.ffn\.gate\.0\.weight",
         r"blocks\.0\.pos_embedding\.embedding\.weight"),
    ),
    Dialect(
        "text_encoder", "Hugging Face",
        (r"shared\.weight|encoder\.embed_tokens\.weight", r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight",
         r"encoder\.block\.0\.layer\.1\.DenseReluDense\.wi_0\.weight", r"encoder\.final_layer_norm\.weight"),
        UMT5_RULES, ignored=r"decoder\..+|lm_head\..+",
    ),
    Dialect(
        "vae", "original",
        (r"conv2\.weight", r"encoder\.conv1\.weight", r"decoder\.head\.2\.weight",
         r"decoder\.middle\.0\.residual\.0\.gamma", r"encoder\.middle\.0\.residual\.0\.gamma"),
    ),
    Dialect(
        "vae", "diffusers",
        (r"post_quant_conv\.weight", r"decoder\.mid_block\.resnets\.0\.norm1\.gamma", r"decoder\.norm_out\.gamma",
         r"encoder\.mid_block\.resnets\.0\.norm1\.gamma"),
        VAE_RULES,
    ),
    Dialect(
        "image_encoder", "original",
        (r"visual\.transformer\.0\.attn\.to_qkv\.weight", r"visual\.cls_embedding", r"visual\.pos_embedding",
         r"visual\.patch_embedding\.weight"),
    ),
    Dialect(
        "image_encoder", "Hugging Face",
        (r"(vision_model\.)?embeddings\.class_embedding", r"(vision_model\.)?embeddings\.position_embedding\.weight",
         r"(vision_model\.)?pre_layrnorm\.weight", r"(vision_model\.)?encoder\.layers\.0\.self_attn\.q_proj\.weight"),
        CLIP_RULES, optional=("visual.head",),
    ),
    Dialect(
        "preview_decoder", "original",
        (r"decoder\.1\.weight", r"decoder\.3\.conv\.0\.weight", r"decoder\.7\.conv\.weight", r"decoder\.22\.weight"),
        ignored=r"encoder\..+",
    ),
)  # fmt: skip
