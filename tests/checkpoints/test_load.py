"""Filling modules: dtypes, refusals before reading, and what it costs in memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from wancore.wan_core.checkpoints import load as load_module
from wancore.wan_core.checkpoints.detect import detect, detect_files
from wancore.wan_core.checkpoints.header import CheckpointError
from wancore.wan_core.checkpoints.load import build, load_into

from . import inventories as inv

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dit(tmp_path):
    save_file(inv.tiny("dit_t2v"), tmp_path / "dit.safetensors")
    return tmp_path / "dit.safetensors"


def test_float32_parameters_stay_exact(dit):
    module = build(detect_files(dit), dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in module.named_parameters()}
    assert {d for n, d in dtypes.items() if n.endswith("modulation")} == {torch.float32}
    assert {d for n, d in dtypes.items() if not n.endswith("modulation")} == {torch.bfloat16}
    torch.testing.assert_close(module.head.modulation.data, inv.tiny("dit_t2v")["head.modulation"], rtol=0, atol=0)


def test_the_file_can_change_after_loading(dit):
    module = build(detect_files(dit), dtype=None)
    before = module.blocks[0].ffn[0].weight.clone()
    with dit.open("r+b") as stream:
        stream.seek(dit.stat().st_size // 2)
        stream.write(b"\xff" * 4096)
    dit.unlink()
    assert torch.equal(module.blocks[0].ffn[0].weight, before)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_parameter_is_on_the_device(dit, device):
    module = build(detect_files(dit), dtype=torch.float16, device=device)
    assert {p.device.type for p in module.parameters()} == {device}


def test_misfits_are_found_before_weights_are_read(tmp_path, monkeypatch):
    tensors = inv.tiny("vae")
    del tensors["encoder.downsamples.5.time_conv.bias"]
    save_file(tensors, tmp_path / "vae.safetensors")
    component = detect_files(tmp_path)
    monkeypatch.setattr(load_module, "TensorFiles", lambda header: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError, match=r"1 missing: encoder\.downsamples\.5\.time_conv\.bias"):
        build(component, dtype=None)


@pytest.mark.parametrize("name", ["style.lora_A.weight", "vace"])
def test_what_cannot_stand_alone(name):
    shapes = {name: (4, 8)} if name != "vace" else {k: v for k, v in inv.dit("VACE-1.3B").items() if k[:4] == "vace"}
    with pytest.raises(CheckpointError, match="but the model loader needs"):
        build(detect(inv.header(shapes)), dtype=None)


def test_a_module_that_makes_unsaved_buffers_on_meta(tmp_path):
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Sequential(*(nn.Linear(2, 2) if i % 2 == 0 else nn.SiLU() for i in range(5)))
            self.register_buffer("table", torch.ones(2), persistent=False)

    with torch.device("meta"):
        module = Buffered()
    save_file({k: torch.ones(t.shape) for k, t in module.state_dict().items()}, tmp_path / "a.safetensors")
    with pytest.raises(AssertionError, match="Buffered makes buffers that are not stored on the meta device: table"):
        load_into(module, detect_files(tmp_path), None)


def test_stored_buffers_are_filled(tmp_path):
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Sequential(*(nn.Linear(2, 2) if i % 2 == 0 else nn.SiLU() for i in range(5)))
            weight = self.linear[2].weight.data
            del self.linear[2].weight
            self.linear[2].register_buffer("weight", weight)

    with torch.device("meta"):
        module = Buffered()
    save_file({k: torch.ones(t.shape) for k, t in module.state_dict().items()}, tmp_path / "a.safetensors")
    load_into(module, detect_files(tmp_path), torch.float16)
    assert torch.equal(module.linear[2].weight, torch.ones(2, 2).half())
    assert "weight" in dict(module.linear[2].named_buffers())


MEASURE = """
import sys
from pathlib import Path
import torch

import wan_core.checkpoints.load as load
from wan_core.checkpoints.detect import detect_files

torch.set_num_threads(1)

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

component = detect_files(sys.argv[1])
before = peak()
module = load.build(component, dtype=getattr(torch, sys.argv[2]) if sys.argv[2] != "None" else None)
size = sum(p.numel() * p.element_size() for p in module.parameters())
print(peak() - before, size)
"""


def medium_dit(blocks: int) -> inv.Shapes:
    """The names of T2V-1.3B at width 1024, with fewer blocks."""
    widths = {1536: 1024, 8960: 8192, 6 * 1536: 6 * 1024}
    whole = inv.dit("T2V-1.3B")
    kept = (n for n in whole if not n.startswith("blocks.") or int(n.split(".")[1]) < blocks)
    return {name: tuple(widths.get(size, size) for size in whole[name]) for name in kept}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's peak memory of a process")
@pytest.mark.parametrize(("stored", "asked", "suffix"), [
    (torch.bfloat16, "None", "safetensors"), (torch.float32, "bfloat16", "safetensors"),
    (torch.bfloat16, "None", "pth"),
])  # fmt: skip
def test_peak_memory_is_the_model_and_one_shard(tmp_path, stored, asked, suffix):
    shapes = list(medium_dit(12 if stored == torch.bfloat16 else 6).items())
    count = 6
    for i in range(count):
        shard = {k: torch.full(v, 0.5, dtype=stored) for k, v in shapes[i::count]}
        file = tmp_path / f"dit-0000{i + 1}-of-0000{count}.{suffix}"
        save_file(shard, file) if suffix == "safetensors" else torch.save(shard, file)
    largest = max(file.stat().st_size for file in tmp_path.iterdir())
    total = sum(file.stat().st_size for file in tmp_path.iterdir())
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), asked], cwd=ROOT, capture_output=True, text=True, check=True
    )
    extra, size = map(int, run.stdout.split())
    assert total > 600e6 and size == pytest.approx(total if asked == "None" else total / 2, rel=0.01)
    assert extra - size <= largest + 32e6, (
        f"{extra / 1e6:.0f} MB for {size / 1e6:.0f} MB in shards of {largest / 1e6:.0f}"
    )
