"""A step cache that looks at what the first block does, as FirstBlockCache: the seam of caches has what it needs."""

from dataclasses import replace

import pytest
import torch

from tests.reference import relative_error
from tests.sampling.runs import planned
from tests.sampling.variants import SMALL, conditioning, small_dit
from wan_core.cache_settings import EasyCacheSettings
from wan_core.model import VideoModel
from wan_core.runtime import Runtime
from wan_core.sampling import compose
from wan_core.settings import GuidanceSettings, MemorySettings, SamplerSettings, WindowSettings
from wan_core.types import LatentSize
from wan_core.variants import match_variant

RUNTIME = Runtime(device=torch.device("cpu"), dtype=torch.float32)
SIZE = LatentSize(4, 4, 4)
STEPS = 5
MEMORY = {"whole": MemorySettings(), "streamed": MemorySettings(persistent_params=0)}
MODES = ("sequential", "interleaved", "batched")


class FirstBlock:
    """Leaves the other blocks out while the first one changes the tokens nearly as it did when all of them ran."""

    def __init__(self, threshold: float) -> None:
        self.threshold, self.memory = threshold, {}

    def may_skip(self, index):
        return 0 < index < STEPS - 1

    def skips(self, lead, info):
        before = lead.tokens.clone()
        lead.run(1)
        change, name = lead.tokens - before, str(info.window)
        last = self.memory.get(name)
        if last is not None and self.may_skip(info.index) and relative_error(change, last) < self.threshold:
            return True
        self.memory[name] = change
        return False

    def computed(self, tokens, info):
        pass


@pytest.fixture(params=["t2v", "vace"])
def run(request, monkeypatch):
    """Latents with a first-block cache of that threshold, without one if None; and how often each block ran."""
    dit = small_dit(request.param)
    cond = replace(conditioning(request.param, SIZE, models=SMALL), motion_bucket=None)
    model = VideoModel.of(dit, match_variant(dit.config), None, "tiny")
    ran = []
    for index, block in enumerate(dit.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))

    def latents(threshold, memory="whole", mode="sequential", windows=None):
        ran.clear()
        monkeypatch.setattr(compose, "_skip_rule", lambda *_: None if threshold is None else FirstBlock(threshold))
        settings = SamplerSettings(
            steps=STEPS, seed=2, guidance=GuidanceSettings(scale=3.0, mode=mode), cache=EasyCacheSettings(),
            windows=windows,
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
    assert all(count == every[0] * 2 // STEPS for count in ran[1:]), "the others in the first and the last step"
    assert not torch.equal(cached, plain)
    expected, _ = run(1000.0, "whole", "sequential", windows)
    assert relative_error(cached, expected) < 1e-5
    if mode != "batched":
        assert torch.equal(cached, expected)
