"""Plans hold: what a run takes is what was planned, at published sizes, counted on the meta device."""

from functools import cache

import pytest
import torch

from tests.sampling.runs import sample
from wan_core.models.config import DiTConfig
from wan_core.models.dit import WanDiT
from wan_core.offload.blocks import weights_of
from wan_core.offload.quant import quantise
from wan_core.offload.streaming import PlainCopies
from wan_core.offload.weights import WeightProvider
from wan_core.planning.estimate import LiveBytes
from wan_core.planning.run import plan_run
from wan_core.runtime import GIB, Runtime
from wan_core.settings import MemorySettings, SamplerSettings
from wan_core.types import Conditioning, VideoSize, tensors_in

META = torch.device("meta")
LARGE = DiTConfig(dim=5120, ffn_dim=13824, num_layers=40)


@cache
def model(fp8: bool) -> WanDiT:
    with META:
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
    ("gib", "width", "height", "fp8"),
    [(24, 832, 480, False), (8, 832, 480, False), (12, 1280, 720, False), (6, 832, 480, True), (8, 1280, 720, True)],
)
def test_the_planned_peak_of_14b_is_the_counted_one(gib, width, height, fp8):
    dit, cond, size = model(fp8), conditioning(), VideoSize.rounded(width, height, 81).latent
    plan = plan_run(dit, cond, size, SamplerSettings(steps=1), MemorySettings(), lambda _: gib * GIB)
    assert bool(plan.missing) == (plan.peak_bytes > gib * GIB)
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
    assert stream.copied - read_ahead == plan.copied_per_step, "interleaved branches share each copy"
