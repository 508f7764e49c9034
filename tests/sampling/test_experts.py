"""A model of two experts takes its steps with one after the other, and only one of them is ever on the device."""

import copy
import functools
import json
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.lora.fixtures import WRITERS, factors, linear_paths
from tests.reference import arguments, load_case, relative_error
from tests.sampling.test_identities import CACHES, WINDOWS, in_pairs
from tests.sampling.variants import SMALL, conditioning, small_dit
from wan_core.cache_settings import FirstBlockSettings, MagCacheSettings, TeaCacheSettings
from wan_core.model import VideoModel
from wan_core.offload import weights as offload
from wan_core.offload.blocks import weights_of
from wan_core.offload.streaming import PlainCopies
from wan_core.runtime import Cancelled, Runtime
from wan_core.sampling.checkpoint import Checkpoint, RunState
from wan_core.sampling.compose import build_solver, compose
from wan_core.sampling.experts import Expert, RunInputs, RunModel, expert_at
from wan_core.settings import CFG_MODES, GuidanceSettings, MemorySettings, SamplerSettings, WindowSettings
from wan_core.types import LatentSize, StepInfo
from wan_core.variants import match_variant

CPU = torch.device("cpu")
RUNTIME = Runtime(device=CPU, dtype=torch.float32)
SIZE = LatentSize(4, 4, 4)
INPUTS = RunInputs(replace(conditioning("t2v", SIZE, models=SMALL), motion_bucket=None), SIZE)
STEPS, SPLIT = 5, 2
PLAIN = GuidanceSettings(scale=1.0)
GUIDED = GuidanceSettings(scale=3.0)
RUNS = {
    "euler": {"guidance": PLAIN},
    "unipc": {"guidance": PLAIN, "solver": "unipc"},
    "heun": {"guidance": PLAIN, "solver": "heun"},
    "guided dpm++": {"guidance": GUIDED, "solver": "dpm++"},
    "batched": {"guidance": replace(GUIDED, mode="batched")},
    "TeaCache": {"guidance": GUIDED, "cache": TeaCacheSettings(threshold=0.5, template="Wan2.1-T2V-1.3B")},
    "first block": {"guidance": GUIDED, "cache": FirstBlockSettings(threshold=0.5, start_step=1)},
    "MagCache": {"guidance": GUIDED, "cache": MagCacheSettings(threshold=0.5, template="Wan2.2-T2V-A14B")},
    "windows": {"guidance": PLAIN, "windows": WindowSettings(size=3, stride=2)},
}
CHAIN = WindowSettings(size=3, stride=2, mode="chain")
ALL, NONE = MemorySettings(), MemorySettings(persistent_params=0)


@pytest.fixture(scope="module")
def dits():
    high, low = small_dit("t2v"), small_dit("t2v")
    generator = torch.Generator().manual_seed(0)
    for weight in low.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    return high, low


@pytest.fixture(scope="module")
def lora(dits, tmp_path_factory):
    file = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file(WRITERS["ComfyUI"](factors(dits[0], linear_paths(dits[0]))), file)
    return file


def settings_of(**changes) -> SamplerSettings:
    return SamplerSettings(**{"steps": STEPS, "seed": 3, "shift": 3.0} | changes)


def pair(dits, settings: SamplerSettings, split: int = SPLIT) -> VideoModel:
    """The first `split` steps belong to the first expert."""
    timesteps = [*build_solver(settings).timesteps, 0.0]
    lowest = timesteps[split - 1] if split else 1001.0
    return VideoModel((Expert(dits[0], lowest), Expert(dits[1])), match_variant(dits[0].config), None, "pair")


def alone(dit) -> VideoModel:
    return VideoModel.of(dit, match_variant(dit.config), None, "one")


def one_after_the_other(first: VideoModel, second: VideoModel, settings, memory=ALL, split: int = SPLIT) -> RunState:
    state = first.sample(INPUTS, replace(settings, end_step=split), memory, RUNTIME)
    return second.sample(INPUTS, replace(settings, start_step=split), memory, RUNTIME, earlier=state)


