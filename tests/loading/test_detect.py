"""What a file is, from names and shapes: every published structure at real size, and everything that is not one."""

import dataclasses
import json
import random
import re
from functools import cache

import pytest
import torch

from tests.loading import inventories as inv
from tests.loading.inventories import header
from wan_core.loading.detect import check_against, detect, fingerprint, join_vace, require_kind, vace_layers
from wan_core.loading.load import CLASSES
from wan_core.loading.tensor_files import CheckpointError
from wan_core.models.config import (
    WAN_22,
    DiTConfig,
    ImageEncoderConfig,
    MotionControllerConfig,
    TextEncoderConfig,
    VAEConfig,
)

VAE_22 = VAEConfig(base_dim=160, decoder_dim=256, geometry=WAN_22, patch=2, shortcuts=True)

S, L = DiTConfig(), DiTConfig(dim=5120, ffn_dim=13824, num_layers=40)
M = DiTConfig(dim=3072, ffn_dim=14336, geometry=WAN_22, in_channels=48)
VACE_S, VACE_L = tuple(range(0, 30, 2)), tuple(range(0, 40, 5))


IMAGE = {"has_image_input": True}
REFERENCE = {"has_reference": True}
CAMERA = IMAGE | {"in_channels": 32, "camera_channels": 24}

# The model table: fingerprint, billions of parameters, base, and what differs from it.
TABLE = {
    "T2V-1.3B": ("9269f8db9040a9d860eaca435be61814", 1.4190, S, {}),
    "T2V-14B": ("aafcfd9672c3a2456dc46e1cb6e52c70", 14.2885, L, {}),
    "I2V-14B": ("6bfcfb3b342cb286ce886889d519a77e", 16.3949, L, IMAGE | {"in_channels": 36}),
    "Fun-1.3B-InP": ("6d6ccde6845b95ad9114ab993d917893", 1.5644, S, IMAGE | {"in_channels": 36}),
    "FLF2V-14B": ("3ef3b1f8e1dab83d5b71fd7b617f859f", 16.3955, L, IMAGE | {"in_channels": 36, "image_positions": 514}),
    "Fun-1.3B-Control": ("349723183fc063b2bfc10bb2835cf677", 1.5645, S, IMAGE | {"in_channels": 48}),
    "Fun-14B-Control": ("efa44cddf936c70abd0ea28b6cbe946c", 16.3951, L, IMAGE | {"in_channels": 48}),
    "V1.1-1.3B-Control": ("70ddad9d3a133785da5ea371aae09504", 1.5646, S, IMAGE | REFERENCE | {"in_channels": 48}),
    "V1.1-14B-Control": ("26bde73488a92e64cc20b0a7485b9e5b", 16.3955, L, IMAGE | REFERENCE | {"in_channels": 48}),
    "V1.1-1.3B-Camera": ("ac6a5aa74f4a0aab6f64eb9a72f19901", 1.6163, S, CAMERA),
    "V1.1-14B-Camera": ("b61c605c2adbd23124d152ed28e049ae", 16.8981, L, CAMERA),
    "VACE-1.3B": ("a61453409b67cd3246cf0c3bebad47ba", 2.1540, S, {"vace_layers": VACE_S, "vace_channels": 96}),
    "VACE-14B": ("7a513e1f257a861512b1afd387a8ecd9", 17.3376, L, {"vace_layers": VACE_L, "vace_channels": 96}),
    "Wan2.2-T2V-A14B": ("aafcfd9672c3a2456dc46e1cb6e52c70", 14.288491584, L, {}),
    "Wan2.2-I2V-A14B": ("5b013604280dd715f8457c6ed6d6a626", 14.288901184, L, {"in_channels": 36}),
    "Wan2.2-Fun-A14B-Control": ("2267d489f0ceb9f21836532952852ee5", 14.289561664, L, REFERENCE | {"in_channels": 52}),
    "Wan2.2-Fun-A14B-Control-Camera": (
        "47dbeab5e560db3180adf51dc0232fb1", 14.792233024, L, {"in_channels": 36, "camera_channels": 24},
    ),
    "Wan2.2-VACE-Fun-A14B": (
        "7a513e1f257a861512b1afd387a8ecd9", 17.337592896, L, {"vace_layers": VACE_L, "vace_channels": 96},
    ),
    "Wan2.2-TI2V-5B": ("1f5ab7703c6fc803fdded85ff040c316", 4.999787712, M, {}),
    "Wan2.2-Fun-5B-InP": ("e1152dff", 5.000426688, M, {"in_channels": 100}),
    "Wan2.2-Fun-5B-Control": ("8cf5720f", 5.001609408, M, REFERENCE | {"in_channels": 148}),
    "Wan2.2-Fun-5B-Control-Camera": (
        "0e2ab7dec4711919374f3d7ffdea90be", 5.245802688, M, {"in_channels": 100, "camera_channels": 24},
    ),
}  # fmt: skip
DITS = {
    name: (inv.dit(name), digest, billions, dataclasses.replace(base, **changes))
    for name, (digest, billions, base, changes) in TABLE.items()
}
OTHERS = {
    "motion controller": (
        inv.motion_controller(),
        "dbd5ec76bbf977983f972c151d545389",
        0.01692,
        MotionControllerConfig(),
    ),
    "UMT5": (inv.umt5(), "9c8818c2cbea55eca56c7b447df170da", 5.681, TextEncoderConfig()),
    "VAE": (inv.vae(), "ccc42284ea13e1ad04693284c7a09be6", 0.12689, VAEConfig()),
    "VAE 2.2": (inv.dit("Wan2.2_VAE"), "e1de6c02cdac79f8b739f4d3698cd216", 0.704689, VAE_22),
    "CLIP": (inv.clip(), "5941c53e207d62f20f9025686193c40b", 1.193, ImageEncoderConfig()),
}
ALL = DITS | OTHERS
KIND_OF = {
    "motion controller": "motion_controller", "UMT5": "text_encoder", "VAE": "vae", "VAE 2.2": "vae",
    "CLIP": "image_encoder",
}  # fmt: skip
TINY = {
    "dit_t2v": "dit", "dit_vace": "dit", "umt5": "text_encoder", "vae": "vae", "clip_1280": "image_encoder",
    "motion_controller": "motion_controller", "clip": "image_encoder", "dit_fun_camera": "dit", "dit_flf2v": "dit",
    "dit_fun_control": "dit", "dit_fun_v1_1_control": "dit", "dit_i2v": "dit", "dit_i2v_a14b": "dit",
    "dit_fun_a14b_control": "dit", "dit_fun_a14b_camera": "dit", "vae22": "vae", "dit_ti2v_5b": "dit",
    "dit_fun_5b_inp": "dit", "dit_fun_5b_control": "dit", "dit_fun_5b_camera": "dit",
}  # fmt: skip


