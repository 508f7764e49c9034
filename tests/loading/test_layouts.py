"""The same tiny weights in every packaging load to the same tensors, bit for bit.

diffusers' own converters and the real classes of diffusers and transformers give the foreign names."""

import json
import re

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import save_file
from torch import nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tests.loading import inventories as inv
from tests.reference import relative_error
from wan_core.loading.detect import check_against, detect, detect_files
from wan_core.loading.load import build, load_into, spiece_model
from wan_core.loading.paths import resolve_files
from wan_core.loading.tensor_files import read_header
from wan_core.models.config import WAN_22
from wan_core.models.vae import denormalise, normalise

DITS = ("t2v", "i2v", "flf2v", "fun_control", "fun_v1_1_control", "fun_camera", "vace")
FILES = {f"dit_{name}": "dit" for name in DITS} | {
    "motion_controller": "motion_controller", "umt5": "text_encoder", "vae": "vae", "clip": "image_encoder",
}  # fmt: skip


def write(tensors, folder, name="model.safetensors", **metadata):
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / name, metadata or None)
    return folder / name


def same(module: nn.Module, tensors, ignored=r"textual\.|log_scale"):
    state = module.state_dict()
    wanted = {k: t for k, t in tensors.items() if not re.match(ignored, k)}
    assert state.keys() == wanted.keys()
    different = [k for k, t in wanted.items() if not torch.equal(state[k], t) or state[k].dtype != t.dtype]
    assert not different, different
    assert not any(p.requires_grad for p in module.parameters()) and not module.training


def load(path, dtype=None):
    return build(detect_files(path), dtype=dtype, weights="plain")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_original_names_with_prefixes(tmp_path, name, prefix):
    tensors = inv.tiny(name)
    same(load(write({prefix + k: t for k, t in tensors.items()}, tmp_path)), tensors)


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [(name, None) for name in FILES] + [("umt5", key) for key in ("state_dict", "module", "model_state", "model")],
)
def test_pickles(tmp_path, name, wrapper):
    tensors = inv.tiny(name)
    torch.save({wrapper: tensors, "step": 1} if wrapper else tensors, tmp_path / "model.pth")
    same(load(tmp_path / "model.pth"), tensors)


def test_shards_in_any_order_and_two_models_in_one_list(tmp_path):
    shards = {}
    for name in ("dit_vace", "vae"):
        tensors = inv.tiny(name)
        names = sorted(tensors, reverse=True)
        (tmp_path / name).mkdir()
        shards[name] = [
            write({k: tensors[k] for k in names[i::3]}, tmp_path / name, f"model-0000{i + 1}-of-00003.safetensors")
            for i in range(3)
        ]
    flat = [file for pair in zip(shards["vae"][::-1], shards["dit_vace"], strict=True) for file in pair]
    kinds = {}
    for group in resolve_files(flat):
        component = detect_files(group)
        kinds[component.kind] = build(component, dtype=None)
    same(kinds["dit"], inv.tiny("dit_vace"))
    same(kinds["vae"], inv.tiny("vae"))


# Diffusers has no classes for the Fun models' extra parts, so these rows have no counterpart there.
@pytest.mark.parametrize("name", ["t2v", "i2v", "flf2v", "fun_control"])
def test_diffusers_transformer(tmp_path, name):
    tensors = inv.tiny(f"dit_{name}")
    converted = convert_wan_transformer_to_diffusers(dict(tensors))
    if name == "flf2v":
        # The converter has no rule for this one; the name is that of the class.
        converted["condition_embedder.image_embedder.pos_embed"] = converted.pop("img_emb.emb_pos")
    image = name != "t2v"
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, text_dim=64, freq_dim=64,
        in_channels=tensors["patch_embedding.weight"].shape[1], ffn_dim=512, num_layers=4,
        image_dim=1280 if image else None, added_kv_proj_dim=256 if image else None,
        pos_embed_seq_len=514 if name == "flf2v" else None,
    )  # fmt: skip
    model.load_state_dict(converted, strict=True)
    model.save_pretrained(tmp_path / "hub", max_shard_size="3MB")
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) > 1
    component = detect_files(tmp_path / "hub")
    assert component.layout == "diffusers" and component.config == of_original(tensors).config
    same(build(component, dtype=None), tensors)
    same(load(write({f"transformer.{k}": t for k, t in converted.items()}, tmp_path)), tensors)


