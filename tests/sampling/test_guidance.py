"""Attention guidance (NAG), skip-layer guidance and CFG-Zero*: the authors' values, and off, bit for bit."""

import dataclasses
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from tests.reference import load_case, relative_error, tiny_dit
from tests.sampling.runs import sample, sample_state
from tests.sampling.variants import SMALL, conditioning, small_dit
from wan_core.cache_settings import EasyCacheSettings, TeaCacheSettings
from wan_core.model import VideoModel
from wan_core.planning.estimate import kept_bytes
from wan_core.planning.run import plan_run
from wan_core.runtime import Runtime
from wan_core.sampling.experts import Expert, RunInputs
from wan_core.sampling.guidance import Guided, first_steps
from wan_core.sampling.predictor import AllBlocks, ModelPredictor, TimeTable
from wan_core.settings import (
    CFG_MODES,
    GuidanceSettings,
    MemorySettings,
    NagSettings,
    SamplerSettings,
    SkipSettings,
    WindowSettings,
)
from wan_core.types import Conditioning, LatentSize, StepInfo, VaceInput
from wan_core.variants import match_variant

RUNTIME = Runtime(device=torch.device("cpu"), dtype=torch.float32)
PUBLISHED = load_case("guidance")


@cache
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    shapes = {
        "x": (16, 2, 4, 6), "text": (12, 64), "negative": (12, 64), "vace": (96, 2, 4, 6), "concat": (20, 2, 4, 6),
        "image": (257, 1280),
    }  # fmt: skip
    return {name: torch.randn(1, *shape, generator=generator) for name, shape in shapes.items()}


def at_700(variant: str, **guidance) -> Tensor:
    """The guided velocity of the tiny model at timestep 700."""
    given, dit = inputs(), tiny_dit(variant)
    cond = Conditioning(text=given["text"], negative_text=given["negative"])
    if variant == "i2v":
        cond = dataclasses.replace(cond, concat=given["concat"], image_tokens=given["image"])
    if variant == "vace":
        cond = dataclasses.replace(cond, vace=(VaceInput(context=given["vace"]),))
    settings = GuidanceSettings(**guidance)
    time = TimeTable(dit, [[700.0]], cond)
    model = ModelPredictor(dit, time, AllBlocks(dit, RUNTIME), guidance=settings)
    return Guided(model, settings)(given["x"], 700.0, cond, StepInfo(0, 1))


NAG = NagSettings(scale=11.0, tau=2.5, alpha=0.25)
CASES = {
    "nag_11_2.5_0.25": {"scale": 1.0, "nag": NAG},
    "nag_5_1_0.5": {"scale": 1.0, "nag": NagSettings(scale=5.0, tau=1.0, alpha=0.5)},
    "slg_4_3": {"scale": 4.0, "skip": SkipSettings(blocks=(1, 2), scale=3.0)},
    "slg_negative_4": {"scale": 4.0, "skip": SkipSettings(blocks=(1, 2))},
    "zero_star_4": {"scale": 4.0, "zero_star": True},
    "positive": {"scale": 1.0},
    "negative": {"scale": 0.0},
}


@pytest.mark.parametrize("name", [name for name in PUBLISHED.tensors if "." in name])
@torch.no_grad()
def test_a_velocity_is_that_of_the_authors(name):
    variant, case = name.split(".", 1)
    assert torch.equal(inputs()["x"], PUBLISHED["x"])
    assert relative_error(at_700(variant, **CASES[case]), PUBLISHED[name]) < 1e-4


SIZE = LatentSize(4, 2, 4)
GUIDANCE = {
    "nag": {"scale": 1.0, "nag": NAG},
    "nag at first": {"scale": 3.0, "nag": dataclasses.replace(NAG, end=0.5)},
    "skip": {"scale": 3.0, "skip": SkipSettings(blocks=(1,), scale=2.0, start=0.3, end=0.8)},
    "skip of the negative": {"scale": 3.0, "skip": SkipSettings(blocks=(0, 2), start=0.3, end=0.8)},
    "all": {"scale": 3.0, "nag": NAG, "skip": SkipSettings(blocks=(1,), scale=2.0), "zero_star": True, "zero_steps": 1},
}
TEACACHE = TeaCacheSettings(threshold=1000.0, template="Wan2.1-T2V-1.3B", start_step=2)
FEATURES = {
    "none": ({}, {}),
    "teacache": ({"cache": TEACACHE}, {"cache": dataclasses.replace(TEACACHE, threshold=0.0)}),
    "easycache": (
        {"cache": EasyCacheSettings(threshold=1000.0, start_step=2)},
        {"cache": EasyCacheSettings(threshold=0.0, start_step=2)},
    ),
    "windows": (
        {"windows": WindowSettings(size=3, stride=2)}, {"windows": WindowSettings(size=SIZE.frames, stride=2)}
    ),
    "chain": ({"windows": WindowSettings(size=3, stride=2, mode="chain")}, {}),
    "kept": ({"keep_projections": True}, {}),
    "heun": ({"solver": "heun"}, {"solver": "heun"}),
}  # fmt: skip
shared_dit = cache(small_dit)