def module_for(component):
    return meta_module(component.kind, component.config)


@cache
def meta_module(kind, config):
    with torch.device("meta"):
        return CLASSES[kind](config)


@pytest.mark.parametrize("name", ALL)
def test_published_structures(name):
    shapes, digest, billions, config = ALL[name]
    head = header(shapes)
    assert fingerprint(head).startswith(digest)
    assert sum(torch.Size(s).numel() for s in shapes.values()) / 1e9 == pytest.approx(billions, rel=4e-4)
    component = detect(head)
    assert (component.kind, component.layout, component.config) == (KIND_OF.get(name, "dit"), "original", config)
    assert component.dtype == torch.bfloat16 and component.quantised is None
    check_against(component, module_for(component))


@pytest.mark.parametrize("name", [name for name in TABLE if name.startswith("Wan2.2")])
def test_inventories_of_wan_22_hold_what_their_authors_count(name):
    stored = json.loads((inv.HEADERS / f"{name}.json").read_text())
    shapes, digest, billions, _ = DITS[name]
    # Of the Fun-5B rows two are known by their code alone.
    assert stored["fingerprint"].startswith(digest) and stored["confirmed"] == ("Fun-5B" not in name)
    assert len(shapes) == stored["keys"]
    assert sum(torch.Size(s).numel() for s in shapes.values()) == stored["params"] == round(billions * 1e9)


def test_krea_realtime_is_a_text_model_under_a_prefix():
    head = header({f"model.{name}": shape for name, shape in DITS["T2V-14B"][0].items()}, file="krea.safetensors")
    assert fingerprint(head) == "5ec04e02b42d2580483ad69f4e76346a" and detect(head).config == DITS["T2V-14B"][3]


def test_order_does_not_matter():
    shapes = list(DITS["VACE-1.3B"][0].items())
    random.Random(0).shuffle(shapes)
    assert detect(header(dict(shapes))).config == DITS["VACE-1.3B"][3]
    assert fingerprint(header(dict(shapes))) == DITS["VACE-1.3B"][1]


