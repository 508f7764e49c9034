"""Plans hold: what a run takes is what was planned, at published sizes, counted on the meta device."""

from functools import cache

import pytest
import torch

from tests.sampling.runs import sample
from wan_core.models.config import DiTConfig
from wan_core.models.dit import WanDiT
from wan_core.models.ops import on_meta
from wan_core.offload.blocks import weights_of
from wan_core.offload.quant import quantise
from wan_core.offload.streaming import PlainCopies
from wan_core.offload.weights import WeightProvider
from wan_core.planning.estimate import LiveBytes
from wan_core.planning.run import plan_run
from wan_core.runtime import Runtime
from wan_core.settings import MemorySettings, SamplerSettings
from wan_core.types import Conditioning, VideoSize, tensors_in

META = torch.device("meta")
BLOCKS = 8
LARGE = DiTConfig(dim=5120, ffn_dim=13824, num_layers=BLOCKS)
"""As wide as 14B. A run holds of more blocks nothing but their weights."""
SIZES = {"480p": VideoSize(832, 480, 81), "720p": VideoSize(1280, 720, 81)}


@cache
def model(fp8: bool) -> WanDiT:
    with on_meta():
        dit = WanDiT(LARGE).requires_grad_(False).to(torch.bfloat16)
    for name, parameter in dit.named_parameters():
        if name.endswith("modulation"):
            parameter.data = parameter.data.float()
    dit.attend = lambda q, k, v: torch.empty_like(q)
    return quantise(dit) if fp8 else dit


class MetaCopies(PlainCopies):
    """Copies on the meta device, as if weights rested elsewhere."""

    def __init__(self) -> None:
        super().__init__(META)

    def whole(self, weight, dtype):
        return torch.empty_like(weight, dtype=dtype)


def conditioning() -> Conditioning:
    text, negative = (torch.empty(1, 512, 4096, device=META) for _ in range(2))
    return Conditioning(text=text, negative_text=negative)


@pytest.fixture(autouse=True)
def results_stay_on_the_meta_device(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: self)


@pytest.mark.parametrize(
    ("share", "size", "fp8"),
    [(1, "480p", False), (0.7, "480p", False), (0.6, "720p", False), (0.6, "480p", True), (0, "720p", True)],
)
def test_the_planned_peak_is_the_counted_one(share, size, fp8):
    """With room for that share of the weights beside all else; without any it streams every block, and says so."""
    dit, cond, size = model(fp8), conditioning(), SIZES[size].latent

    def planned(room):
        return plan_run(dit, cond, size, SamplerSettings(steps=1), MemorySettings(), lambda _: room)

    whole = planned(None)
    limit = whole.peak_bytes - (1 - share) * whole.placement.device_bytes
    plan = planned(limit)
    streamed = len(plan.placement.streamed)
    assert streamed == 0 if share == 1 else streamed == BLOCKS if share == 0 else 0 < streamed < BLOCKS
    assert bool(plan.missing) == (plan.peak_bytes > limit) == (share == 0)
    provider, copies = WeightProvider.of(dit), MetaCopies()
    with provider.working(META, plan.placement, copies=copies):
        """The rows that streamed blocks rest in are made; they stand for host memory."""
    with (
        LiveBytes(given=[*weights_of(dit).values(), *tensors_in(cond)]) as counter,
        provider.working(META, plan.placement, copies=copies) as stream,
    ):
        sample(dit, cond, size, plan.settings, Runtime(device=META, dtype=torch.bfloat16))
    assert counter.peak == pytest.approx(plan.peak_bytes - plan.allowance, rel=0.02)
    read_ahead = plan.placement.inventory.blocks[plan.placement.streamed[0]].bytes if stream else 0
    copied = stream.copied - read_ahead if stream else 0
    assert copied == plan.copied_per_step, "interleaved branches share each copy"