def run(variant: str, guidance: dict, mode: str = "sequential", steps: int = 5, **settings) -> Tensor:
    size = dataclasses.replace(SIZE, geometry=SMALL[variant].geometry)
    cond = dataclasses.replace(conditioning(variant, SIZE, models=SMALL), motion_bucket=None)
    settings = SamplerSettings(
        steps=steps, seed=2, shift=3.0, guidance=GuidanceSettings(mode=mode, **guidance), **settings
    )
    return sample(shared_dit(variant), cond, size, settings, RUNTIME)


VARIANTS = ("t2v", "vace", "i2v", "ti2v_5b", "fun_v1_1_control")


TOGETHER = [
    (name, feature, VARIANTS[(i + j) % len(VARIANTS)])
    for i, name in enumerate(GUIDANCE)
    for j, feature in enumerate(FEATURES)
]


@pytest.mark.parametrize(("name", "feature", "variant"), TOGETHER)
def test_guidance_goes_with_caches_windows_and_modes(name, feature, variant):
    guidance, (on, without_effect) = GUIDANCE[name], FEATURES[feature]
    result = partial(run, variant, guidance)
    plain = result(**on)
    assert not torch.equal(plain, run(variant, {"scale": guidance["scale"]}, **on))
    for mode in CFG_MODES[1:]:
        assert relative_error(result(mode, **on), plain) < 1e-5
    if feature in ("kept",):
        assert torch.equal(plain, result())
    elif feature != "heun":
        assert torch.equal(result(**without_effect), result())


OFF = [
    {"nag": NagSettings(scale=1.0)},
    {"nag": NagSettings(scale=0.0)},
    {"nag": NagSettings(scale=11.0, alpha=0.0)},
    {"skip": SkipSettings(blocks=(1,), scale=0.0)},
    {"skip": SkipSettings(scale=3.0)},
    {"zero_star": False, "zero_steps": 0},
]


