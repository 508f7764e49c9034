"""Every kind of adapter against PEFT's own merge; files that go to and fro between this library, PEFT and diffusers."""

import diffusers
import peft
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from tests.lora.fixtures import RANK, WRITERS, factors, linear_paths
from tests.lora.test_dialects import inputs, output, used, with_loras
from tests.reference import relative_error, tiny_dit
from wan_core.lora.apply import apply_loras
from wan_core.lora.convert import LoraFormat, convert
from wan_core.lora.patches import Hadamard, Kronecker, LowRank
from wan_core.lora.target import MODEL_BLOCKS, Target, use_lora

EXACT = LoraFormat(dtype="fp32")
TARGETS = r".*blocks\.\d+\.(self_attn|cross_attn)\.[qkvo]|.*blocks\.\d+\.ffn\.[02]"

CONFIGS = {
    "LoRA": peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "rank-stabilised": peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS),
    "by pattern": peft.LoraConfig(
        r=4, lora_alpha=6, rank_pattern={"ffn.0": 2}, alpha_pattern={"self_attn.q": 1}, target_modules=TARGETS
    ),
    "LoRA with bias": peft.LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=TARGETS),
    "DoRA": peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=TARGETS),
    "LoHa": peft.LoHaConfig(r=4, alpha=6, target_modules=TARGETS),
    "LoKr": peft.LoKrConfig(r=4, alpha=6, target_modules=TARGETS),
    "LoKr, both decomposed": peft.LoKrConfig(r=2, alpha=6, decompose_both=True, target_modules=TARGETS),
    "trained biases": peft.LoraConfig(r=4, bias="lora_only", target_modules=TARGETS),
    "whole modules": peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["head.head"]),
}


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    """`model` with every adapter weight drawn at random, as if it had been trained."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.requires_grad and "magnitude" in name:
            p.mul_(1 + 0.2 * torch.rand(p.shape, generator=generator))
        elif p.requires_grad:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("mode", ["fold", "side"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_peft_writes_gives_what_peft_merges(tmp_path, kind, mode):
    theirs = shaken(peft.get_peft_model(tiny_dit("t2v"), CONFIGS[kind]))
    theirs.save_pretrained(tmp_path)
    expected = output(theirs.merge_and_unload())
    dit = tiny_dit("t2v")
    base = output(dit)
    use = used(tmp_path / "adapter_model.safetensors", dit, mode=mode)
    assert relative_error(with_loras(dit, use), expected) < 2e-6
    assert relative_error(base, expected) > 0.01
    assert torch.equal(output(dit), base)


@pytest.mark.parametrize("kind", ["DoRA", "LoHa", "LoKr"])
@pytest.mark.parametrize("names", ["comfyui", "kohya"])
def test_other_kinds_survive_conversion(tmp_path, kind, names):
    theirs = shaken(peft.get_peft_model(tiny_dit("t2v"), CONFIGS[kind]))
    theirs.save_pretrained(tmp_path)
    expected = output(theirs.merge_and_unload())
    converted = tmp_path / "converted.safetensors"
    convert([(tmp_path / "adapter_model.safetensors", 1.0)], converted, LoraFormat(names, "fp32"))
    dit = tiny_dit("t2v")
    assert relative_error(with_loras(dit, used(converted, dit)), expected) < 2e-6


@torch.no_grad()
def test_dora_by_column(tmp_path):
    """Older LyCORIS files rescale the columns: a magnitude of shape (1, in)."""
    dit, path = tiny_dit("t2v"), "blocks.0.ffn.0"
    down, up = factors(dit, [path])[path]
    weight = dit.get_submodule(path).weight
    magnitude = torch.rand(1, weight.shape[1]) + 0.5
    key = f"lycoris_{path.replace('.', '_')}"
    stored = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.dora_scale": magnitude}
    save_file(stored, tmp_path / "lora.safetensors")
    changed = tiny_dit("t2v")
    moved = weight + up @ down
    changed.get_submodule(path).weight.copy_(moved * magnitude / moved.norm(dim=0, keepdim=True))
    for mode in ("fold", "side"):
        use = used(tmp_path / "lora.safetensors", dit, mode=mode)
        assert relative_error(with_loras(dit, use), output(changed)) < 2e-6


@torch.no_grad()
def test_tucker_cores_of_convolutions(tmp_path):
    dit = tiny_dit("t2v")
    weight = dit.patch_embedding.weight
    rows, columns, *kernel = weight.shape
    down, up = torch.randn(RANK, columns, 1, 1, 1), torch.randn(rows, RANK, 1, 1, 1)
    core = torch.randn(RANK, RANK, *kernel)
    key = "diffusion_model.patch_embedding"
    stored = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.lora_mid.weight": core}
    save_file(stored, tmp_path / "lora.safetensors")
    delta = torch.einsum("op,pqtyx,qi->oityx", up.flatten(1), core, down.flatten(1))
    before = weight.clone()
    with apply_loras([dit], [used(tmp_path / "lora.safetensors", dit)], MODEL_BLOCKS):
        assert relative_error(dit.patch_embedding.weight, before + delta) < 1e-6


@pytest.mark.parametrize("source", ["kohya", "diffusers", "DiffSynth", "VideoX-Fun"])
@pytest.mark.parametrize("names", ["comfyui", "diffsynth", "kohya", "diffusers"])
def test_conversion_keeps_the_change(tmp_path, source, names):
    dit = tiny_dit("i2v")
    made = factors(dit, linear_paths(dit))
    save_file(WRITERS[source](made), tmp_path / "source.safetensors")
    out = tmp_path / "new" / "out.safetensors"
    saved = convert([(tmp_path / "source.safetensors", 1.0)], out, LoraFormat(names, "fp32"))
    assert (saved.patches, saved.error, saved.ranks) == (len(made), 0, (RANK,))
    expected = with_loras(dit, used(tmp_path / "source.safetensors", dit))
    assert relative_error(with_loras(dit, used(out, dit)), expected) < 1e-6
    sample = {
        "comfyui": "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        "diffsynth": "blocks.0.self_attn.q.lora_A.default.weight",
        "kohya": "lora_unet_blocks_0_self_attn_q.lora_down.weight",
        "diffusers": "transformer.blocks.0.attn1.to_q.lora_A.weight",
    }
    assert sample[names] in load_file(out)


def diffusers_transformer(dit: nn.Module) -> nn.Module:
    """diffusers' own model with the weights of `dit`."""
    c = dit.config
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=c.num_heads, attention_head_dim=128, in_channels=c.in_channels, text_dim=c.text_dim,
        freq_dim=c.freq_dim, ffn_dim=c.ffn_dim, num_layers=c.num_layers,
        image_dim=c.image_dim if c.has_image_input else None,
        added_kv_proj_dim=c.dim if c.has_image_input else None,
    )  # fmt: skip
    weights = convert_wan_transformer_to_diffusers({k: v.clone() for k, v in dit.state_dict().items()})
    model.load_state_dict(weights, strict=True)
    return model.eval()


