"""Features that do not know one another, together: caches, windows and guidance modes on every structure."""

import dataclasses
import functools
import gc
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reference import ALL_DITS, relative_error, tiny_dit, tiny_motion_controller
from tests.sampling.runs import sample, sample_state
from tests.sampling.variants import SMALL, conditioning, small_dit, small_motion_controller
from wan_core.cache_settings import EasyCacheSettings, FirstBlockSettings, MagCacheSettings, TeaCacheSettings
from wan_core.models.dit import WanDiT
from wan_core.runtime import Cancelled, OutOfMemoryError, Runtime
from wan_core.sampling.checkpoint import Checkpoint
from wan_core.sampling.predictor import NonFiniteError
from wan_core.sampling.solvers import SOLVERS
from wan_core.settings import CFG_MODES, GuidanceSettings, NagSettings, SamplerSettings, SkipSettings, WindowSettings
from wan_core.types import LatentSize

RUNTIME = Runtime(device=torch.device("cpu"), dtype=torch.float32)
SIZE = LatentSize(4, 2, 4)
SKIP_ALL = TeaCacheSettings(threshold=1000.0, template="Wan2.1-T2V-1.3B", start_step=2)
MAGCACHE = MagCacheSettings(threshold=1000.0, template="Wan2.1-T2V-1.3B")
CACHES = {
    "none": (None, None),
    "teacache": (SKIP_ALL, dataclasses.replace(SKIP_ALL, threshold=0.0)),
    "easycache": (
        EasyCacheSettings(threshold=1000.0, start_step=2), EasyCacheSettings(threshold=0.0, start_step=2)
    ),
    "magcache": (MAGCACHE, dataclasses.replace(MAGCACHE, threshold=0.0)),
    "first block": (
        FirstBlockSettings(threshold=1000.0, start_step=2, max_skips=2), FirstBlockSettings(threshold=0.0, start_step=2)
    ),
}  # fmt: skip
WINDOWS = {
    "none": (None, None),
    "blend": (WindowSettings(size=3, stride=2), WindowSettings(size=SIZE.frames, stride=2)),
    "chain": (
        WindowSettings(size=3, stride=2, mode="chain"), WindowSettings(size=SIZE.frames, stride=2, mode="chain")
    ),
}  # fmt: skip


def in_pairs(first: Iterable[Any], second: Iterable[Any], third: Sequence[Any] | dict[str, Any]) -> list[tuple]:
    """Cases in which every value of each list meets every value of both others; the third list is the shortest."""
    third = list(third)
    return [(x, y, third[(i + j) % len(third)]) for i, x in enumerate(first) for j, y in enumerate(second)]


def run(variant: str, dit: WanDiT | None = None, runtime: Runtime = RUNTIME, size: LatentSize = SIZE, **changes):
    cond = conditioning(variant, size)
    settings = SamplerSettings(**{"steps": 5, "seed": 2, "shift": 3.0} | changes)
    controller = tiny_motion_controller() if variant == "t2v" else None
    return sample(dit or tiny_dit(variant), cond, size, settings, runtime, motion_controller=controller)


shared_dit = functools.cache(small_dit)


@functools.cache
def guided(variant: str, cache: object, windows: WindowSettings | None, mode: str = "sequential", **guidance) -> Tensor:
    """The latents of a small model; the cases below have some of them in common."""
    settings = SamplerSettings(
        steps=5, seed=2, shift=3.0, cache=cache, windows=windows,
        guidance=GuidanceSettings(scale=3.0, mode=mode, **guidance),
    )  # fmt: skip
    controller = small_motion_controller() if variant == "t2v" else None
    cond, size = conditioning(variant, SIZE, models=SMALL), dataclasses.replace(SIZE, geometry=SMALL[variant].geometry)
    return sample(shared_dit(variant), cond, size, settings, RUNTIME, motion_controller=controller)


@pytest.mark.parametrize(("variant", "cache", "windows"), in_pairs(ALL_DITS, CACHES, WINDOWS), ids=str)
def test_caches_windows_and_guidance_go_together(variant, cache, windows):
    (cached, uncached), (cut, whole) = CACHES[cache], WINDOWS[windows]
    result = functools.partial(guided, variant)
    plain = result(cached, cut)
    assert plain.shape == (1, SMALL[variant].out_channels, *SIZE.shape)
    # Whatever the order in which branches run, whether all of the time or for a part of it.
    for mode in CFG_MODES[1:]:
        assert relative_error(result(cached, cut, mode), plain) < 1e-5
    partly = {"start": 0.5, "end": 0.8, "zero_star": True, "nag": NagSettings(scale=5.0, end=0.6)}
    partly["skip"] = SkipSettings(blocks=(1,), scale=2.0, start=0.2)
    assert relative_error(result(cached, cut, "batched", **partly), result(cached, cut, **partly)) < 1e-5
    # A feature that has nothing to do changes nothing.
    if cut is not None:
        assert torch.equal(result(cached, whole), result(cached, None))
    if cached is not None:
        without = result(None, cut)
        assert torch.equal(result(uncached, cut), without)
        assert not torch.equal(plain, without)