def one_of_each_part(shapes):
    """Names that stand for all: everything outside the blocks, and the first and last block in full."""
    last = (
        max(int(m[1]) for n in shapes if (m := re.search(r"(?:blocks|transformer)\.(\d+)\.", n)))
        if len(shapes) > 200
        else 0
    )
    return [n for n in shapes if not (m := re.search(r"(?:blocks|transformer)\.(\d+)\.", n)) or int(m[1]) in (0, last)]


@pytest.mark.parametrize("name", ALL)
def test_a_missing_tensor_is_named(name):
    shapes = {k: v for k, v in ALL[name][0].items() if not k.startswith("textual.") and k != "log_scale"}
    # The position table is all that tells FLF2V from I2V: without it the file is a whole I2V model.
    for lost in [n for n in shapes if n != "img_emb.emb_pos" and not re.search(r"(blocks|transformer)\.[1-9]", n)][::9]:
        with pytest.raises(CheckpointError, match=re.escape(lost)):
            component = detect(header({k: v for k, v in shapes.items() if k != lost}))
            check_against(component, module_for(component))


@pytest.mark.parametrize("name", TINY)
def test_every_missing_tensor_of_a_tiny_model_is_named(name):
    shapes = {k: tuple(t.shape) for k, t in inv.tiny(name).items() if not k.startswith(("textual.", "log_scale"))}
    for lost in shapes.keys() - {"img_emb.emb_pos"}:
        with pytest.raises(CheckpointError, match=re.escape(lost)):
            component = detect(header({k: v for k, v in shapes.items() if k != lost}))
            check_against(component, module_for(component))


@pytest.mark.parametrize("name", TINY)
def test_tiny_structures(name):
    component = detect(header({k: t.shape for k, t in inv.tiny(name).items()}))
    assert component.kind == TINY[name]
    check_against(component, module_for(component))


def test_tiny_sizes():
    def config(name):
        return detect(header({k: t.shape for k, t in inv.tiny(name).items()})).config

    tiny = {"dim": 256, "ffn_dim": 512, "num_layers": 4, "text_dim": 64, "freq_dim": 64}
    assert config("dit_t2v") == DiTConfig(**tiny)
    assert config("dit_vace") == DiTConfig(**tiny, vace_layers=(0, 2), vace_channels=96)
    assert config("dit_flf2v") == DiTConfig(**tiny, in_channels=36, has_image_input=True, image_positions=514)
    assert config("umt5") == TextEncoderConfig(
        vocab_size=320, dim=64, attention_dim=128, ffn_dim=160, num_heads=2, num_layers=len([
            k for k in inv.tiny("umt5") if k.endswith("norm1.weight")
        ])
    )  # fmt: skip
    assert config("vae") == VAEConfig(base_dim=8)
    assert config("vae22") == dataclasses.replace(VAE_22, base_dim=8, decoder_dim=12)
    assert config("motion_controller") == MotionControllerConfig(dim=256, freq_dim=64)


PREFIXES = (
    "model.diffusion_model.", "diffusion_model.", "model.", "module.", "pipe.dit.", "transformer.", "net.",
    "module.model.diffusion_model.", "_orig_mod.",
)  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", ["T2V-1.3B", "VAE", "VAE 2.2", "UMT5"])
def test_prefixes(name, prefix):
    component = detect(header({prefix + k: v for k, v in ALL[name][0].items()}))
    assert component.config == ALL[name][3]
    assert all(source.names == (prefix + target,) for target, source in component.sources.items())


def test_unexpected_and_misshapen():
    shapes = {k: t.shape for k, t in inv.tiny("dit_t2v").items()}
    shapes["blocks.1.ffn.0.weight"] = (512, 255)
    shapes |= {f"extra.{i}.weight": (1,) for i in range(7)}
    component = detect(header(shapes))
    with pytest.raises(CheckpointError) as error:
        check_against(component, module_for(component))
    text = str(error.value)
    assert "1 of another shape: blocks.1.ffn.0.weight [512, 255] instead of [512, 256]" in text
    assert "7 unexpected: extra.0.weight" in text and "extra.4.weight, ..." in text and "extra.5" not in text


@pytest.mark.parametrize(
    "extra", ["log_scale", "textual.x", "spiece_model", "scaled_fp8", "blocks.0.attn.q.comfy_quant"]
)
def test_harmless_extras(extra):
    shapes = {k: t.shape for k, t in inv.tiny("umt5").items()} | {extra: (1,)}
    component = detect(header(shapes))
    check_against(component, module_for(component))


def without(shapes, pattern):
    return {k: v for k, v in shapes.items() if not re.search(pattern, k)}