@pytest.mark.parametrize("variant", ["t2v", "i2v"])
@pytest.mark.parametrize("names", ["comfyui", "diffusers", "kohya"])
@torch.no_grad()
def test_diffusers_loads_what_is_written(tmp_path, names, variant):
    """Through the loader of diffusers' pipeline; its own fusing gives the weights to compare with."""
    dit = tiny_dit(variant)
    made = factors(dit, [p for p in linear_paths(dit) if p.startswith("blocks.")])
    save_file(WRITERS["kohya"](made), tmp_path / "source.safetensors")
    out = tmp_path / "out.safetensors"
    convert([(tmp_path / "source.safetensors", 1.0)], out, LoraFormat(names, "fp32"))
    model = diffusers_transformer(dit)
    loader = diffusers.WanPipeline if variant == "t2v" else diffusers.WanImageToVideoPipeline
    state = loader.lora_state_dict(str(tmp_path), weight_name="out.safetensors")
    loader.load_lora_into_transformer(state, model)
    model.fuse_lora()
    fused = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora_" not in k}
    with apply_loras([dit], [used(out, dit, mode="fold")], MODEL_BLOCKS):
        expected = convert_wan_transformer_to_diffusers({k: v.clone() for k, v in dit.state_dict().items()})
    assert fused.keys() == expected.keys()
    assert max(relative_error(fused[k], expected[k]) for k in expected) < 1e-6
    plain = diffusers_transformer(tiny_dit(variant)).state_dict()
    assert sum(not torch.equal(plain[k], fused[k]) for k in plain) == len(made)