@pytest.mark.parametrize("memory", [ALL, NONE], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", [name for name in RUNS if name != "MagCache"])  # its plan is one for both
def test_a_pair_gives_what_its_experts_give_one_after_the_other(dits, name, memory):
    settings = settings_of(**RUNS[name])
    got = pair(dits, settings).sample(INPUTS, settings, memory, RUNTIME)
    expected = one_after_the_other(alone(dits[0]), alone(dits[1]), settings, memory)
    assert torch.equal(got.video, expected.video)
    for dit in dits:
        assert not torch.equal(got.video, alone(dit).sample(INPUTS, settings, memory, RUNTIME).video)


@pytest.mark.parametrize("memory", [ALL, NONE], ids=["whole", "streamed"])
@pytest.mark.parametrize("expert", [0, 1, None])
@pytest.mark.parametrize("strength", [1.0, (1.0, -1.0)], ids=["constant", "curve"])
def test_a_lora_changes_the_experts_that_it_is_meant_for(dits, lora, expert, strength, memory):
    settings = settings_of(guidance=PLAIN)
    changed, report = pair(dits, settings).with_lora(lora, strength=strength, expert=expert)
    assert report.summary
    singles = [
        alone(dit).with_lora(lora, strength=strength)[0] if expert in (None, number) else alone(dit)
        for number, dit in enumerate(dits)
    ]
    got = changed.sample(INPUTS, settings, memory, RUNTIME).video
    assert torch.equal(got, one_after_the_other(*singles, settings, memory).video)
    plain = pair(dits, settings).sample(INPUTS, settings, memory, RUNTIME).video
    assert not torch.equal(got, plain)
    assert torch.equal(changed.without_loras().sample(INPUTS, settings, memory, RUNTIME).video, plain)


class Counted(PlainCopies):
    """Copies as to another device, which know whose weights are there."""

    def __init__(self, dits) -> None:
        super().__init__(CPU)
        self.owners = {w.data_ptr(): n for n, dit in enumerate(dits) for w in weights_of(dit).values()}
        self.copies: list[tuple[int, weakref.ref]] = []
        self.brought: list[int] = []

    def whole(self, weight, dtype):
        owner, copy = self.owners[weight.data_ptr()], weight.clone()
        if self.brought[-1:] != [owner]:
            self.brought.append(owner)
        self.copies.append((owner, weakref.ref(copy)))
        there = {owner for owner, copy in self.copies if copy() is not None}
        assert there == {owner}, "both experts are on the device"
        return copy

    @property
    def bytes(self) -> int:
        return sum(copy().nbytes for _, copy in self.copies if copy() is not None)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("changes", "brought"),
    [({}, [0, 1]), ({"end_step": SPLIT}, [0]), ({"windows": CHAIN}, [0, 1, 0, 1])],
    ids=["both", "a part", "a chain of clips"],
)
def test_one_expert_is_on_the_device_at_a_time(dits, monkeypatch, changes, brought, keep):
    copies = Counted(dits)
    monkeypatch.setattr(offload, "copies_for", lambda device: copies)
    settings = settings_of(guidance=PLAIN, **changes)
    model = pair(dits, settings)
    model.sample(INPUTS, settings, ALL, RUNTIME, keep=keep)
    assert copies.brought == brought
    assert copies.bytes == (sum(w.nbytes for w in weights_of(dits[brought[-1]]).values()) if keep else 0)
    before = len(copies.copies)
    model.sample(INPUTS, settings, ALL, RUNTIME)
    single = keep and brought == [0]
    assert (len(copies.copies) == before) == single, "what was kept need not be brought again"


@pytest.mark.parametrize(("split", "at_work"), [(0, [1]), (STEPS, [0])])
def test_an_expert_without_a_step_is_never_brought(dits, monkeypatch, split, at_work):
    copies = Counted(dits)
    monkeypatch.setattr(offload, "copies_for", lambda device: copies)
    settings = settings_of(guidance=PLAIN)
    got = pair(dits, settings, split).sample(INPUTS, settings, ALL, RUNTIME)
    assert copies.brought == at_work
    assert torch.equal(got.video, alone(dits[at_work[0]]).sample(INPUTS, settings, ALL, RUNTIME).video)