@pytest.mark.parametrize("off", OFF, ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_what_is_off_changes_no_bit(off, scale):
    assert torch.equal(run("vace", {"scale": scale, **off}), run("vace", {"scale": scale}))


@pytest.mark.parametrize("mode", CFG_MODES)
@pytest.mark.parametrize("name", GUIDANCE)
def test_branches_run_as_planned(name, mode):
    """Each branch once a step, and a skipped block for the others only."""
    dit, rows = small_dit("t2v"), []
    dit.blocks[1].register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    cond = dataclasses.replace(conditioning("t2v", SIZE, models=SMALL), motion_bucket=None)
    settings = GuidanceSettings(mode=mode, **GUIDANCE[name])
    sample(dit, cond, SIZE, SamplerSettings(steps=4, guidance=settings), RUNTIME)
    steps = 4 - settings.zero_steps
    assert sum(rows) == steps * (1 + settings.has_negative)
    assert settings.branches == 1 + settings.has_negative + (name in ("skip", "all"))


def test_steps_without_a_cached_result_of_their_branch_are_computed():
    skip = SkipSettings(blocks=(1,), scale=2.0, start=0.3, end=0.8)
    assert first_steps(GuidanceSettings(scale=1.0, skip=skip), 11) == {0, 3}
    of_negative = dataclasses.replace(skip, scale=None)
    assert first_steps(GuidanceSettings(scale=3.0, skip=of_negative), 11) == {0, 3, 9}


@pytest.mark.parametrize("name", GUIDANCE)
def test_a_run_in_two_parts_is_the_run_in_one(name):
    dit, cond = shared_dit("vace"), conditioning("vace", SIZE, models=SMALL)
    settings = SamplerSettings(steps=5, solver="unipc", cache=TEACACHE, guidance=GuidanceSettings(**GUIDANCE[name]))
    whole = sample(dit, cond, SIZE, settings, RUNTIME)
    first = sample_state(dit, cond, SIZE, dataclasses.replace(settings, end_step=3), RUNTIME)
    second = sample_state(dit, cond, SIZE, dataclasses.replace(settings, start_step=3), RUNTIME, earlier=first)
    assert torch.equal(second.video, whole)
    other = dataclasses.replace(
        settings, guidance=GuidanceSettings(**{**GUIDANCE[name], "nag": NagSettings(scale=2.0)})
    )
    assert sample_state(dit, cond, SIZE, dataclasses.replace(other, end_step=3), RUNTIME).run != first.run


@pytest.mark.parametrize("name", GUIDANCE)
@torch.no_grad()
def test_two_equal_experts_streamed_are_one_resident_model(name):
    dits = small_dit("t2v"), small_dit("t2v")
    cond = dataclasses.replace(conditioning("t2v", SIZE, models=SMALL), motion_bucket=None)
    settings = SamplerSettings(steps=4, guidance=GuidanceSettings(**GUIDANCE[name]))
    pair = VideoModel((Expert(dits[0], 900.0), Expert(dits[1])), match_variant(dits[0].config), None, "pair")
    state = pair.sample(RunInputs(cond, SIZE), settings, MemorySettings(persistent_params=0), RUNTIME)
    assert relative_error(state.video, sample(dits[0], cond, SIZE, settings, RUNTIME)) < 1e-5


@torch.no_grad()
def test_experts_may_have_guidance_of_their_own():
    dits = small_dit("t2v"), small_dit("t2v")
    cond = dataclasses.replace(conditioning("t2v", SIZE, models=SMALL), motion_bucket=None)
    both = GuidanceSettings(scale=1.0, scale_low=3.0, nag=NAG, skip=SkipSettings(blocks=(1,)))
    assert [both.of_expert(number).has_negative for number in (0, 1)] == [False, True]

    def run_pair(lowest, guidance):
        pair = VideoModel((Expert(dits[0], lowest), Expert(dits[1])), match_variant(dits[0].config), None, "pair")
        settings = SamplerSettings(steps=4, guidance=guidance)
        return pair.sample(RunInputs(cond, SIZE), settings, MemorySettings(), RUNTIME).video

    alone = GuidanceSettings(scale=3.0, nag=NAG, skip=SkipSettings(blocks=(1,)))
    assert torch.equal(run_pair(1001.0, both), run_pair(1001.0, alone))  # the second expert alone works
    assert torch.equal(run_pair(0.0, both), run_pair(0.0, GuidanceSettings(scale=1.0, nag=NAG)))


@pytest.mark.parametrize("mode", CFG_MODES)
@pytest.mark.parametrize("name", GUIDANCE)
def test_the_bytes_of_kept_projections_are_those_that_a_run_keeps(name, mode):
    dit, kept = small_dit("i2v"), set()
    attend = dit.attend

    def watching(q, k, v):
        if k.shape[1] != q.shape[1]:
            kept.update((tensor.data_ptr(), tensor.nbytes) for tensor in (k, v))
        return attend(q, k, v)

    dit.attend = watching
    cond = conditioning("i2v", SIZE, models=SMALL)
    guidance = GuidanceSettings(mode=mode, **GUIDANCE[name])
    sample(dit, cond, SIZE, SamplerSettings(steps=5, guidance=guidance, keep_projections=True), RUNTIME)
    used = sum(size for _, size in kept)
    assert used <= kept_bytes(dit.config, cond, torch.float32, guidance)
    assert kept_bytes(dit.config, cond, torch.float32, guidance) <= 2 * used


def test_a_plan_counts_every_branch():
    dit, cond = small_dit("t2v"), dataclasses.replace(conditioning("t2v", SIZE, models=SMALL), motion_bucket=None)

    def planned(**guidance):
        settings = SamplerSettings(guidance=GuidanceSettings(mode="interleaved", **guidance))
        return plan_run(dit, cond, SIZE, settings, MemorySettings(), lambda _: None)

    plain, nag, skip = (planned(**case) for case in ({"scale": 3.0}, {"scale": 3.0, "nag": NAG}, GUIDANCE["skip"]))
    assert plain.flops < nag.flops < skip.flops == pytest.approx(1.5 * plain.flops)
    assert plain.activations < min(nag.activations, skip.activations)


WRONG = [
    (NagSettings, {"scale": -1.0}, "nag_scale must be"),
    (NagSettings, {"tau": 0.5}, "nag_tau must be"),
    (NagSettings, {"alpha": 1.5}, "nag_alpha must be"),
    (SkipSettings, {"blocks": (-1,)}, "skip_blocks must be"),
    (SkipSettings, {"start": 0.6, "end": 0.5}, "skip_start must not be after"),
    (GuidanceSettings, {"scale": 1.0, "skip": SkipSettings(blocks=(1,))}, "set skip_scale"),
]


@pytest.mark.parametrize(("kind", "values", "words"), WRONG)
def test_wrong_settings_are_refused(kind, values, words):
    with pytest.raises(ValueError, match=words):
        kind(**values)


def test_what_only_a_run_can_know_is_refused_before_it():
    with pytest.raises(ValueError, match="skip_blocks has block 7; this model has blocks 0 to 2"):
        run("t2v", {"scale": 3.0, "skip": SkipSettings(blocks=(1, 7))})
    cond = Conditioning(text=torch.zeros(1, 12, 64))
    settings = SamplerSettings(guidance=GuidanceSettings(scale=1.0, nag=NAG))
    with pytest.raises(ValueError, match="nag_scale needs a negative prompt"):
        sample(small_dit("t2v"), cond, SIZE, settings, RUNTIME)