@torch.no_grad()
def test_peft_loads_what_is_written(tmp_path):
    dit = tiny_dit("t2v")
    made = factors(dit, linear_paths(dit))
    save_file(WRITERS["kohya"](made), tmp_path / "source.safetensors")
    convert([(tmp_path / "source.safetensors", 1.0)], tmp_path / "adapter", LoraFormat("peft", "fp32"))
    theirs = peft.PeftModel.from_pretrained(tiny_dit("t2v"), str(tmp_path / "adapter")).merge_and_unload()
    expected = with_loras(dit, used(tmp_path / "source.safetensors", dit))
    assert relative_error(output(theirs), expected) < 1e-6
    again = used(tmp_path / "adapter" / "adapter_model.safetensors", dit)
    assert relative_error(with_loras(dit, again), expected) < 1e-6


@torch.no_grad()
def test_peft_reads_the_tensors_of_the_published_names(tmp_path):
    """The `diffusion_model.` file, its prefix taken off, through PEFT's own state dict loader."""
    dit = tiny_dit("t2v")
    made = factors(dit, [p for p in linear_paths(dit) if p.endswith("_attn.q")])
    save_file(WRITERS["DiffSynth"](made), tmp_path / "source.safetensors")
    convert([(tmp_path / "source.safetensors", 1.0)], tmp_path / "out.safetensors", EXACT)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(made))
    theirs = peft.get_peft_model(tiny_dit("t2v"), config)
    stored = load_file(tmp_path / "out.safetensors")
    stored = {key.replace("diffusion_model.", "base_model.model."): tensor for key, tensor in stored.items()}
    left = set_peft_model_state_dict(theirs, stored)
    assert not left.unexpected_keys
    expected = with_loras(dit, used(tmp_path / "out.safetensors", dit))
    assert relative_error(output(theirs.merge_and_unload()), expected) < 1e-6


def test_image_branch_of_what_peft_wrote_is_left_out_of_a_text_model(tmp_path):
    theirs = shaken(peft.get_peft_model(tiny_dit("i2v"), peft.LoraConfig(r=4, target_modules="all-linear")))
    theirs.save_pretrained(tmp_path)
    dit = tiny_dit("t2v")
    use = use_lora(tmp_path / "adapter_model.safetensors", Target.of_modules("tiny", [dit]))
    assert {s.reason for s in use.bound.skipped} == {"image branch, which this model does not have"}
    assert not torch.equal(with_loras(dit, use), output(dit))
    assert inputs(dit)[2].image_tokens is None


@pytest.mark.parametrize("shape", [(64, 48), (2048, 32)])
def test_norms_of_reports_are_those_of_the_changes(shape):
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    rows, columns = shape
    low = LowRank(draw(4, columns), draw(rows, 4), 0.3)
    hadamard = Hadamard(draw(rows, 3), draw(3, columns), draw(rows, 3), draw(3, columns), scale=0.3)
    kronecker = Kronecker(draw(rows // 8, columns // 4), draw(8, 4), 0.3)
    for patch, tolerance in ((low, 1e-5), (hadamard, 0.1), (kronecker, 1e-5)):
        assert patch.norm() == pytest.approx(patch.delta().norm().item(), rel=tolerance)
        x = draw(2, 5, columns)
        assert relative_error(patch.branch(x), x @ patch.delta().T) < 1e-5