@pytest.mark.parametrize("done", range(1, STEPS))
@pytest.mark.parametrize("cache", ["TeaCache", "first block", "MagCache"])
def test_a_run_that_was_cut_off_goes_on_with_the_expert_at_work(dits, tmp_path, done, cache):
    settings = settings_of(**RUNS[cache], solver="unipc")
    model = pair(dits, settings)
    whole = model.sample(INPUTS, settings, ALL, RUNTIME)

    def cut_off(phase, steps, total, latents):
        if steps == done + 1:
            raise Cancelled

    with pytest.raises(Cancelled):
        model.sample(INPUTS, settings, ALL, replace(RUNTIME, on_progress=cut_off), checkpoint=Checkpoint(tmp_path, 1))
    checkpoint = Checkpoint(tmp_path, 1)
    again = model.sample(INPUTS, settings, ALL, RUNTIME, checkpoint=checkpoint)
    assert checkpoint.resumed and torch.equal(again.video, whole.video)
    other = pair(dits, settings, SPLIT + 1).sample(INPUTS, settings, ALL, RUNTIME, checkpoint=checkpoint)
    assert other.run != again.run, "another boundary is another run"


def test_the_boundary_belongs_to_the_noisier_expert(dits):
    experts = (Expert(dits[0], 875.0), Expert(dits[1]))
    timesteps = (1000.0, 875.0, 874.9999999, 874.9, 0.0)
    assert [expert_at(experts, timestep) for timestep in timesteps] == [0, 0, 0, 1, 1]


HIGH_STEPS = [
    (40, 12, "unipc", 26, 23), (50, 5, "euler", 21, 18), (40, 5, "dpm++", 17, 15), (20, 8, "euler", 11, 10),
    (20, 5, "unipc", 9, 8), (4, 5, "euler", 2, 2), (19, 12, "euler", 13, None), (19, 12, "dpm++", 13, None),
    (19, 12, "unipc", 12, None),
]  # fmt: skip
"""Steps, shift, solver, and how many steps are above the authors' boundaries 0.875 and 0.9."""


@pytest.mark.parametrize(("steps", "shift", "solver", "text", "image"), HIGH_STEPS)
def test_as_many_steps_are_noisy_as_with_the_authors(dits, steps, shift, solver, text, image):
    timesteps = build_solver(SamplerSettings(steps=steps, shift=shift, solver=solver)).timesteps
    for boundary, count in ((0.875, text), (0.9, image)):
        experts = (Expert(dits[0], boundary * 1000), Expert(dits[1]))
        taken = [expert_at(experts, timestep) for timestep in timesteps]
        assert count is None or taken == [0] * count + [1] * (steps - count)


@pytest.mark.parametrize("name", ["t2v_a14b", "t2v_a14b_unipc", "t2v_a14b_dpmpp", "i2v_a14b", "i2v_a14b_unipc"])
def test_each_step_is_taken_by_the_expert_that_took_it_with_the_authors(dits, name):
    case = load_case(name, "e2e")
    call, taken = arguments(case), json.loads(case.metadata["experts"])
    settings = SamplerSettings(steps=call["num_inference_steps"], shift=call["sigma_shift"], solver=call["solver"])
    timesteps = build_solver(settings).timesteps
    assert timesteps == pytest.approx([timestep for timestep, _ in taken], abs=1e-3)
    experts = (Expert(dits[0], call["boundary"] * 1000), Expert(dits[1]))
    assert [("high", "low")[expert_at(experts, timestep)] for timestep in timesteps] == [name for _, name in taken]


@pytest.mark.parametrize("name", RUNS)
def test_a_boundary_at_the_end_leaves_one_expert(dits, name):
    settings = settings_of(**RUNS[name])
    for boundary, expert in ((0, 0), (1.001, 1)):
        model = pair(dits, settings).with_boundary(boundary)
        got = model.sample(INPUTS, settings, ALL, RUNTIME)
        assert torch.equal(got.video, alone(dits[expert]).sample(INPUTS, settings, ALL, RUNTIME).video)
    assert model.boundary == 1.001