@pytest.mark.parametrize(("solver", "cache", "split"), in_pairs(SOLVERS, CACHES, [1, 3, 4]), ids=str)
def test_a_run_in_two_parts_is_the_run_in_one(solver, cache, split):
    dit, cond = shared_dit("vace"), conditioning("vace", SIZE, models=SMALL)
    settings = SamplerSettings(steps=6, solver=solver)
    settings = dataclasses.replace(settings, cache=CACHES[cache][0], guidance=GuidanceSettings(start=0.3))
    whole = sample(dit, cond, SIZE, settings, RUNTIME)
    first = sample_state(dit, cond, SIZE, dataclasses.replace(settings, end_step=split), RUNTIME)
    assert first.step == split
    rest = dataclasses.replace(settings, start_step=split)
    second = sample_state(dit, cond, SIZE, rest, RUNTIME, earlier=first)
    assert torch.equal(second.video, whole)


def test_a_part_without_the_state_goes_on_and_says_so(caplog):
    dit, cond, settings = tiny_dit(), conditioning("t2v", SIZE), SamplerSettings(steps=4)
    whole = sample(dit, cond, SIZE, settings, RUNTIME)
    first = sample_state(dit, cond, SIZE, dataclasses.replace(settings, end_step=2), RUNTIME)
    rest = dataclasses.replace(settings, start_step=2)
    assert torch.equal(sample(dit, cond, SIZE, rest, RUNTIME, first.video), whole)  # Euler has no memory
    assert "without the earlier sampler's state" in caplog.text
    other = dataclasses.replace(rest, solver="unipc")
    sample_state(dit, cond, SIZE, other, RUNTIME, earlier=first)
    assert "another solver or schedule" in caplog.text
    with pytest.raises(ValueError, match="connect its latents"):
        sample(dit, cond, SIZE, rest, RUNTIME)


def test_a_prompt_may_change_between_two_parts():
    dit, cond, other = tiny_dit(), conditioning("t2v", SIZE), conditioning("t2v", SIZE, seed=8)
    settings = SamplerSettings(steps=5, solver="unipc", cache=SKIP_ALL)
    first = sample_state(dit, cond, SIZE, dataclasses.replace(settings, end_step=3), RUNTIME)
    rest = dataclasses.replace(settings, start_step=3)
    changed = sample_state(dit, other, SIZE, rest, RUNTIME, earlier=first)
    assert not torch.equal(changed.video, sample(dit, cond, SIZE, settings, RUNTIME))


def test_the_result_does_not_depend_on_what_watches_it(tmp_path):
    plain = run("t2v", solver="unipc", cache=SKIP_ALL)
    watched = dataclasses.replace(RUNTIME, on_progress=lambda phase, done, total, latents: latents.mul_(0))
    assert torch.equal(run("t2v", solver="unipc", cache=SKIP_ALL, runtime=watched), plain)
    cpu = dataclasses.replace(SKIP_ALL, residual_on_cpu=True)
    assert torch.equal(run("t2v", solver="unipc", cache=cpu), plain)


def test_guidance_follows_a_curve_inside_its_interval():
    def at(**guidance):
        return run("t2v", guidance=GuidanceSettings(**guidance))

    assert torch.equal(at(scale=(4.0,)), at(scale=4.0))
    assert torch.equal(at(scale=(4.0, 4.0)), at(scale=4.0))
    assert not torch.equal(at(scale=(4.0, 1.0)), at(scale=4.0))
    assert torch.equal(at(scale=1.0, zero_star=True), at(scale=1.0))
    assert torch.equal(at(scale=(1.0, 1.0)), at(scale=1.0))
    assert not torch.equal(at(scale=4.0, end=0.5), at(scale=4.0))
    zero = at(scale=4.0, zero_steps=5)
    assert torch.equal(zero, torch.randn((1, 16, *SIZE.shape), generator=torch.manual_seed(2)))


@pytest.mark.parametrize("mode", CFG_MODES)
def test_the_interval_saves_the_other_branch(mode):
    dit = tiny_dit()
    rows = []
    dit.blocks[0].register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    run("t2v", dit, guidance=GuidanceSettings(mode=mode, start=0.25, end=0.75), steps=5)
    assert sum(rows) == 5 + 3


def test_zero_star_scales_the_unconditional_branch():
    from wan_core.sampling.guidance import projection

    negative = torch.randn(2, 16, 3, 4, 4)
    factor = projection(torch.cat((3 * negative[:1], -negative[1:])), negative)
    assert torch.allclose(factor.flatten(), torch.tensor([3.0, -1.0]))


