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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_elementwise_operations_give_is_what_pytorch_says(dtype):
    x = torch.empty(2, 5, 3, 4, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
    others = (x, x.mT.contiguous().mT, x[:, :1], x[0, 0, 0], x.sum(), 2.5, x.float(), torch.empty((), device="meta"))
    calls = [lambda y=y, name=name: getattr(torch, name)(x, y) for y in others for name in ("add", "sub", "mul", "div")]
    calls += [lambda name=name: getattr(torch, name)(x) for name in ("abs", "exp", "neg", "rsqrt")]
    calls += [lambda: x**2, lambda: x.clamp(-1, 1), lambda: x.clamp(min=0), lambda: torch.nn.functional.silu(x)]
    calls += [lambda: torch.nn.functional.gelu(x, approximate="tanh"), lambda: x[:, :1] * x, lambda: x == x]
    calls += [lambda: x[:, :1] * x[:, :, :1], lambda: x.clone().mul_(2).add_(x).clamp_(max=1)]
    for call in calls:
        expected = call()
        with counting.LiveBytes():
            found = call()
        assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())
