"""Step caches: the published decisions, the plan, what is skipped and what is kept."""

import dataclasses
import json
import logging
from typing import Any

import pytest
import torch

from tests.reference import load_case, relative_error, tiny_dit
from tests.sampling.runs import sample
from wan_core.cache_settings import (
    CACHE_PRESETS,
    EasyCacheSettings,
    FirstBlockSettings,
    MagCacheSettings,
    TeaCacheSettings,
)
from wan_core.catalog import CATALOG
from wan_core.model import VideoModel
from wan_core.runtime import Cancelled, Runtime
from wan_core.sampling import skip_rules
from wan_core.sampling.cache_tables import MAGNITUDE_RATIOS, TEACACHE_COEFFICIENTS
from wan_core.sampling.checkpoint import Checkpoint
from wan_core.sampling.compose import build_solver, compose
from wan_core.sampling.experts import Expert, RunInputs
from wan_core.sampling.run import denoise
from wan_core.settings import GuidanceSettings, MemorySettings, SamplerSettings, WindowSettings
from wan_core.types import Conditioning, LatentSize, VaceInput
from wan_core.variants import match_variant

RUNTIME = Runtime(device=torch.device("cpu"), dtype=torch.float32)
SIZE = LatentSize(3, 4, 6)
CASE = load_case("teacache")
FLAGS = [name for name in CASE.tensors if "@" in name]


@pytest.mark.parametrize("name", FLAGS)
def test_decisions_equal_the_published_ones(name):
    template, threshold = name.split("@")
    expected, modulations = CASE[name].tolist(), CASE["t_mod"]
    settings = TeaCacheSettings(template=template, threshold=float(threshold))
    assert list(skip_rules.teacache_plan(modulations, settings).skipped) == expected
    rule = skip_rules.OnlineRule(TEACACHE_COEFFICIENTS[template], float(threshold), len(expected))
    online = [rule.skips(i, skip_rules.changes(modulations[max(i - 1, 0) : i + 1] if i else modulations[:2])[0])
              for i in range(len(expected))]  # fmt: skip
    assert online == expected


def test_there_is_a_case_for_every_template_and_a_template_for_every_published_model():
    assert {name.split("@")[0] for name in FLAGS} == set(TEACACHE_COEFFICIENTS)
    assert {row.preset.teacache for row in CATALOG} <= set(TEACACHE_COEFFICIENTS)


@pytest.mark.parametrize("template", TEACACHE_COEFFICIENTS)
def test_thresholds_from_nothing_to_everything(template):
    def computed(threshold, **changes):
        settings = TeaCacheSettings(template=template, threshold=threshold, **changes)
        plan = skip_rules.teacache_plan(CASE["t_mod"], settings)
        assert plan.skipped[0] is plan.skipped[-1] is False
        return plan

    assert computed(0.0).computed_steps == 30
    everything = computed(1000.0)
    assert everything.computed_steps == 2
    assert "computes 2 of 30 steps, about 13.2x faster" in everything.summary()
    assert computed(1000.0, start_step=5).skipped == (*[False] * 5, *[True] * 24, False)


