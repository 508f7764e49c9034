"""After the first step that is computed nothing waits for the device: no value is read, and nothing is copied there.

On the meta device values cannot be read at all; on the CPU reading them is what `aten._local_scalar_dense` does.
"""

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.reference import ALL_DITS, tiny_dit
from tests.sampling.runs import sample
from wan_core.cache_settings import MagCacheSettings, TeaCacheSettings
from wan_core.models.config import MotionControllerConfig
from wan_core.models.dit import WanDiT
from wan_core.models.layers import MotionController
from wan_core.models.ops import on_meta
from wan_core.planning.estimate import compute
from wan_core.runtime import Runtime
from wan_core.sampling import compose
from wan_core.sampling import run as loop
from wan_core.sampling.cache_tables import TEACACHE_COEFFICIENTS
from wan_core.sampling.step_cache import SkipPlan
from wan_core.settings import GuidanceSettings, SamplerSettings, WindowSettings
from wan_core.types import Conditioning, LatentSize, VaceInput

META = torch.device("meta")
STEPS = 6
SIZE = LatentSize(3, 8, 8)
aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero}


class Waits(AssertionError):
    pass


class NoWaiting(TorchDispatchMode):
    """Refuses, while `watching`, whatever brings a value or a tensor from one device to another."""

    watching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.watching and func.overloadpacket in READS:
            raise Waits(f"{func} reads a value")
        out = compute(func, args, kwargs)
        if self.watching:
            found = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor) and x.ndim}
            if len(found) > 1:
                raise Waits(f"{func} copies between {' and '.join(sorted(found))}")
        return out


def meta_dit(variant: str) -> WanDiT:
    with on_meta():
        dit = WanDiT(replace(ALL_DITS[variant], num_layers=3)).requires_grad_(False)
    return dit


@contextmanager
def nothing_is_given_back(monkeypatch):
    """On the meta device results cannot be read; all that happens after the last step is left out."""
    with monkeypatch.context() as patched:
        patched.setattr(loop, "window_reports", lambda *_: [])
        patched.setattr(Tensor, "cpu", lambda self: self)
        patched.setattr(compose.skip_rules, "changes", lambda modulations: [0.01] * (len(modulations) - 1))
        yield


def run(dit: WanDiT, cond: Conditioning, settings: SamplerSettings, device: torch.device, controller=None) -> None:
    mode = NoWaiting()

    def before_step(index: int, total: int) -> None:
        mode.watching = index > settings.guidance.zero_steps

    def on_progress(phase: str, done: int, total: int, latents: Tensor | None = None) -> None:
        mode.watching = mode.watching and done < total

    runtime = Runtime(device=device, dtype=torch.float32, before_step=before_step, on_progress=on_progress)
    with mode:
        sample(dit, cond, SIZE, settings, runtime, motion_controller=controller)


def texts(device: torch.device, **others: Any) -> Conditioning:
    text = torch.zeros(1, 5, 64, device=device)
    return Conditioning(text=text, negative_text=text.clone(), **others)


TEACACHE = TeaCacheSettings(threshold=0.2, template="Wan2.1-T2V-1.3B")
RUNS = {
    "plain": SamplerSettings(steps=STEPS),
    "interleaved": SamplerSettings(steps=STEPS, guidance=GuidanceSettings(mode="interleaved")),
    "batched": SamplerSettings(steps=STEPS, guidance=GuidanceSettings(mode="batched")),
    "curve": SamplerSettings(steps=STEPS, guidance=GuidanceSettings(scale=(6.0, 1.0), end=0.7)),
    "zero star": SamplerSettings(steps=STEPS, guidance=GuidanceSettings(zero_star=True, zero_steps=1)),
    "unipc": SamplerSettings(steps=STEPS, solver="unipc"),
    "dpm++": SamplerSettings(steps=STEPS, solver="dpm++"),
    "teacache": SamplerSettings(steps=STEPS, cache=TEACACHE),
    "magcache": SamplerSettings(steps=STEPS, cache=MagCacheSettings(template="Wan2.1-T2V-14B")),
    "windows": SamplerSettings(steps=STEPS, windows=WindowSettings(size=2, stride=1)),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_no_step_waits(name, device, monkeypatch):
    device = torch.device(device)
    if device == META:
        with nothing_is_given_back(monkeypatch):
            run(meta_dit("t2v"), texts(META), RUNS[name], META)
    else:
        run(tiny_dit(), texts(device), RUNS[name], device)


@pytest.mark.parametrize("name", ["plain", "batched", "teacache", "windows"])
@pytest.mark.parametrize("variant", ["ti2v_5b", "fun_5b_control"])
def test_clean_frames_make_no_step_wait(variant, name, monkeypatch):
    clean = torch.zeros(1, 48, 1, *SIZE.shape[1:], device=META)
    with nothing_is_given_back(monkeypatch):
        run(meta_dit(variant), texts(META).with_clean_frames(clean, SIZE.frames), RUNS[name], META)


@pytest.mark.parametrize("variant", ["i2v", "fun_v1_1_control", "fun_camera"])
def test_no_conditioning_makes_a_step_wait(variant, monkeypatch):
    frames, height, width = SIZE.shape
    others = {"camera": torch.zeros(1, 24, frames, 8 * height, 8 * width, device=META)} if "camera" in variant else {}
    with nothing_is_given_back(monkeypatch):
        run(meta_dit(variant), texts(META, **others), SamplerSettings(steps=3), META)


def test_vace_and_speed_control_make_no_step_wait(monkeypatch):
    context = torch.zeros(1, 96, *SIZE.shape, device=META)
    with on_meta():
        controller = MotionController(MotionControllerConfig(dim=256, freq_dim=64))
    with nothing_is_given_back(monkeypatch):
        run(meta_dit("vace"), texts(META, vace=(VaceInput(context=context),)), SamplerSettings(steps=3), META)
        bucket = torch.zeros(1, device=META)
        run(meta_dit("t2v"), texts(META, motion_bucket=bucket), SamplerSettings(steps=3), META, controller)


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: bool(x.any())])
def test_reading_a_value_is_seen(read, monkeypatch):
    dit, looked = tiny_dit(), []
    original = dit.unembed
    monkeypatch.setattr(dit, "unembed", lambda state: looked.append(read(state.tokens[0, 0, :3])) or original(state))
    with pytest.raises(Waits, match="reads a value"):
        run(dit, texts(torch.device("cpu")), RUNS["plain"], torch.device("cpu"))


def test_a_copy_from_the_host_is_seen(monkeypatch):
    dit = meta_dit("t2v")
    original = dit.unembed
    monkeypatch.setattr(dit, "unembed", lambda state: original(state) + torch.ones(1).to(META))
    with nothing_is_given_back(monkeypatch), pytest.raises(Waits, match="between cpu and meta"):
        run(dit, texts(META), RUNS["plain"], META)


def test_the_plan_of_teacache_leaves_steps_out():
    changes = [0.01] * (STEPS - 1)
    rule = compose.skip_rules.OnlineRule(TEACACHE_COEFFICIENTS[TEACACHE.template], 0.2, STEPS)
    plan = SkipPlan(tuple(rule.skips(i, c) for i, c in enumerate([0.0, *changes])), 0.2)
    assert plan.computed_steps < STEPS
