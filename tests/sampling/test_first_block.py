"""The first-block cache with streamed weights, windows and all guidance modes."""

from dataclasses import replace

import pytest
import torch

from tests.reference import relative_error
from tests.sampling.runs import planned
from tests.sampling.variants import SMALL, conditioning, small_dit
from wan_core.cache_settings import FirstBlockSettings
from wan_core.model import VideoModel
from wan_core.runtime import Runtime
from wan_core.settings import GuidanceSettings, MemorySettings, SamplerSettings, WindowSettings
from wan_core.types import LatentSize
from wan_core.variants import match_variant

RUNTIME = Runtime(device=torch.device("cpu"), dtype=torch.float32)
SIZE = LatentSize(4, 4, 4)
STEPS = 5
MEMORY = {"whole": MemorySettings(), "streamed": MemorySettings(persistent_params=0)}
MODES = ("sequential", "interleaved", "batched")


@pytest.fixture(params=["t2v", "vace"])
def run(request):
    """Latents with a first-block cache of that threshold, without one if None; and how often each block ran."""
    dit = small_dit(request.param)
    cond = replace(conditioning(request.param, SIZE, models=SMALL), motion_bucket=None)
    model = VideoModel.of(dit, match_variant(dit.config), None, "tiny")
    ran = []
    for index, block in enumerate(dit.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))

    def latents(threshold, memory="whole", mode="sequential", windows=None):
        ran.clear()
        cache = None if threshold is None else FirstBlockSettings(threshold=threshold, start_step=1)
        settings = SamplerSettings(
            steps=STEPS, seed=2, guidance=GuidanceSettings(scale=3.0, mode=mode), cache=cache, windows=windows,
        )  # fmt: skip
        out = planned(model, cond, SIZE, settings, RUNTIME, MEMORY[memory])
        return out, [ran.count(index) for index in range(len(dit.blocks))]

    return latents


@pytest.mark.parametrize("windows", [None, WindowSettings(size=3, stride=2)], ids=["whole", "windows"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory", MEMORY)
def test_a_cache_on_the_first_block(run, memory, mode, windows):
    plain, every = run(None, memory, mode, windows)
    off, ran = run(0.0, memory, mode, windows)
    assert torch.equal(off, plain) and ran == every
    cached, ran = run(1000.0, memory, mode, windows)
    assert ran[0] == every[0], "the first block runs in every step"
    assert all(count == every[0] // STEPS for count in ran[1:]), "the others in the first step"
    assert not torch.equal(cached, plain)
    expected, _ = run(1000.0, "whole", "sequential", windows)
    assert relative_error(cached, expected) < 1e-5
    if mode != "batched":
        assert torch.equal(cached, expected)
