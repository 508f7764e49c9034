"""Converted model files: what is in them, that they load as they were made, and that nothing is lost or overwritten."""

import os
import subprocess

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.comfyui import comfyui
from tests.loading import inventories as inv
from tests.loading.test_fp8 import stored, velocity
from tests.reference import filled, relative_error, tiny_dit, tiny_text_encoder
from wan_core.loading import save as save_module
from wan_core.loading.detect import detect_files
from wan_core.loading.load import build, spiece_model
from wan_core.loading.save import save_plain, save_quantised
from wan_core.loading.tensor_files import CheckpointError
from wan_core.models.config import DiTConfig
from wan_core.models.dit import WanDiT
from wan_core.offload import formats
from wan_core.offload.quant import big_linears
from wancore.headless.cli import main


@pytest.fixture
def dit(tmp_path):
    save_file(tiny_dit("vace").bfloat16().state_dict(), tmp_path / "dit.safetensors")
    return detect_files(tmp_path / "dit.safetensors")


def test_a_saved_file_round_trips(dit, tmp_path):
    first = save_quantised(dit, tmp_path / "new" / "fp8.safetensors")
    component = detect_files(first)
    assert component.quantised.startswith("FP8, a scale per")
    module = build(component, dtype=torch.bfloat16)
    for path, layer in big_linears(module).items():
        weight, scale = formats.FP8.quantise(big_linears(tiny_dit("vace").bfloat16())[path].weight, per_row=False)
        assert torch.equal(layer.weight, weight) and torch.equal(layer.scale, scale)
    second = save_quantised(component, tmp_path / "again.safetensors")
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < 0.6 * dit.header.files[0].stat().st_size
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["again.safetensors", "dit.safetensors", "fp8.safetensors"]


def test_the_dialect_is_the_one_that_every_comfyui_reads(dit, tmp_path):
    path = save_quantised(dit, tmp_path / "fp8.safetensors")
    tensors = load_file(path)
    assert (tensors["scaled_fp8"].dtype, tensors["scaled_fp8"].shape) == (formats.FP8_MADE, (2,))
    scaled = {name.removesuffix(".scale_weight") for name in tensors if name.endswith(".scale_weight")}
    assert scaled == big_linears(tiny_dit("vace")).keys()
    assert all(tensors[f"{name}.scale_weight"].shape == () for name in scaled)
    assert {t.dtype for n, t in tensors.items() if n.removesuffix(".weight") not in scaled and "scale" not in n} == {
        torch.bfloat16
    }
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dialect", ["old", "plain"])
def test_fp8_numbers_with_one_scale_are_kept(tmp_path, dialect):
    save_file(stored(tiny_dit(), dialect), tmp_path / "a.safetensors")
    before = detect_files(tmp_path / "a.safetensors")
    after = detect_files(save_quantised(before, tmp_path / "b.safetensors"))
    ours, theirs = (big_linears(build(c, dtype=torch.bfloat16)) for c in (after, before))
    assert all(torch.equal(layer.dequantised(), theirs[path].dequantised()) for path, layer in ours.items())


def test_scales_per_row_become_one_scale(tmp_path):
    save_file(stored(tiny_dit(), "new", per_row=True), tmp_path / "a.safetensors")
    after = detect_files(save_quantised(detect_files(tmp_path / "a.safetensors"), tmp_path / "b.safetensors"))
    error = relative_error(velocity(build(after, dtype=torch.float32)), velocity(tiny_dit()))
    assert 0 < error < 0.06


@pytest.mark.parametrize("name", ["dit_i2v", "vae", "clip", "umt5", "motion_controller"])
def test_plain_conversion_of_a_pickle(tmp_path, name):
    torch.save(inv.tiny(name), tmp_path / "model.pth")
    component = detect_files(tmp_path / "model.pth")
    after = detect_files(save_plain(component, tmp_path / "model.safetensors", torch.float32))
    expected = build(component, dtype=None).state_dict()
    state = build(after, dtype=None).state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(t, expected[k]) for k, t in state.items())


def test_float32_parameters_keep_their_precision(tmp_path):
    save_file(tiny_dit().state_dict(), tmp_path / "a.safetensors")
    tensors = load_file(save_plain(detect_files(tmp_path), tmp_path / "b.safetensors", torch.bfloat16))
    assert {str(t.dtype) for n, t in tensors.items() if n.endswith("modulation")} == {"torch.float32"}
    assert {str(t.dtype) for n, t in tensors.items() if not n.endswith("modulation")} == {"torch.bfloat16"}


def test_shards_and_scaled_fp8_to_bfloat16(tmp_path):
    tensors = stored(tiny_dit(), "new", per_row=True)
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        save_file({n: tensors[n] for n in names}, tmp_path / f"dit-0000{i + 1}-of-00002.safetensors")
    component = detect_files(tmp_path)
    after = detect_files(save_plain(component, tmp_path / "one" / "b.safetensors", torch.bfloat16))
    state = build(component, dtype=torch.bfloat16, weights="plain").state_dict()
    assert after.quantised is None
    assert all(torch.equal(t, state[k].to(t.dtype)) for k, t in build(after, dtype=None).state_dict().items())