def tensors() -> set[int]:
    gc.collect()
    return {id(x) for x in gc.get_objects() if isinstance(x, Tensor)}


@pytest.mark.parametrize("mode", CFG_MODES)
@pytest.mark.parametrize("windows", WINDOWS)
def test_cancelling_inside_a_block_leaves_nothing_behind(mode, windows, tmp_path):
    dit, cond, checks = tiny_dit("vace"), conditioning("vace", SIZE), itertools.count(1)
    settings = SamplerSettings(
        steps=6, cache=SKIP_ALL, windows=WINDOWS[windows][0], guidance=GuidanceSettings(mode=mode)
    )

    def cancel():
        if next(checks) == 14:
            raise Cancelled("enough")

    runtime = dataclasses.replace(RUNTIME, check_cancelled=cancel)
    before = tensors()
    with pytest.raises(Cancelled):
        sample(dit, cond, SIZE, settings, runtime, checkpoint=Checkpoint(tmp_path))
    assert next(checks) == 15
    assert not tensors() - before
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in dit.modules())
    assert not list(tmp_path.iterdir())


def test_a_number_that_is_none_is_found_where_it_arises():
    dit = tiny_dit()
    dit.blocks[2].ffn[2].bias[:] = torch.finfo(torch.float32).max
    with pytest.raises(NonFiniteError, match=r"in step 1 of 5, first after block 2 of 0 to 3\. Likely cause: .*cfg"):
        run("t2v", dit)
    half = tiny_dit().half()
    for block in half.blocks:
        block.modulation.data = block.modulation.data.float()
    half.blocks[1].ffn[2].weight *= 3e4
    with pytest.raises(NonFiniteError, match=r"first after block 1 .* beyond 65504 in fp16; load the model in bf16"):
        run("t2v", half)


class Waits(TorchDispatchMode):
    """Counts numbers read from tensors; for each of them a program waits for its device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("mode", "windows", "cache", "first"),
    [
        ("sequential", "none", None, 2),
        ("interleaved", "none", SKIP_ALL, 2),
        ("batched", "none", None, 1),
        ("sequential", "blend", None, 4),
    ],
)
def test_a_run_waits_for_the_device_in_its_first_step_only(solver, mode, windows, cache, first, monkeypatch):
    settings = SamplerSettings(
        steps=5, solver=solver, cache=cache, windows=WINDOWS[windows][0], guidance=GuidanceSettings(mode=mode)
    )
    waits, to_cpu = Waits(), Tensor.cpu

    def cpu(tensor):
        waits.count += 1
        return to_cpu(tensor)

    monkeypatch.setattr(Tensor, "cpu", cpu)
    at = []
    with waits:
        runtime = dataclasses.replace(
            RUNTIME, before_step=lambda *_: at.append(waits.count), on_progress=lambda *_: at.append(waits.count)
        )
        sample(shared_dit("vace"), conditioning("vace", SIZE, models=SMALL), SIZE, settings, runtime)
    counts = [after - before for before, after in zip(at[::2], at[1::2], strict=True)]
    assert counts == [first, 0, 0, 0, 0]


@pytest.mark.parametrize("where", ["weight", "text", "latents"])
def test_bad_inputs_are_named(where):
    dit, cond, start = tiny_dit(), conditioning("t2v", SIZE), torch.zeros(1, 16, *SIZE.shape)
    target = {"weight": dit.blocks[1].ffn[0].weight, "text": cond.text[0], "latents": start[0, 0, 0]}[where]
    target[0, 0] = float("nan")
    words = {"weight": "blocks.1.ffn.0.weight", "text": "conditioning", "latents": "latent input is bad"}[where]
    with pytest.raises(NonFiniteError, match=words):
        sample(dit, cond, SIZE, SamplerSettings(steps=2, denoise=0.5), RUNTIME, start)


def test_out_of_memory_names_what_to_lower_and_keeps_what_is_done(tmp_path):
    dit, cond, settings = tiny_dit(), conditioning("t2v", SIZE), SamplerSettings(steps=4, solver="unipc")
    whole = sample(dit, cond, SIZE, settings, RUNTIME)
    calls = itertools.count()
    hook = dit.blocks[3].register_forward_hook(lambda *_: full() if next(calls) == 5 else None)

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    with pytest.raises(OutOfMemoryError, match=r"step 3 of 4 .* lower width, height or num_frames") as caught:
        sample(dit, cond, SIZE, settings, RUNTIME, checkpoint=Checkpoint(tmp_path))
    hook.remove()
    kept = list(tmp_path.glob("*.safetensors"))
    assert len(kept) == 1
    assert str(kept[0]) in str(caught.value)
    assert caught.value.latents.shape == whole.shape
    assert torch.equal(sample(dit, cond, SIZE, settings, RUNTIME, checkpoint=Checkpoint(tmp_path)), whole)
    assert not list(tmp_path.iterdir())