I2V = {k: tuple(t.shape) for k, t in inv.tiny("dit_i2v").items()}
T2V = {k: tuple(t.shape) for k, t in inv.tiny("dit_t2v").items()}
CAMERA = {k: tuple(t.shape) for k, t in inv.tiny("dit_fun_camera").items()}
UMT5 = {k: tuple(t.shape) for k, t in inv.tiny("umt5").items()}
HALF_CLIP = {
    k: tuple(1024 if n == 1280 else 3072 if n == 3840 else n for n in t.shape) for k, t in inv.tiny("clip_1280").items()
}
REFUSED = {
    "a 5B model of 96 channels": (
        {k: t.shape for k, t in inv.tiny("dit_ti2v_5b").items()} | {"patch_embedding.weight": (256, 96, 1, 2, 2)},
        "96 input and 48 output channels without",
    ),
    "a camera adapter of another stride": (
        {k: tuple(t.shape) for k, t in inv.tiny("dit_fun_a14b_camera").items()}
        | {"control_adapter.conv.weight": (256, 6144, 2, 2)},
        "reads 6144 camera channels per latent cell; Wan 2.1 has 24 for each of 8 x 8 pixels, 1536 in all",
    ),
    "a VAE of 24 channels": (inv.vae(16, 24), "has 24 latent channels; Wan VAEs have 16 .Wan 2.1. and 48 .Wan 2.2"),
    "a VAE of both kinds": (inv.vae(16, 48), "has 48 latent channels, reads 3 channels and .* in one row"),
    "Wan 2.2 Animate": (I2V | {"face_adapter.fuser_blocks.0.k_norm.weight": (4,)}, "Wan 2.2 Animate"),
    "Wan 2.2 S2V": (T2V | {"casual_audio_encoder.weights": (4,)}, "Wan 2.2 S2V"),
    "camera without adapter": (without(CAMERA, "control_adapter"), r"lacks 'control_adapter\.conv\.weight'"),
    "20 channels": (T2V | {"patch_embedding.weight": (256, 20, 1, 2, 2)}, "20 input and 16 output channels without"),
    "images on 16": (I2V | {"patch_embedding.weight": (256, 16, 1, 2, 2)}, "16 input and 16 output channels with i"),
    "odd width": ({k: tuple(200 if n == 256 else n for n in s) for k, s in T2V.items()}, "width 200"),
    "T5": (without(UMT5, r"blocks\.[1-9]\.pos_embedding"), "is T5"),
    "CLIP ViT-L": (HALF_CLIP, "width 1024; Wan 2.1 needs CLIP ViT-H/14"),
    "VACE blocks outnumber": (
        without({k: t.shape for k, t in inv.tiny("dit_vace").items()}, r"^blocks\.[1-9]"), "cannot carry 2 VACE blocks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_relatives_are_refused_by_name(name):
    shapes, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message):
        detect(header(shapes, file="given.safetensors"))


@pytest.mark.parametrize(("name", "guess"), [
    ("double_blocks.0.img_attn.qkv.weight", "FLUX"),
    ("model.diffusion_model.input_blocks.0.0.weight", "Stable Diffusion UNet"),
    ("model.layers.0.self_attn.q_proj.weight", "language model"),
    ("visual.transformer.resblocks.0.attn.in_proj_weight", "OpenCLIP"),
    ("transformer_blocks.0.attn1.to_q.weight", "diffusers transformer"),
    ("decoder.mid_block.resnets.0.norm1.weight", "VAE of an image model"),
    ("weights", "no known other model"),
])  # fmt: skip
def test_unknown_files(name, guess):
    head = header({name: (2, 2), "second": (1,)}, file="mystery.safetensors")
    with pytest.raises(CheckpointError, match=guess) as error:
        detect(head)
    for part in ("mystery.safetensors", "2 tensors", name, fingerprint(head)):
        assert part in str(error.value)


LORA_NAMES = (
    "blocks.0.self_attn.q.lora_A.default.weight", "base_model.model.blocks.0.self_attn.q.lora_A.weight",
    "transformer.blocks.0.attn1.to_q.lora_B.weight", "diffusion_model.blocks.0.self_attn.q.lora_down.weight",
    "lora_unet__blocks_0_self_attn_q.lora_up.weight", "diffusion_model.head.head.diff",
    "diffusion_model.blocks.0.ffn.0.diff_b",
    "lycoris_blocks_0_self_attn_q.hada_w1_a", "lycoris_blocks_0_self_attn_q.lokr_w1",
    "blocks.0.self_attn.q.dora_scale", "transformer.blocks.0.attn1.to_q.lora.down.weight",
    "transformer.blocks.0.attn1.to_q.lora_linear_layer.up.weight", "blocks.0.self_attn.q.lora_magnitude_vector",
)  # fmt: skip


@pytest.mark.parametrize("name", LORA_NAMES)
def test_loras(name):
    component = detect(header({name: (4, 8)}, file="style.safetensors"))
    assert component.kind == "lora" and component.config is None
    with pytest.raises(CheckpointError, match="is a LoRA, but the model loader needs a Wan DiT; use the LoRA"):
        require_kind(component, "dit")


SAMPLES = {
    "dit": inv.tiny("dit_t2v"), "vace": {k: t for k, t in inv.tiny("dit_vace").items() if k.startswith("vace_")},
    "vae": inv.tiny("vae"), "text_encoder": inv.tiny("umt5"), "image_encoder": inv.tiny("clip_1280"),
    "motion_controller": inv.tiny("motion_controller"),
}  # fmt: skip


@pytest.mark.parametrize("given", SAMPLES)
@pytest.mark.parametrize("wanted", [*SAMPLES, "lora"])
def test_wrong_kinds(given, wanted):
    component = detect(header({k: t.shape for k, t in SAMPLES[given].items()}, file="given.safetensors"))
    assert component.kind == given
    if given == wanted:
        assert require_kind(component, (wanted,)) is component
    else:
        with pytest.raises(CheckpointError, match=r"^given\.safetensors is .+, but the .+ needs .+; use the .+\.$"):
            require_kind(component, wanted)


def test_wrong_kind_in_words():
    component = detect(header(inv.vae(8), file="wan_vae.safetensors"))
    with pytest.raises(CheckpointError) as error:
        require_kind(component, ("dit", "vace"))
    assert str(error.value) == (
        "wan_vae.safetensors is a Wan VAE, but the model loader needs a Wan DiT or a VACE branch; use the VAE loader."
    )


@pytest.mark.parametrize(("size", "count"), [("S", 15), ("L", 8)])
def test_vace_branch_and_base_make_the_whole(size, count):
    whole = inv.dit({"S": "VACE-1.3B", "L": "VACE-14B"}[size])
    base = detect(header({k: v for k, v in whole.items() if not k.startswith("vace_")}, file="t2v.safetensors"))
    branch = detect(header({k: v for k, v in whole.items() if k.startswith("vace_")}, file="vace.safetensors"))
    assert branch.kind == "vace" and len(branch.config.vace_layers) == count
    joined = join_vace(base, branch)
    assert joined.config == detect(header(whole)).config and len(joined.header.files) == 2
    check_against(joined, module_for(joined))
    with pytest.raises(CheckpointError, match="not a plain text-to-video"):
        join_vace(detect(header(inv.dit("Fun-1.3B-InP"))), branch)
    with pytest.raises(CheckpointError, match="do not mix"):
        join_vace(detect(header(inv.dit("T2V-14B" if size == "S" else "T2V-1.3B"))), branch)


def test_vace_layers():
    assert vace_layers(30, 15) == VACE_S and vace_layers(40, 8) == VACE_L and vace_layers(30, 0) == ()


@pytest.mark.parametrize("extra", [{"a.weight_scale_2": ()}, {"a.pre_quant_scale": ()}, {"a.weight.absmax": (9,)}])
def test_unsupported_quantisation(extra):
    with pytest.raises(CheckpointError, match="is quantised"):
        detect(header(T2V | extra))


def test_quantisation_metadata():
    def head(value):
        return header(T2V, _quantization_metadata=f'{{"layers": {{"blocks.0.ffn.0": {{"format": "{value}"}}}}}}')

    assert detect(head("float8_e4m3fn")).kind == "dit"
    with pytest.raises(CheckpointError, match=r"stores 'blocks\.0\.ffn\.0' as nvfp4"):
        detect(head("nvfp4"))
    with pytest.raises(CheckpointError, match="unreadable quantisation metadata"):
        detect(header(T2V, _quantization_metadata="{"))


@pytest.mark.parametrize(("scale", "dtype"), [((512, 8), torch.bfloat16), ((), torch.uint8)])
def test_scales_that_are_not_per_tensor_or_row(scale, dtype):
    shapes = T2V | {"blocks.0.ffn.0.weight_scale": scale}
    with pytest.raises(CheckpointError, match=r"not supported: 'blocks\.0\.ffn\.0\.weight'|as uint8 with no scale"):
        detect(header(shapes, dtype))