@pytest.mark.parametrize("speedup", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("template", TEACACHE_COEFFICIENTS)
def test_a_target_speedup_is_solved_for(template, speedup):
    def planned(**changes):
        return skip_rules.teacache_plan(CASE["t_mod"], TeaCacheSettings(template=template, **changes))

    plan = planned(threshold=None, speedup=speedup)
    assert plan.speedup >= speedup
    assert plan == planned(threshold=plan.threshold)
    assert plan.threshold == 0 or planned(threshold=plan.threshold * 0.999).speedup < plan.speedup


def test_a_speedup_is_found_where_coefficients_estimate_less_than_nothing():
    modulations = torch.arange(12.0)[:, None].add(1000).expand(12, 6)
    settings = TeaCacheSettings(threshold=None, speedup=2.3, template="Wan2.1-T2V-1.3B")
    assert skip_rules.teacache_plan(modulations, settings).speedup >= 2.3


def test_impossible_wishes_are_refused():
    with pytest.raises(ValueError, match=r"cannot make this run 50x faster; .* computes 2 of 30"):
        template = next(iter(TEACACHE_COEFFICIENTS))
        skip_rules.teacache_plan(CASE["t_mod"], TeaCacheSettings(template=template, threshold=None, speedup=50.0))
    with pytest.raises(ValueError, match="not both"):
        TeaCacheSettings(threshold=0.1, speedup=2.0)
    with pytest.raises(ValueError, match="TeaCache has no coefficients"):
        TeaCacheSettings().with_template(None)
    assert TeaCacheSettings().with_template("Wan2.1-T2V-14B").template == "Wan2.1-T2V-14B"
    with pytest.raises(ValueError, match="template must be one of"):
        skip_rules.teacache_plan(CASE["t_mod"], TeaCacheSettings())


def conditioning(**fields) -> Conditioning:
    text, negative = torch.randn(2, 1, 512, 64, generator=torch.Generator().manual_seed(5))
    return Conditioning(text=text, negative_text=negative, **fields)


def counted(dit) -> list[int]:
    """A list that grows by the index of every block that runs."""
    ran = []
    for index, block in enumerate(dit.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    for block in getattr(dit, "vace_blocks", ()):
        block.register_forward_hook(lambda *_: ran.append("vace"))
    return ran


def run(dit, cond, **changes):
    settings = {"steps": 8, "seed": 1} | changes
    return sample(dit, cond, SIZE, SamplerSettings(**settings), RUNTIME)


EVERYTHING = TeaCacheSettings(threshold=1000.0, template="Wan2.1-T2V-1.3B")


def test_skipped_steps_run_no_block_and_no_vace_block(caplog):
    dit = tiny_dit("vace")
    cond = conditioning(vace=(VaceInput(context=torch.randn(1, 96, *SIZE.shape)),))
    ran = counted(dit)
    with caplog.at_level(logging.INFO, "wancore"):
        run(dit, cond, cache=EVERYTHING)
    assert "computes 2 of 8 steps, about 3.9x faster" in caplog.text
    assert ran.count(0) == 2 * 2
    assert ran.count("vace") == 2 * 2 * len(dit.vace_blocks)


def test_a_skipped_step_adds_what_the_last_computed_one_changed():
    dit, cond = tiny_dit(), conditioning()
    seen = []
    original = type(dit).unembed

    class Watched(type(dit)):
        def unembed(self, state):
            seen.append(state.tokens.clone())
            return original(self, state)

        def embed(self, *args):
            state = super().embed(*args)
            seen.append(state.tokens.clone())
            return state

    dit.__class__ = Watched
    run(dit, cond, cache=EVERYTHING, guidance=GuidanceSettings(scale=1.0))
    first_in, first_out, second_in, second_out = seen[:4]
    assert torch.allclose(second_out - second_in, first_out - first_in, atol=1e-5)


@pytest.mark.parametrize(
    "cache", [dataclasses.replace(EVERYTHING, threshold=0.0), EasyCacheSettings(threshold=0.0, start_step=2)]
)
def test_threshold_zero_is_off(cache):
    dit, cond = tiny_dit(), conditioning()
    assert torch.equal(run(dit, cond, cache=cache), run(dit, cond))


def test_too_few_steps_switch_the_cache_off_and_say_so(caplog):
    dit, cond = tiny_dit(), conditioning()
    assert torch.equal(run(dit, cond, steps=3, cache=EVERYTHING), run(dit, cond, steps=3))
    assert "at least 4 steps, this run has 3" in caplog.text


def test_branches_and_windows_have_a_state_each():
    dit, cond, windows = tiny_dit(), conditioning(), WindowSettings(size=2, stride=1)
    settings = SamplerSettings(steps=5, cache=EVERYTHING, windows=windows)
    solver = build_solver(settings)
    parts = compose(dit, solver, cond, SIZE.frames, settings, RUNTIME)
    with torch.no_grad():
        denoise(parts.predict, solver, torch.randn(1, 16, *SIZE.shape), cond, RUNTIME, steps=range(3))
    names = {f"residual.{branch}.{window}" for branch in ("positive", "negative") for window in (0, 1)}
    assert set(parts.memories["cache"].memory) == names
    values = list(parts.memories["cache"].memory.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


@pytest.mark.parametrize("on_cpu", [False, True])
def test_residuals_have_the_compute_dtype_and_the_place_that_was_asked_for(on_cpu):
    dit = tiny_dit().to(torch.bfloat16)
    dit.exact = True
    settings = SamplerSettings(steps=5, cache=dataclasses.replace(EVERYTHING, residual_on_cpu=on_cpu))
    solver, cond = build_solver(settings), conditioning()
    parts = compose(dit, solver, cond, SIZE.frames, settings, RUNTIME)
    with torch.no_grad():
        denoise(parts.predict, solver, torch.randn(1, 16, *SIZE.shape), cond, RUNTIME, steps=range(2))
    kept = parts.memories["cache"].memory
    assert {value.dtype for value in kept.values()} == {torch.bfloat16}
    assert {value.device.type for value in kept.values()} == {"cpu"}


@pytest.mark.parametrize("threshold", [0.02, 1000.0])
def test_easycache_skips_more_with_a_higher_threshold(threshold):
    dit, cond = tiny_dit(), conditioning()
    ran = counted(dit)
    run(dit, cond, steps=12, cache=EasyCacheSettings(threshold=threshold, start_step=3))
    computed = ran.count(0) // 2
    assert computed == 4 if threshold > 1 else 4 < computed <= 12


def test_caches_stay_near_the_full_result():
    dit, cond = tiny_dit(), conditioning()
    full = run(dit, cond, steps=20)
    few = run(dit, cond, steps=4)
    cached = run(dit, cond, steps=20, cache=EasyCacheSettings(threshold=0.05, start_step=4))
    assert relative_error(cached, full) < relative_error(few, full)


REFERENCE = load_case("step_caches")
"""What the authors of MagCache and of DBCache compute: runs of their code on the tiny model, and the plans of MagCache
for its published ratios.
"""


def told(name: str) -> Any:
    return json.loads(REFERENCE.metadata[name])


def numbers(key: str, *kinds: type) -> list[Any]:
    return [kind(text) for kind, text in zip(kinds, key.split("@")[1:], strict=True)]


@pytest.mark.parametrize("kind", ["plans", "pairs"])
def test_magcache_plans_equal_the_published_ones(kind):
    for key, expected in told(kind).items():
        template = key.split("@")[0]
        if kind == "plans":
            steps, threshold, most, retention = numbers(key, int, float, int, float)
            shares = [range(steps)]
        else:
            split, steps, threshold, most, retention = numbers(key, int, int, float, int, float)
            shares = [range(split), range(split, steps)]
        settings = MagCacheSettings(threshold=threshold, max_skips=most, retention=retention, template=template)
        plan = skip_rules.magcache_plan(settings, shares)
        assert "".join(".x"[skipped] for skipped in plan.skipped) == expected, key


def run_of_the_reference(cache, scale: float = 3.0):
    """The latents of the authors' run, which steps ran the last block, and the parts of the run."""
    dit, ran, shown = tiny_dit(), [], []
    dit.blocks[-1].register_forward_hook(lambda *_: ran.append(1))
    cond = Conditioning(text=REFERENCE["text"], negative_text=REFERENCE["negative_text"])
    sigmas = (*told("sigmas"),)
    settings = SamplerSettings(sigmas=sigmas, guidance=GuidanceSettings(scale=scale), cache=cache)
    solver, magnitudes = build_solver(settings), skip_rules.Magnitudes()
    parts = compose(dit, solver, cond, 2, settings, RUNTIME, magnitudes=magnitudes)

    def on_step(*_):
        shown.append(not ran)
        ran.clear()

    with torch.no_grad():
        x = denoise(parts.predict, solver, REFERENCE["x"], cond, RUNTIME, on_step=on_step)
    return x, shown, magnitudes


def test_measured_ratios_equal_the_published_measurement():
    x, skipped, magnitudes = run_of_the_reference(MagCacheSettings(template="measure"))
    assert relative_error(x, REFERENCE["plain"]) < 1e-4 and not any(skipped)
    assert magnitudes.memory["ratios"][1:].tolist() == pytest.approx(told("measured"), abs=2e-5)


@pytest.mark.parametrize("key", [name for name in REFERENCE.tensors if name.startswith("magcache@")])
def test_a_run_with_magcache_equals_that_of_its_authors(key):
    threshold, most, retention = numbers(key, float, int, float)
    ratios = tuple(told("measured"))
    settings = MagCacheSettings(threshold=threshold, max_skips=most, retention=retention, ratios=ratios)
    x, skipped, _ = run_of_the_reference(settings)
    assert skipped == told(key)
    assert relative_error(x, REFERENCE[key]) < 1e-4


@pytest.mark.parametrize("key", [name for name in REFERENCE.tensors if name.startswith("first@")])
def test_a_run_with_a_first_block_cache_equals_that_of_its_authors(key):
    threshold, blocks, start, most = numbers(key, float, int, int, int)
    settings = FirstBlockSettings(threshold=threshold, blocks=blocks, start_step=start, max_skips=most)
    x, skipped, _ = run_of_the_reference(settings, scale=1.0)
    assert skipped == told(key)
    assert relative_error(x, REFERENCE[key]) < 1e-4


def test_ratios_are_spread_over_any_number_of_steps():
    assert skip_rules.spread_over((0.9, 0.8, 0.7), 4) == [1.0, 0.9, 0.8, 0.7]
    assert skip_rules.spread_over((0.9, 0.8, 0.7), 7) == [1.0, 1.0, 0.9, 0.8, 0.8, 0.8, 0.7]
    assert skip_rules.spread_over((0.9, 0.8, 0.7), 1) == [0.7]


@pytest.fixture
def stored(tmp_path):
    """A model of two experts that was read from files."""
    files = [tmp_path / f"{name}.safetensors" for name in ("high", "low")]
    experts = [Expert(tiny_dit(), 800.0, files=(files[0],)), Expert(tiny_dit(seed=1), files=(files[1],))]
    return VideoModel(tuple(experts), match_variant(experts[0].dit.config), None, "mine")


def test_ratios_are_measured_once_and_kept_beside_the_model(stored, tmp_path, monkeypatch):
    inputs = RunInputs(conditioning(), SIZE)
    settings = SamplerSettings(steps=6, guidance=GuidanceSettings(scale=1.0))
    measuring = dataclasses.replace(settings, cache=MagCacheSettings(template="measure"))
    plain = stored.sample(inputs, settings, MemorySettings(), RUNTIME)
    assert torch.equal(stored.sample(inputs, measuring, MemorySettings(), RUNTIME).video, plain.video)
    path = tmp_path / "high.safetensors.magcache.json"
    assert list(tmp_path.iterdir()) == [path]
    found = json.loads(path.read_text())["magnitude_ratios"]
    cache = stored.resolved(MagCacheSettings())
    assert cache.ratios == tuple(found) and len(found) == 5 and all(0 < ratio < 10 for ratio in found)

    def cut_off(phase, done, total, latents):
        if done == 4:
            raise Cancelled

    path.unlink()
    watched = dataclasses.replace(RUNTIME, on_progress=cut_off)
    with pytest.raises(Cancelled):
        stored.sample(inputs, measuring, MemorySettings(), watched, checkpoint=Checkpoint(tmp_path / "runs", 1))
    stored.sample(inputs, measuring, MemorySettings(), RUNTIME, checkpoint=Checkpoint(tmp_path / "runs", 1))
    assert json.loads(path.read_text())["magnitude_ratios"] == found, "an interrupted measurement goes on"

    path.write_text('{"magnitude_ratios": [1, "two"]}')
    with pytest.raises(ValueError, match="holds no ratios for MagCache: A magnitude ratio must be a number"):
        stored.resolved(MagCacheSettings())
    nowhere = dataclasses.replace(stored, experts=(Expert(stored.experts[0].dit),))
    with pytest.raises(ValueError, match="not loaded from a file"):
        nowhere.sample(inputs, measuring, MemorySettings(), RUNTIME)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"threshold": -1.0}, "MagCache threshold must be from 0"),
        ({"max_skips": 0}, "max_skips must be a whole number from 1"),
        ({"retention": 1.5}, "retention must be from 0 to 1"),
        ({"template": "Wan3"}, "MagCache template must be one of auto, measure"),
        ({"ratios": (1.0,)}, "from 2 to 10000 ratios"),
        ({"ratios": (1.0, float("nan"))}, "magnitude ratio must be a number"),
    ],
)
def test_bad_settings_of_magcache_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        MagCacheSettings(**values)


def test_published_ratios_are_taken_by_the_name_of_a_model():
    dit = tiny_dit()
    for row in CATALOG:
        model = VideoModel.of(dit, match_variant(dit.config), row, row.model_id)
        if row.short_name in MAGNITUDE_RATIOS:
            assert model.resolved(MagCacheSettings()).template == row.short_name
    assert {row.short_name for row in CATALOG} >= {
        name.removesuffix(" image") for name in MAGNITUDE_RATIOS if name != "tiny"
    }


def test_presets_skip_more_from_one_to_the_next():
    for kind in (TeaCacheSettings, EasyCacheSettings, MagCacheSettings, FirstBlockSettings):
        chosen = [kind.preset(name) for name in CACHE_PRESETS]
        assert all(type(settings) is kind for settings in chosen)
        numbers = [settings.speedup if kind is TeaCacheSettings else settings.threshold for settings in chosen]
        assert numbers == sorted(set(numbers))
    with pytest.raises(ValueError, match="cache preset must be one of careful, balanced, fast"):
        MagCacheSettings.preset("slow")
