"""Module paths of the Wan DiT as diffusers spells them; the way back of `dialects.DIT_RULES`."""

import re

RULES = (
    (r"\.self_attn\b", ".attn1"),
    (r"\.cross_attn\b", ".attn2"),
    (r"(\.attn\d)\.([qkv])$", r"\1.to_\2"),
    (r"(\.attn\d)\.o$", r"\1.to_out.0"),
    (r"(\.attn\d)\.([kv])_img$", r"\1.add_\2_proj"),
    (r"(\.attn\d)\.norm_k_img$", r"\1.norm_added_k"),
    (r"\.ffn\.0$", ".ffn.net.0.proj"),
    (r"\.ffn\.2$", ".ffn.net.2"),
    (r"(blocks\.\d+)\.norm3$", r"\1.norm2"),
    (r"^(vace_blocks\.\d+)\.before_proj$", r"\1.proj_in"),
    (r"^(vace_blocks\.\d+)\.after_proj$", r"\1.proj_out"),
    (r"(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head$", "proj_out"),
    (r"^(time|text)_embedding\.0$", r"condition_embedder.\1_embedder.linear_1"),
    (r"^(time|text)_embedding\.2$", r"condition_embedder.\1_embedder.linear_2"),
    (r"^time_projection\.1$", "condition_embedder.time_proj"),
    (r"^img_emb\.proj\.0$", "condition_embedder.image_embedder.norm1"),
    (r"^img_emb\.proj\.1$", "condition_embedder.image_embedder.ff.net.0.proj"),
    (r"^img_emb\.proj\.3$", "condition_embedder.image_embedder.ff.net.2"),
    (r"^img_emb\.proj\.4$", "condition_embedder.image_embedder.norm2"),
    (r"^img_emb\.emb_pos$", "condition_embedder.image_embedder.pos_embed"),
)


def diffusers_name(path: str) -> str:
    """The path in diffusers' `WanTransformer3DModel` of the module or parameter that is `path` in the original DiT."""
    for pattern, replacement in RULES:
        path = re.sub(pattern, replacement, path)
    return path
