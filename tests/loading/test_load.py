"""Filling modules: dtypes, refusals before reading, and what it costs in memory."""

from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests import fork_server
from tests.loading import inventories as inv
from wan_core import model_files as model
from wan_core.loading import load as load_module
from wan_core.loading.detect import detect, detect_files
from wan_core.loading.load import build, load_into
from wan_core.loading.tensor_files import CheckpointError


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


@pytest.mark.parametrize(
    ("load", "kind", "loader"),
    [
        (lambda part: model.load_dit(part, model.DiTSettings(), "cpu"), "vae", "VAE loader"),
        (lambda part: model.load_vae(part, torch.float32, "cpu"), "dit_t2v", "model loader"),
        (lambda part: model.load_image_encoder(part, torch.float32, "cpu"), "dit_t2v", "model loader"),
        (lambda part: model.load_text_encoder(part, None, torch.float32, "cpu"), "vae", "VAE loader"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_every_loader(tmp_path, load, kind, loader):
    save_file(inv.tiny(kind), tmp_path / "other.safetensors")
    component = detect_files(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=f"other.safetensors is .*use the {loader}"):
        load(component)


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


MEMORY = """
import ctypes
import sys
from pathlib import Path
import torch

import wan_core.loading.load as load
from wan_core.loading.detect import detect_files

torch.set_num_threads(1)
# What is freed goes back to the system at once: M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h.
assert ctypes.CDLL(None).mallopt(-3, 65536) and ctypes.CDLL(None).mallopt(-1, 65536)

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024

component = detect_files(sys.argv[1])
"""

MEASURE = (
    MEMORY
    + """
dtype = getattr(torch, sys.argv[2]) if sys.argv[2] != "None" else None
# Pages of the libraries count as memory when they are first touched; how many come at once depends on the disk's cache.
load.build(detect_files(sys.argv[4]), dtype=dtype, weights=sys.argv[3])
before = memory("VmHWM")
module = load.build(component, dtype=dtype, weights=sys.argv[3])
size = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
print(memory("VmHWM") - before, size)
"""
)

REPEAT = (
    MEMORY
    + """
for i in range(20):
    load.build(component, dtype=None)
    print(memory("VmRSS"))
"""
)

MAPPED = (
    MEMORY
    + """
before = memory("RssAnon")
module = load.build(component, dtype=torch.bfloat16, mapped=True)
inside = [p for n, p in module.named_parameters() if n.startswith("blocks.")]
total = sum(float(p.flatten()[0]) for p in inside)
print(memory("RssAnon") - before, sum(p.nbytes for p in module.parameters()) - sum(p.nbytes for p in inside))
"""
)


def run(script: str, *arguments: str) -> list[int]:
    """The numbers that `script` prints in a process of its own."""
    done = fork_server.run(["-c", script, *arguments])
    assert not done.returncode, done.stderr
    return list(map(int, done.stdout.split()))


def measure(folder: Path, dtype: str, weights: str) -> list[int]:
    """The most that loading `folder` adds to the memory of a process, and the size of what it loaded."""
    warm_up = folder.with_name(folder.name + "-warm-up.safetensors")
    save_file(inv.tiny("dit_t2v"), warm_up)
    return run(MEASURE, str(folder), dtype, weights, str(warm_up))


def medium_dit(blocks: int) -> inv.Shapes:
    """The names of T2V-14B at width 1024, with fewer blocks."""
    widths = {5120: 1024, 13824: 8192, 6 * 5120: 6 * 1024}
    whole = inv.dit("T2V-14B")
    kept = (n for n in whole if not n.startswith("blocks.") or int(n.split(".")[1]) < blocks)
    return {name: tuple(widths.get(size, size) for size in whole[name]) for name in kept}


def write_shards(folder: Path, shapes: inv.Shapes, dtype: torch.dtype, suffix: str = "safetensors") -> tuple[int, int]:
    """Weights in six files; the bytes of all of them and of the largest."""
    count = 6
    for i in range(count):
        shard = {k: torch.full(v, 0.5, dtype=dtype) for k, v in list(shapes.items())[i::count]}
        file = folder / f"dit-0000{i + 1}-of-0000{count}.{suffix}"
        save_file(shard, file) if suffix == "safetensors" else torch.save(shard, file)
    sizes = [file.stat().st_size for file in folder.iterdir()]
    return sum(sizes), max(sizes)


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's memory figures of a process"
)


@needs_proc
def test_shards_peak_at_their_stored_size(tmp_path):
    """What a process needs beside its weights weighs most where they are few."""
    total, _ = write_shards(tmp_path, medium_dit(10), torch.bfloat16)
    extra, size = measure(tmp_path, "bfloat16", "auto")
    assert total > 5e8 and size == pytest.approx(total, rel=0.01)
    assert extra <= 1.1 * total, f"{extra / 1e6:.0f} MB for {total / 1e6:.0f} MB"


@needs_proc
@pytest.mark.parametrize(("stored", "asked", "weights", "ratio"), [
    (torch.float32, "bfloat16", "auto", 0.5), (torch.bfloat16, "bfloat16", "fp8", 0.5),
    (torch.float32, "bfloat16", "fp8", 0.25),
])  # fmt: skip
def test_converted_weights_cost_one_tensor_more(tmp_path, stored, asked, weights, ratio):
    shapes = medium_dit(6)
    total, _ = write_shards(tmp_path, shapes, stored)
    extra, size = measure(tmp_path, asked, weights)
    largest = 4 * max(map(prod, shapes.values()))
    assert size == pytest.approx(ratio * total, rel=0.1)
    assert extra <= size + largest + 24e6, f"{extra / 1e6:.0f} MB for {size / 1e6:.0f} MB"


@needs_proc
def test_a_pickle_peaks_at_the_model_and_one_shard(tmp_path):
    total, largest = write_shards(tmp_path, medium_dit(6), torch.bfloat16, "pth")
    extra, size = measure(tmp_path, "None", "auto")
    assert size == pytest.approx(total, rel=0.01)
    assert extra - size <= largest + 32e6, f"{extra / 1e6:.0f} MB for {size / 1e6:.0f} MB"


@needs_proc
def test_memory_is_flat_over_twenty_loads(tmp_path):
    total, _ = write_shards(tmp_path, medium_dit(4), torch.bfloat16)
    resident = run(REPEAT, str(tmp_path))
    # The C allocator keeps some of what it was given back and uses it for the next load; a leak would add up.
    assert len(resident) == 20 and max(resident) - min(resident) < 1.1 * total
    assert abs(min(resident[-5:]) - min(resident[-10:-5])) < 0.1 * total


@needs_proc
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_mapped_weights_take_no_memory_of_the_process(tmp_path, suffix):
    total, _ = write_shards(tmp_path, medium_dit(4), torch.bfloat16, suffix)
    extra, outside = run(MAPPED, str(tmp_path))
    assert extra <= outside + 0.03 * total, f"{extra / 1e6:.0f} MB for {outside / 1e6:.0f} MB outside of blocks"
