"""How much a phase may use, and encoders within it."""

from dataclasses import replace

import pytest
import torch

from tests.reference import tiny_image_encoder, tiny_text_encoder
from wan_core.models.config import WAN_21
from wan_core.offload.weights import WeightProvider
from wan_core.planning import encoders
from wan_core.planning.encoders import checked_size, limit_memory, memory_for, working_encoder
from wan_core.runtime import GIB, Runtime
from wan_core.settings import MemorySettings

CPU = torch.device("cpu")
RUNTIME = Runtime(device=CPU, dtype=torch.float32)


def with_left(*left: float) -> tuple[Runtime, list[int]]:
    """A host that has `left[0]` bytes, and `left[1]` once it was asked to free some."""
    asked: list[int] = []
    return replace(RUNTIME, memory_left=lambda _: left[bool(asked)], free_memory=asked.append), asked


@pytest.mark.parametrize(
    ("left", "wanted", "expected", "asked"),
    [((100, 100), 80, 100, []), ((50, 120), 80, 120, [80]), ((50, 60), 80, 60, [80])],
)
def test_the_host_is_asked_only_for_what_is_missing(left, wanted, expected, asked):
    runtime, requests = with_left(*left)
    module = tiny_text_encoder()
    assert memory_for(module, runtime, MemorySettings(), wanted) == expected
    assert requests == asked


@pytest.mark.parametrize(("frames", "fits"), [(1, True), (81, True), (85, False), (10001, False)])
def test_a_video_that_the_machine_cannot_hold_is_refused(monkeypatch, frames, fits):
    monkeypatch.setattr(encoders, "installed_ram", lambda: 3 * 1280 * 720 * 81)
    if fits:
        assert checked_size(1280, 720, frames, WAN_21).num_frames == frames
    else:
        with pytest.raises(ValueError, match=rf"width 1280, height 720 and num_frames {frames} has .* GB; this mach"):
            checked_size(1280, 720, frames, WAN_21)


def test_a_limit_counts_what_others_use(monkeypatch):
    monkeypatch.setattr(encoders, "used_bytes", lambda device: 3 * GIB)
    assert limit_memory(RUNTIME, MemorySettings(vram_limit=8)).memory_left(CPU) == 5 * GIB
    less, _ = with_left(2 * GIB, 2 * GIB)
    assert limit_memory(less, MemorySettings(vram_limit=8)).memory_left(CPU) == 2 * GIB
    assert limit_memory(RUNTIME, MemorySettings()).memory_left(CPU) is None


def test_what_is_on_the_device_already_counts_as_available(monkeypatch):
    module = tiny_text_encoder()
    monkeypatch.setattr("wan_core.offload.weights.used_bytes", lambda device: 1)
    own = sum(p.nbytes for p in module.parameters())
    runtime, requests = with_left(10, 10)
    assert memory_for(module, runtime, MemorySettings(), own + 5) == own + 10
    assert not requests


@pytest.mark.parametrize("limit", [None, 0, 1e-4, 0.3])
def test_encoders_give_the_same_bits_when_they_are_streamed(limit):
    memory = MemorySettings(vram_limit=limit)
    images, ids = torch.rand(1, 3, 20, 30), torch.arange(1, 9)[None]
    passes = (
        (tiny_image_encoder(), lambda m: m(images)),
        (tiny_text_encoder(), lambda m: m(ids, torch.ones(1, 8, dtype=torch.long))),
    )
    with torch.no_grad():
        for module, run in passes:
            expected = run(module)
            with working_encoder(module, limit_memory(RUNTIME, memory), memory, 0):
                assert torch.equal(run(module), expected)
            streams = bool(WeightProvider.of(module).flat_buffers)
            assert streams == (limit is not None and limit < 0.1)
