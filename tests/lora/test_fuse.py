"""LoRAs fused into checkpoints by command, and reports that count what changes."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reference import relative_error, tiny_dit
from wan_core.loading.detect import detect_files
from wan_core.loading.load import build
from wan_core.loading.save import save_quantised
from wan_core.lora.bind import BlockStrengths
from wan_core.lora.convert import fuse
from wan_core.lora.target import Target, lora_file_report, lora_report, open_lora, use_lora
from wancore.headless.cli import main

LAYERS = ("blocks.0.ffn.0", "blocks.3.self_attn.q")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain model, one in FP8, and a LoRA that changes two layers and a bias."""
    root, draw = tmp_path_factory.mktemp("fuse"), torch.Generator().manual_seed(0)
    dit = tiny_dit().bfloat16()
    save_file(
        {f"model.diffusion_model.{k}": t.contiguous() for k, t in dit.state_dict().items()}, root / "m.safetensors"
    )
    save_quantised(detect_files(root / "m.safetensors"), root / "fp8.safetensors")
    tensors = {}
    for layer in LAYERS:
        out, width = dit.get_submodule(layer).weight.shape
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(4, width, generator=draw)
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(out, 4, generator=draw) * 0.01
    tensors["diffusion_model.blocks.0.ffn.0.diff_b"] = torch.ones(512)
    save_file(tensors, root / "l.safetensors")
    return root


def expected(base, lora, strength):
    weights = {name: tensor.float() for name, tensor in base.items()}
    for layer in LAYERS:
        down, up = (lora[f"diffusion_model.{layer}.lora_{side}.weight"] for side in "AB")
        weights[f"{layer}.weight"] += strength * up @ down
    weights["blocks.0.ffn.0.bias"] += strength
    return weights


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_a_plain_model_gets_the_sum(folder, tmp_path, strength, capsys):
    out = tmp_path / "fused.safetensors"
    file = f"{folder / 'l.safetensors'}={strength}"
    assert main(["lora", file, "--fuse", str(folder / "m.safetensors"), "--out", str(out)]) == 0
    assert "changes   3 parameters" in capsys.readouterr().out
    base = {k.removeprefix("model.diffusion_model."): t for k, t in load_file(folder / "m.safetensors").items()}
    wanted, got = expected(base, load_file(folder / "l.safetensors"), strength), load_file(out)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name].to(tensor.dtype)) for name, tensor in got.items())
    assert {name for name in got if not torch.equal(got[name], base[name])} == {
        *(f"{layer}.weight" for layer in LAYERS), "blocks.0.ffn.0.bias",
    }  # fmt: skip


def test_a_quantised_model_stays_quantised(folder, tmp_path):
    fuse([(folder / "l.safetensors", 1.0)], folder / "fp8.safetensors", tmp_path / "fused.safetensors")
    before, after = load_file(folder / "fp8.safetensors"), load_file(tmp_path / "fused.safetensors")
    changed = {name for name in after if not torch.equal(after[name].float(), before[name].float())}
    assert after.keys() == before.keys() and "scaled_fp8" in after
    assert {name.rpartition(".")[0] for name in changed} == set(LAYERS)
    component = detect_files(tmp_path / "fused.safetensors")
    assert component.quantised == "FP8, a scale per tensor"
    base = build(detect_files(folder / "fp8.safetensors"), dtype=torch.float32, weights="plain").state_dict()
    wanted = expected(base, load_file(folder / "l.safetensors"), 1.0)
    got = build(component, dtype=torch.float32, weights="plain").state_dict()
    assert all(relative_error(tensor, wanted[name]) < 0.04 for name, tensor in got.items())
    fuse([(folder / "l.safetensors", 1.0)], folder / "fp8.safetensors", tmp_path / "plain.safetensors", "fp32")
    plain = load_file(tmp_path / "plain.safetensors")
    assert all(relative_error(tensor, wanted[name]) < 1e-6 for name, tensor in plain.items())


def zeros(layer="blocks.0.ffn.0"):
    return {f"diffusion_model.{layer}.lora_A.weight": torch.ones(1, 256),
            f"diffusion_model.{layer}.lora_B.weight": torch.zeros(512, 1)}  # fmt: skip


@pytest.mark.parametrize(("tensors", "strength", "message"), [
    (zeros(), 1.0, "Nothing would change in m.safetensors"),
    (None, 0.0, "Nothing would change in m.safetensors"),
    (zeros("blocks.9.ffn.0"), 1.0, "Nothing in lora.safetensors matches"),
    ({"transformer.single_transformer_blocks.0.lora_A.weight": torch.ones(1, 8),
      "transformer.single_transformer_blocks.0.lora_B.weight": torch.ones(8, 1)}, 1.0, "FLUX"),
])  # fmt: skip
def test_what_changes_nothing_is_refused(folder, tmp_path, tensors, strength, message):
    file = folder / "l.safetensors"
    if tensors:
        save_file(tensors, file := tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=message):
        fuse([(file, strength)], folder / "m.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_flags_that_do_not_go_together(folder, capsys):
    for extra in ([], ["--out", "x.safetensors", "--rank", "4"], ["--out", "x.safetensors", "--base", "y"]):
        assert main(["lora", str(folder / "l.safetensors"), "--fuse", str(folder / "m.safetensors"), *extra]) == 2
        assert "--fuse takes LoRAs" in capsys.readouterr().err


def test_reports_count_what_changes(folder, tmp_path):
    target = Target.of_modules("tiny", [tiny_dit()])
    file = folder / "l.safetensors"

    def applied(**settings):
        use = use_lora(file, target, **settings)
        return len(lora_report(use, target).applied)

    assert applied() == 3 and len(lora_file_report(open_lora(file)).applied) == 3
    assert applied(blocks=BlockStrengths.parse("3")) == 1
    assert applied(strength=0.0) == 0
    weight = {"diffusion_model.blocks.0.ffn.0.diff": torch.ones(512, 256)}
    file = tmp_path / "twice.safetensors"
    save_file(load_file(folder / "l.safetensors") | weight | zeros("blocks.1.ffn.0"), file)
    use = use_lora(file, target)
    assert len(use.bound.patches) == 5 and applied() == 3
    assert "applied   3 parameters" in str(lora_report(use, target))
