"""Files that are whole are read, or named for what they are: all-in-one files, wrappers, relatives, adapters."""

import pytest
import torch
from safetensors.torch import save_file

from tests.loading import inventories as inv
from tests.loading.inventories import header
from wan_core.inspection import report
from wan_core.loading.detect import detect, detect_all, detect_files
from wan_core.loading.load import inspect
from wan_core.loading.names import strip_prefix
from wan_core.loading.tensor_files import CheckpointError

PARTS = {
    "dit": ("model.diffusion_model.", inv.tiny("dit_t2v")),
    "text_encoder": ("text_encoders.umt5xxl.transformer.", inv.tiny("umt5")),
    "vae": ("vae.", inv.tiny("vae")),
}


def joined(*kinds):
    return {f"{PARTS[kind][0]}{k}": t.contiguous() for kind in kinds for k, t in PARTS[kind][1].items()}


@pytest.mark.parametrize("kinds", [("dit", "text_encoder", "vae"), ("vae", "dit"), ("text_encoder", "vae")])
def test_each_loader_reads_its_part_of_an_all_in_one_file(kinds, tmp_path):
    file = tmp_path / "all.safetensors"
    save_file(joined(*kinds), file)
    text = str(report(file))
    assert text.count("kind ") == len(kinds)
    for kind in PARTS:
        if kind not in kinds:
            with pytest.raises(CheckpointError, match=r"^all\.safetensors holds a .+ and a .+, but no "):
                inspect(file, kind)
            continue
        component = inspect(file, kind)
        assert component.kind == kind and len(component.header) == len(PARTS[kind][1])
        assert {name: source.names for name, source in component.sources.items()} == {
            name: (PARTS[kind][0] + name,) for name in PARTS[kind][1]
        }
    assert detect_files(file).kind == next(kind for kind in PARTS if kind in kinds)


def test_what_is_no_part_of_wan_is_named_by_its_own_loader(tmp_path):
    shapes = {f"model.diffusion_model.double_blocks.{i}.img_attn.qkv.weight": (2, 2) for i in range(3)}
    shapes |= {f"vae.{k}": tuple(t.shape) for k, t in inv.tiny("vae").items()}
    head = header(shapes, file="flux.safetensors")
    assert [component.kind for component in detect_all(head)] == ["vae"]
    with pytest.raises(CheckpointError, match="FLUX"):
        detect(head, ("dit",))


WRAPPED = {
    "Self-Forcing": lambda d: {"generator_ema": {f"model.{k}": t for k, t in d.items()}, "generator": {"x": ZERO}},
    "CausVid": lambda d: {"generator": {f"model._fsdp_wrapped_module.{k}": t for k, t in d.items()}, "critic": {}},
    "Lightning": lambda d: {"state_dict": {f"pipe.dit.{k}": t for k, t in d.items()}, "epoch": 3},
    "DeepSpeed": lambda d: {"module": {f"module.{k}": t for k, t in d.items()}, "optimizer": None},
    "averaged": lambda d: {"model": {"x": ZERO}, "ema": d, "step": 1},
    "an average without weights": lambda d: {"ema": {"decay": 0.9}, "model": d},
    "checkpointed blocks": lambda d: {
        "model": {k.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): t for k, t in d.items()}
    },
    "nested": lambda d: {"state_dict": {"model": {f"_orig_mod.{k}": t for k, t in d.items()}}},
}
ZERO = torch.zeros(1)


@pytest.mark.parametrize("name", WRAPPED)
def test_training_checkpoints_are_unwrapped(name, tmp_path):
    tensors = PARTS["dit"][1]
    torch.save(WRAPPED[name](tensors), tmp_path / "model.pt")
    component = inspect(tmp_path / "model.pt", "dit")
    assert component.sources.keys() == tensors.keys()


@pytest.mark.parametrize("content", [
    {"state": {0: {"exp_avg": ZERO}}, "param_groups": []},
    {"optimizer_state_dict": {"x": 1}}, {"optimizer": {"x": 1}, "scheduler": {}},
])  # fmt: skip
def test_the_state_of_an_optimizer_is_named(content, tmp_path):
    torch.save(content, tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match="is the state of an optimizer"):
        detect_files(tmp_path / "optimizer.pt")


def test_wrappers_in_the_middle_of_names():
    names = ["model._fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module._orig_mod.ffn.0.weight"]
    assert strip_prefix(names) == {"blocks.0.ffn.0.weight": names[0]}


FAMILIES = {
    "transformer_blocks.0.attn1.to_q.weight patchify_proj.weight": "LTX-Video",
    "double_blocks.0.img_mod.lin.weight txt_in.individual_token_refiner.blocks.0.norm1.weight": "HunyuanVideo",
    "model.diffusion_model.input_blocks.0.0.weight": "Stable Diffusion UNet",
    "transformer_blocks.0.img_mod.1.weight img_in.weight": "Qwen-Image",
    "transformer_blocks.0.attn1.to_q.weight patch_embed.proj.weight": "CogVideoX",
    "layers.0.attention.to_q.weight cap_embedder.0.weight": "Lumina",
    "lora_unet_blocks_0_ffn_0.oft_blocks lora_unet_blocks_0_ffn_0.alpha": "OFT",
    "diffusion_model.blocks.0.ffn.0.ia3_l.weight": "IA3",
    "control_blocks.0.weight controlnet_x_embedder.weight": "ControlNet",
}


@pytest.mark.parametrize("names", FAMILIES)
def test_other_families_are_named(names):
    with pytest.raises(CheckpointError, match=FAMILIES[names]) as error:
        detect(header({name: (2, 2) for name in names.split()}, file="mystery.safetensors"))
    assert "incomplete" not in str(error.value) and "damaged" not in str(error.value)


def test_a_layer_that_is_stored_in_another_way_is_not_missing():
    shapes = {k: tuple(t.shape) for k, t in PARTS["dit"][1].items()}
    for layer in ("blocks.0.ffn.0", "blocks.1.ffn.0"):
        shapes[f"{layer}.weight_q5"] = shapes.pop(f"{layer}.weight")
    with pytest.raises(CheckpointError, match=r"weight_q5. in place of") as error:
        detect(header(shapes))
    assert "incomplete" not in str(error.value)