def test_a_text_encoder_takes_its_sentencepiece_model_along(tmp_path):
    folder = tmp_path / "google" / "umt5-xxl"
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(b"sentences")
    torch.save(dict(tiny_text_encoder().bfloat16().state_dict()), tmp_path / "t5.pth")
    component = detect_files(tmp_path / "t5.pth")
    after = detect_files(save_quantised(component, tmp_path / "new" / "t5.safetensors"))
    assert (after.layout, after.quantised, spiece_model(after.header)) == (
        "Hugging Face",
        "FP8, a scale per tensor",
        b"sentences",
    )
    assert spiece_model(detect_files(save_quantised(after, tmp_path / "t5.safetensors")).header) == b"sentences"
    fp8, same, plain = (
        build(c, dtype=torch.float32, weights=w) for c, w in ((after, "auto"), (after, "plain"), (component, "auto"))
    )
    original = big_linears(plain)
    assert all(relative_error(t.dequantised(), original[path].weight) < 0.04 for path, t in big_linears(fp8).items())
    ids = torch.arange(2, 9)[None]
    with torch.no_grad():
        assert relative_error(fp8(ids, torch.ones_like(ids)), same(ids, torch.ones_like(ids))) < 1e-5


def test_what_is_not_written(dit, tmp_path, monkeypatch):
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"mine")
    with pytest.raises(ValueError, match="exists already; nothing is overwritten"):
        save_quantised(dit, taken)
    with pytest.raises(ValueError, match=r"written as \.safetensors; got the name 'a\.pth'"):
        save_quantised(dit, tmp_path / "a.pth")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        save_quantised(dit, tmp_path / "file" / "a.safetensors")
    torch.save(inv.tiny("vae"), tmp_path / "vae.pth")
    with pytest.raises(ValueError, match=r"not written in FP8.*--dtype bf16"):
        save_quantised(detect_files(tmp_path / "vae.pth"), tmp_path / "a.safetensors")
    save_file({"diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="is a LoRA"):
        save_plain(detect_files(tmp_path / "lora.safetensors"), tmp_path / "a.safetensors", torch.bfloat16)
    monkeypatch.setattr(save_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"takes [\d.]+ [GM]B, but .* has [\d.]+ [GM]B left"):
        save_quantised(dit, tmp_path / "a.safetensors")
    assert taken.read_bytes() == b"mine" and not (tmp_path / "a.safetensors").exists()


def test_nothing_is_left_of_a_file_that_broke_off(dit, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_quantised(dit, tmp_path / "a.safetensors", stop)
    assert [p.name for p in tmp_path.iterdir()] == ["dit.safetensors"]


def test_a_source_that_shrinks_while_it_is_read(dit, tmp_path):
    file = dit.header.files[0]
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        save_plain(dit, tmp_path / "a.safetensors", torch.bfloat16)


def test_on_the_command_line(dit, tmp_path, capsys):
    out = tmp_path / "fp8.safetensors"
    assert main(["convert", str(dit.header.files[0]), "--fp8", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out} (6.1 MB)")
    assert detect_files(out).quantised == "FP8, a scale per tensor"
    assert main(["convert", str(out), str(tmp_path / "b.safetensors"), "--dtype", "bf16"]) == 0
    assert detect_files(tmp_path / "b.safetensors").quantised is None
    assert main(["convert", str(out), "--fp8", str(out)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", str(out), str(tmp_path / "c.safetensors")])


HOST = """
import sys
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch, comfy.ops, comfy.sd
from safetensors.torch import load_file, save_file
from comfy.text_encoders.wan import UMT5XXlModel

folder = {folder!r}
model = comfy.sd.load_diffusion_model(f"{{folder}}/fp8.safetensors").model.diffusion_model
layer = model.blocks[0].ffn[0]
x = load_file(f"{{folder}}/x.safetensors")["x"]
with torch.no_grad():
    out = {{"few": layer(x[:, :2]).float(), "many": layer(x).float(), "scale": layer.scale_weight.float().reshape(1),
           "weight": layer.weight.float()}}
save_file(out, f"{{folder}}/out.safetensors")
clip = UMT5XXlModel(device="meta", model_options={{"scaled_fp8": torch.float8_e4m3fn}})
print("\\n".join(clip.transformer.state_dict()))
"""


@pytest.mark.comfyui
def test_a_real_comfyui_computes_with_the_file(tmp_path):
    comfy = comfyui()
    # ComfyUI fixes the widths of text and time that the tiny models have smaller.
    plain = filled(WanDiT, DiTConfig(dim=256, ffn_dim=512, num_layers=2)).bfloat16()
    save_file(plain.state_dict(), tmp_path / "dit.safetensors")
    save_quantised(detect_files(tmp_path / "dit.safetensors"), tmp_path / "fp8.safetensors")
    x = torch.randn(1, 4096, 256, generator=torch.Generator().manual_seed(0))
    save_file({"x": x}, tmp_path / "x.safetensors")
    host = [comfy.python, "-c", HOST.format(folder=str(tmp_path))]
    run = subprocess.run(host, cwd=comfy.folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    theirs = load_file(tmp_path / "out.safetensors")
    layer = build(detect_files(tmp_path / "fp8.safetensors"), dtype=torch.float32).blocks[0].ffn[0]
    assert torch.equal(theirs["weight"], layer.weight.float()) and torch.equal(theirs["scale"], layer.scale.reshape(1))
    for name, given in (("few", x[:, :2]), ("many", x)):
        assert relative_error(theirs[name], layer(given)) < 0.01
        assert relative_error(theirs[name], plain.float().blocks[0].ffn[0](given)) < 0.04
    wanted = {name for name in run.stdout.split() if "." in name and not name.endswith("scale_weight")}
    names = {save_module._stored_name(detected_umt5(), name) for name in inv.umt5()}
    assert names == wanted - {"encoder.embed_tokens.weight"}


def detected_umt5():
    return save_module.Component(
        kind="text_encoder", layout="original", config=None, sources={}, header=inv.header({}), dtype=torch.bfloat16
    )