def of_original(tensors):
    return detect(inv.header({k: t.shape for k, t in tensors.items()}, torch.float32))


def test_diffusers_vace(tmp_path):
    tensors = inv.tiny("dit_vace")
    converted = convert_wan_transformer_to_diffusers(dict(tensors))
    model = diffusers.WanVACETransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, in_channels=16, text_dim=64, freq_dim=64, ffn_dim=512,
        num_layers=4, vace_layers=[0, 2], vace_in_channels=96,
    )  # fmt: skip
    model.load_state_dict(converted, strict=True)
    same(load(write(model.state_dict(), tmp_path)), tensors)
    branch = detect(inv.header({k: t.shape for k, t in converted.items() if k.startswith("vace_")}))
    assert (branch.kind, branch.layout) == ("vace", "diffusers")


def test_diffusers_vae(tmp_path):
    tensors = inv.tiny("vae")
    model = diffusers.AutoencoderKLWan(base_dim=8, z_dim=16)
    model.load_state_dict(convert_wan_vae_to_diffusers(dict(tensors)), strict=True)
    component = detect_files(write(model.state_dict(), tmp_path))
    assert (component.layout, component.config) == ("diffusers", of_original(tensors).config)
    same(build(component, dtype=None), tensors)


def test_diffusers_vae_22(tmp_path):
    """Every name of the class is read, and means what it means there: both decode to the same pixels."""
    model = diffusers.AutoencoderKLWan(
        base_dim=8, decoder_base_dim=12, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
    )  # fmt: skip
    component = detect_files(write(model.state_dict(), tmp_path))
    assert (component.layout, component.config) == ("diffusers", of_original(inv.tiny("vae22")).config)
    ours, latents = build(component, dtype=torch.float32), torch.randn(1, 48, 2, 2, 3)
    with torch.no_grad():
        pixels = model.decode(latents).sample
        assert torch.allclose(ours.decode(normalise(latents, WAN_22)), pixels, atol=1e-4)
        moments = model.encode(pixels).latent_dist.mode()
    assert torch.allclose(denormalise(ours.encode(pixels), WAN_22), moments, atol=1e-4)


T5_PARTS = {
    "norm1.weight": "layer.0.layer_norm.weight", "norm2.weight": "layer.1.layer_norm.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight", "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
} | {f"attn.{part}.weight": f"layer.0.SelfAttention.{part}.weight" for part in "qkvo"}  # fmt: skip


def hugging_face_umt5(tensors):
    """Original tensors under the names of transformers' UMT5."""
    renamed = {
        "shared.weight": tensors["token_embedding.weight"],
        "encoder.final_layer_norm.weight": tensors["norm.weight"],
    }
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            renamed[f"encoder.block.{match[1]}.{T5_PARTS[match[2]]}"] = tensor
    return renamed


def umt5_model(tensors):
    config = transformers.UMT5Config(
        vocab_size=320, d_model=64, d_kv=64, num_heads=2, d_ff=160, num_layers=sum("norm1" in k for k in tensors)
    )
    model = transformers.UMT5EncoderModel(config)
    left = model.load_state_dict(hugging_face_umt5(tensors), strict=False)
    assert not left.unexpected_keys and left.missing_keys == ["encoder.embed_tokens.weight"]
    return model


def test_hugging_face_umt5(tmp_path):
    tensors = inv.tiny("umt5")
    model = umt5_model(tensors)
    model.save_pretrained(tmp_path / "hub")
    component = detect_files(tmp_path / "hub")
    assert (component.layout, component.config) == ("Hugging Face", of_original(tensors).config)
    same(build(component, dtype=None), tensors)
    renamed = hugging_face_umt5(tensors)
    renamed["encoder.embed_tokens.weight"] = renamed.pop("shared.weight")
    same(load(write(renamed | {"decoder.final_layer_norm.weight": torch.ones(64)}, tmp_path)), tensors)


