"""What a step takes is counted once for each kind of model and inputs, and anew for every other."""

from dataclasses import replace

import pytest
import torch

from tests.reference import tiny_dit, tiny_motion_controller
from tests.sampling.variants import conditioning
from wan_core.offload.quant import quantise
from wan_core.planning import estimate as counting
from wan_core.settings import GuidanceSettings
from wan_core.types import Curve, LatentSize, VaceInput

SIZE = LatentSize(2, 4, 4)
FRAMES = {"vace": (3, 4, 4)}


@pytest.fixture
def counts(monkeypatch):
    """How often a step was really counted."""
    seen, original = [], counting._counted_bytes
    monkeypatch.setattr(counting, "_COUNTED", {})
    monkeypatch.setattr(counting, "_counted_bytes", lambda *given: seen.append(1) or original(*given))
    return seen


def step_bytes(dit, variant="t2v", cond=None, mode="sequential", residuals="none", controller=None):
    cond = cond or conditioning(variant, SIZE)
    size = FRAMES.get(variant, SIZE.shape)
    return counting.step_bytes(dit, cond, size, GuidanceSettings(mode=mode), residuals, controller)


def test_the_same_kind_is_counted_once(counts):
    first = step_bytes(tiny_dit())
    assert step_bytes(tiny_dit(), cond=conditioning("t2v", SIZE, seed=9)) == first > 0
    assert len(counts) == 1


def exact(dit):
    dit.exact = True
    return dit


@pytest.mark.parametrize(
    "other",
    [
        lambda: step_bytes(tiny_dit().bfloat16()),
        lambda: step_bytes(exact(tiny_dit())),
        lambda: step_bytes(quantise(tiny_dit())),
        lambda: step_bytes(tiny_dit("i2v"), "i2v"),
        lambda: step_bytes(tiny_dit(), mode="interleaved"),
        lambda: step_bytes(tiny_dit(), residuals="device"),
        lambda: step_bytes(tiny_dit(), cond=replace(conditioning("t2v", SIZE), negative_text=torch.zeros(1, 7, 64))),
        lambda: step_bytes(tiny_dit(), controller=tiny_motion_controller()),
    ],
)
def test_every_other_is_counted_anew(other, counts):
    step_bytes(tiny_dit())
    other()
    assert len(counts) == 2


def test_a_vace_input_without_strength_takes_less(counts):
    cond = conditioning("vace", SIZE)
    off = replace(cond, vace=tuple(VaceInput(context=v.context, strength=Curve((0.0,))) for v in cond.vace))
    dit = tiny_dit("vace")
    assert step_bytes(dit, "vace", off) < step_bytes(dit, "vace", cond)
    assert len(counts) == 2