@pytest.mark.parametrize("name", [name for name in RUNS if "cache" not in RUNS[name]])
def test_equal_experts_are_one_model(dits, name):
    settings = settings_of(**RUNS[name])
    twins = pair((dits[0], copy.deepcopy(dits[0])), settings)
    expected = alone(dits[0]).sample(INPUTS, settings, ALL, RUNTIME)
    assert torch.equal(twins.sample(INPUTS, settings, ALL, RUNTIME).video, expected.video)


@pytest.mark.parametrize(("cache", "windows", "mode"), in_pairs(CACHES, WINDOWS, CFG_MODES), ids=str)
def test_caches_windows_and_guidance_go_together_over_the_switch(dits, cache, windows, mode):
    (cached, uncached), (cut, whole) = CACHES[cache], WINDOWS[windows]

    @functools.cache
    def result(cache, windows, mode="sequential"):
        settings = settings_of(cache=cache, windows=windows, guidance=replace(GUIDED, mode=mode))
        return pair(dits, settings).sample(INPUTS, settings, ALL, RUNTIME).video

    assert relative_error(result(cached, cut, mode), result(cached, cut)) < 1e-5
    if cut is not None:
        assert torch.equal(result(cached, whole), result(cached, None))
    if cached is not None:
        assert torch.equal(result(uncached, cut), result(None, cut))


@torch.no_grad()
def velocities(dits, guidance: GuidanceSettings) -> list[torch.Tensor]:
    """What guidance gives in each step for the same latents."""
    settings, found = settings_of(guidance=guidance), []
    solver, cond = build_solver(settings), INPUTS.cond
    x = torch.randn(1, 16, *SIZE.shape, generator=torch.Generator().manual_seed(1))
    model = RunModel(pair(dits, settings).experts)
    for number, share in model.shares(solver.timesteps, range(STEPS)):
        active = model.active(number, settings)
        parts = compose(active.dit, solver, cond, SIZE.frames, active.settings, RUNTIME)
        found += [parts.predict(x, solver.timesteps[i], cond, StepInfo(i, STEPS)) for i in share]
    return found


def test_the_guidance_of_an_expert_changes_its_steps_alone(dits):
    plain, high, low, both = (
        velocities(dits, GuidanceSettings(scale=scale, scale_low=second))
        for scale, second in ((3.0, 3.0), (5.0, 3.0), (3.0, 5.0), (3.0, None))
    )
    for index in range(STEPS):
        is_high = index < SPLIT
        assert torch.equal(high[index], plain[index]) != is_high
        assert torch.equal(low[index], plain[index]) == is_high
        assert torch.equal(both[index], plain[index])


@pytest.mark.parametrize("memory", [ALL, NONE], ids=["whole", "streamed"])
def test_a_pair_may_be_guided_by_one_expert_alone(dits, memory):
    settings = settings_of(guidance=GuidanceSettings(scale=1.0, scale_low=3.0), solver="unipc")
    got = pair(dits, settings).sample(INPUTS, settings, memory, RUNTIME)
    first = alone(dits[0]).sample(INPUTS, replace(settings, guidance=PLAIN, end_step=SPLIT), memory, RUNTIME)
    guided = replace(settings, guidance=GUIDED, start_step=SPLIT)
    assert torch.equal(got.video, alone(dits[1]).sample(INPUTS, guided, memory, RUNTIME, earlier=first).video)


def test_a_boundary_is_refused_where_there_is_none(dits):
    with pytest.raises(ValueError, match="switch_DiT_boundary is for models of two experts; one has 1"):
        alone(dits[0]).with_boundary(0.5)
    with pytest.raises(ValueError, match="switch_DiT_boundary must be from 0 to 2"):
        pair(dits, settings_of()).with_boundary(-0.1)
    assert alone(dits[0]).boundary is None