def test_loaded_umt5_computes_what_transformers_does(tmp_path):
    model = umt5_model({k: 0.1 * t if t.ndim > 1 else t for k, t in inv.tiny("umt5").items()}).eval()
    model.save_pretrained(tmp_path)
    ids = torch.randint(2, 320, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids, torch.ones_like(ids)).last_hidden_state
        got = load(tmp_path)(ids, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def clip_model(kind, layers=2):
    config = transformers.CLIPVisionConfig(
        hidden_size=160, intermediate_size=640, num_hidden_layers=layers, num_attention_heads=2, image_size=224,
        patch_size=14, projection_dim=64, hidden_act="gelu",
    )  # fmt: skip
    model = kind(config).eval()
    model.load_state_dict(inv.draw({k: t.shape for k, t in model.state_dict().items()}))
    return model


def original_clip(state, layers=2):
    """What the vision tower of `state` is under the original names, written out by hand."""
    vision = {k.removeprefix("vision_model."): t for k, t in state.items()}
    tensors = {
        "visual.cls_embedding": vision["embeddings.class_embedding"][None, None],
        "visual.pos_embedding": vision["embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": vision["embeddings.patch_embedding.weight"],
    }
    for leaf in ("weight", "bias"):
        tensors |= {f"visual.pre_norm.{leaf}": vision[f"pre_layrnorm.{leaf}"]}
        tensors |= {f"visual.post_norm.{leaf}": vision[f"post_layernorm.{leaf}"]}
        for i in range(layers):
            ours, theirs = f"visual.transformer.{i}", f"encoder.layers.{i}"
            parts = [vision[f"{theirs}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            tensors |= {
                f"{ours}.attn.to_qkv.{leaf}": torch.cat(parts),
                f"{ours}.attn.proj.{leaf}": vision[f"{theirs}.self_attn.out_proj.{leaf}"],
                f"{ours}.norm1.{leaf}": vision[f"{theirs}.layer_norm1.{leaf}"],
                f"{ours}.norm2.{leaf}": vision[f"{theirs}.layer_norm2.{leaf}"],
                f"{ours}.mlp.0.{leaf}": vision[f"{theirs}.mlp.fc1.{leaf}"],
                f"{ours}.mlp.2.{leaf}": vision[f"{theirs}.mlp.fc2.{leaf}"],
            }
    return tensors


def test_hugging_face_clip_with_projection(tmp_path):
    model = clip_model(transformers.CLIPVisionModelWithProjection)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    component = detect_files(tmp_path)
    assert component.layout == "Hugging Face" and len(component.header.files) > 1
    state = model.state_dict()
    same(build(component, dtype=None), original_clip(state) | {"visual.head": state["visual_projection.weight"].T})


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_hugging_face_clip_without_projection(tmp_path, prefix):
    """transformers 5 writes the bare tower without `vision_model.`, transformers 4 with it."""
    model = clip_model(transformers.CLIPVisionModel)
    state = {prefix + k: t for k, t in model.state_dict().items()}
    component = detect_files(write(state | {"vision_model.embeddings.position_ids": torch.arange(257)[None]}, tmp_path))
    same(build(component, dtype=None), original_clip(state) | {"visual.head": torch.zeros(160, 1024)})


def test_loaded_clip_computes_what_transformers_does(tmp_path):
    """As a whole: with elements of 400 in the mean, rounding alone moves one near zero by 0.02. Either result is up to
    4e-6 from float64's, with SSE as with AVX2.
    """
    model = clip_model(transformers.CLIPVisionModel)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    with torch.no_grad():
        hidden = model((pixels * 0.5 + 0.5 - mean) / std, output_hidden_states=True).hidden_states
    assert relative_error(loaded(pixels), hidden[-2]) < 5e-5


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("name", ["dit_t2v", "umt5", "clip"])
def test_plain_fp8(tmp_path, name, dtype):
    tensors = {k: t.to(dtype) if t.ndim == 2 else t for k, t in inv.tiny(name).items()}
    component = detect_files(write(tensors, tmp_path))
    assert component.quantised == "FP8" and component.dtype == dtype
    same(build(component, dtype=None, weights="plain"), tensors)
    same(build(component, dtype=torch.float32, weights="plain"), {k: t.float() for k, t in tensors.items()})


def linears(tensors):
    return [k.removesuffix(".weight") for k, t in tensors.items() if k.endswith(".weight") and t.ndim == 2]


def scaled(tensors, shape):
    """Quantised weights, their scales by layer, and the float32 weights that they stand for."""
    weights, scales, expected = {}, {}, dict(tensors)
    for layer in linears(tensors):
        weight = tensors[f"{layer}.weight"]
        peak = weight.abs().amax() if shape != "rows" else weight.abs().amax(1, keepdim=True)
        scale = (peak / 448).float().reshape({"scalar": (), "one": (1,), "rows": (-1, 1)}[shape])
        weights[f"{layer}.weight"] = (weight / scale).to(E4M3)
        scales[layer] = scale
        expected[f"{layer}.weight"] = weights[f"{layer}.weight"].float() * scale
    return tensors | weights, scales, expected


def old_dialect(scales):
    return {"scaled_fp8": torch.zeros(0, dtype=E4M3)} | {
        f"{layer}.{name}": scale.clone() for layer, scale in scales.items() for name in ("scale_weight", "scale_input")
    }


def new_dialect(scales):
    mark = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    return {f"{layer}.weight_scale": scale for layer, scale in scales.items()} | {
        f"{layer}.comfy_quant": mark.clone() for layer in scales
    }


@pytest.mark.parametrize("dialect", [old_dialect, new_dialect])
@pytest.mark.parametrize(("name", "shape"), [("dit_t2v", "scalar"), ("umt5", "one"), ("umt5", "rows")])
def test_scaled_fp8(tmp_path, dialect, name, shape):
    weights, scales, expected = scaled(inv.tiny(name), shape)
    stored = weights | dialect(scales)
    component = detect_files(write({f"model.diffusion_model.{k}": t for k, t in stored.items()}, tmp_path))
    assert component.quantised.startswith("FP8, a scale per")
    check_against(component, inv.StandIn({k: t.shape for k, t in expected.items()}))
    same(build(component, dtype=torch.float32, weights="plain"), expected)
    kept = {k: t.bfloat16() if k.removesuffix(".weight") in scales else t for k, t in expected.items()}
    same(build(component, dtype=None, weights="plain"), kept)


def test_scaled_fp8_declared_in_metadata(tmp_path):
    weights, scales, expected = scaled(inv.tiny("dit_t2v"), "scalar")
    layers = {layer: {"format": "float8_e4m3fn"} for layer in scales}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    stored = weights | {f"{layer}.weight_scale": scale for layer, scale in scales.items()}
    same(load(write(stored, tmp_path, **metadata), torch.float32), expected)


def test_scaled_fp8_hugging_face_umt5_with_its_tokenizer(tmp_path):
    """The layout of umt5_xxl_fp8_e4m3fn_scaled: foreign names, scales and the SentencePiece model in one file."""
    weights, scales, expected = scaled(inv.tiny("umt5"), "scalar")
    stored = hugging_face_umt5(weights) | {
        name.removesuffix("weight") + "scale_weight": scales[k.removesuffix(".weight")].clone()
        for k, name in zip(weights, [own_name(weights, k) for k in weights], strict=True)
        if k.removesuffix(".weight") in scales
    }
    stored |= {"spiece_model": torch.arange(99, dtype=torch.uint8), "scaled_fp8": torch.zeros(0, dtype=E4M3)}
    file = write(stored, tmp_path)
    same(load(file, torch.float32), expected)
    assert spiece_model(read_header([file])) == bytes(range(99))
    assert spiece_model(read_header([write(weights, tmp_path, "plain.safetensors")])) is None


def own_name(tensors, key):
    """The Hugging Face name of one original key."""
    marker = {k: torch.full((1,), float(i)) for i, k in enumerate(tensors)}
    return next(name for name, t in hugging_face_umt5(marker).items() if t == marker[key])


def test_scaled_fp8_parts_across_shards(tmp_path):
    """CLIP's q, k and v are joined, each with its own scale, and lie in different files than the scales."""
    state = clip_model(transformers.CLIPVisionModelWithProjection).state_dict()
    attention = {k: t for k, t in state.items() if re.search(r"[qkv]_proj\.weight", k)}
    weights, scales, expected = scaled(attention, "scalar")
    stored = state | weights | {f"{layer}.weight_scale": scale for layer, scale in scales.items()}
    names = sorted(stored)
    for i in range(4):
        write({k: stored[k] for k in names[i::4]}, tmp_path, f"clip-0000{i + 1}-of-00004.safetensors")
    same(
        load(tmp_path, torch.float32),
        original_clip(state | expected) | {"visual.head": state["visual_projection.weight"].T},
    )


def test_load_into_a_module_that_has_weights(tmp_path):
    tensors = inv.tiny("vae")
    component = detect_files(write(tensors, tmp_path))
    module = build(component, dtype=None, weights="plain")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert load_into(module, component, torch.bfloat16) is module
    same(module, {k: t.bfloat16() for k, t in tensors.items()})
