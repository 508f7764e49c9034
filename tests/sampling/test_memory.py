"""Memory of a run at the published size, counted on the meta device. Nothing is allocated."""

from functools import cache

import pytest
import torch
from torch import Tensor

from tests.sampling.runs import sample
from wan_core.models.config import DiTConfig
from wan_core.models.dit import WanDiT
from wan_core.models.ops import on_meta
from wan_core.planning.estimate import LiveBytes
from wan_core.runtime import Runtime
from wan_core.sampling import run as loop
from wan_core.settings import GuidanceSettings, SamplerSettings, WindowSettings
from wan_core.types import Conditioning, VideoSize, tensors_in

META = torch.device("meta")


@pytest.fixture(autouse=True)
def nothing_reads_values(monkeypatch):
    monkeypatch.setattr(loop, "window_reports", lambda *_: [])
    monkeypatch.setattr(Tensor, "cpu", lambda self: self)


@cache
def peak_bytes(num_frames: int, windows: WindowSettings | None, mode: str) -> int:
    """Peak of everything but weights and conditioning in one step of T2V-1.3B at 832x480, in bfloat16.

    With two of its 30 blocks: they follow one another, and none keeps anything.
    """
    with on_meta():
        dit = WanDiT(DiTConfig(num_layers=2)).requires_grad_(False).to(torch.bfloat16)
        cond = Conditioning(text=torch.empty(1, 512, 4096), negative_text=torch.empty(1, 512, 4096))
    dit.attend = lambda q, k, v: torch.empty_like(q)
    settings = SamplerSettings(steps=1, windows=windows, guidance=GuidanceSettings(mode=mode))
    size = VideoSize.rounded(832, 480, num_frames).latent
    given = [*dit.parameters(), *tensors_in(cond)]
    with LiveBytes(given=given) as counter:
        sample(dit, cond, size, settings, Runtime(device=META, dtype=torch.bfloat16))
    return counter.peak


@pytest.mark.parametrize(("kind", "mode"), [("blend", "sequential"), ("blend", "interleaved"), ("chain", "sequential")])
def test_a_long_video_in_windows_needs_the_memory_of_one(kind, mode):
    one = peak_bytes(81, None, mode)
    assert peak_bytes(257, WindowSettings(size=21, stride=15, mode=kind), mode) == pytest.approx(one, rel=0.1)


def test_a_long_video_in_one_piece_needs_more():
    assert peak_bytes(257, None, "sequential") > 2.5 * peak_bytes(81, None, "sequential")
