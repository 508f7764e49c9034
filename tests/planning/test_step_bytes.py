"""What a step takes is counted once for each kind of model and inputs, and anew for every other."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

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
def test_what_operations_give_again_is_what_pytorch_says(dtype, monkeypatch):
    """Asked for the first time, and repeated."""
    monkeypatch.setattr(counting, "_ANSWERS", {})
    x = torch.empty(2, 5, 3, 4, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
    others = (x, x.mT.contiguous().mT, x[:, :1], x[0, 0, 0], x.sum(), 2.5, x.float(), torch.empty((), device="meta"))
    calls = [lambda y=y, name=name: getattr(torch, name)(x, y) for y in others for name in ("add", "sub", "mul", "div")]
    calls += [lambda name=name: getattr(torch, name)(x) for name in ("abs", "exp", "neg", "rsqrt")]
    calls += [lambda: x**2, lambda: x.clamp(-1, 1), lambda: x.clamp(min=0), lambda: F.silu(x), lambda: x == x]
    calls += [lambda: F.gelu(x, approximate="tanh"), lambda: x[:, :1] * x, lambda: x[:, :1] * x[:, :, :1]]
    calls += [lambda: x.clone().mul_(2).add_(x).clamp_(max=1), lambda: torch.addcmul(x, x, x, out=torch.empty_like(x))]
    calls += [lambda: x + 1, lambda: x + True, lambda: x.to(torch.float64), lambda: x.contiguous(), lambda: x.sum(1)]
    calls += [lambda: x.mean(-1, keepdim=True), lambda: x.mean((1, 2)), lambda: torch.cat([x, x], 1), lambda: x.mT]
    weight = torch.empty(7, 5, 1, 2, dtype=dtype, device="meta")
    calls += [lambda: F.conv2d(x, weight), lambda: F.conv2d(x.contiguous(), weight), lambda: F.pad(x, (1, 0))]
    calls += [lambda: x @ x.mT, lambda: F.layer_norm(x, (4,)), lambda: F.rms_norm(x, (4,)), lambda: x.flatten(1)]
    calls += [lambda: x.max(1).values, lambda: x.max(1).indices, lambda: x.split(2, 1)[-1], lambda: x.chunk(2)[0]]
    calls += [lambda: x.clone().resize_(3, 2)]
    for call in calls:
        expected = call()
        peaks = []
        for _ in range(2):
            with counting.LiveBytes(given=[x, weight]) as live:
                found = call()
            assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())
            peaks.append((live.peak, live.live))
        assert peaks[0] == peaks[1]


def test_an_operation_on_data_is_computed_every_time():
    with counting.LiveBytes("cpu"):
        assert [(torch.full((2,), n) * 2).tolist() for n in (1, 2)] == [[2, 2], [4, 4]]


def test_a_tensor_that_is_resized_counts_as_before(monkeypatch):
    """Operations that change the layout of what they are given are never repeated from memory."""
    monkeypatch.setattr(counting, "_ANSWERS", {})
    with counting.LiveBytes():
        shapes = [torch.empty(1, 4, device="meta").squeeze_(0).shape for _ in range(2)]
    assert shapes == [(4,), (4,)]
