"""Wherever weights are, the latents of a run are the same bits; and a pipeline's memory options say what they do."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from tests.reference import tiny_dit
from tests.sampling.runs import planned, sample
from wan_core.cache_settings import TeaCacheSettings
from wan_core.model import VideoModel
from wan_core.model_files import DiTSettings, ExpertFile, Offload, inspect, load_dit
from wan_core.offload.blocks import blocks_of, weights_of
from wan_core.offload.weights import WeightProvider
from wan_core.runtime import Runtime
from wan_core.sampling.experts import RunInputs
from wan_core.settings import GuidanceSettings, MemorySettings, SamplerSettings, WindowSettings
from wan_core.types import Conditioning, Curve, LatentSize, VaceInput

CPU = torch.device("cpu")
SIZE = LatentSize(5, 4, 4)
TEACACHE = TeaCacheSettings(template="Wan2.1-T2V-1.3B", threshold=5.0)
WINDOWS = WindowSettings(size=3, stride=2)


@pytest.fixture(scope="module", params=["t2v", "vace"])
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / f"{request.param}.safetensors"
    save_file(tiny_dit(request.param).state_dict(), path)
    return inspect(path, "dit")


def conditioning(model: VideoModel) -> Conditioning:
    generator = torch.Generator().manual_seed(0)
    text, negative = (torch.randn(1, 12, 64, generator=generator) for _ in range(2))
    cond = Conditioning(text=text, negative_text=negative)
    if model.dit.config.vace_layers:
        context = torch.randn(1, 96, *SIZE.shape, generator=generator)
        cond = dataclasses.replace(cond, vace=(VaceInput(context=context, strength=Curve((0.7,))),))
    return cond


def latents(model: VideoModel, settings: SamplerSettings, memory: MemorySettings, dtype) -> torch.Tensor:
    cond, runtime = conditioning(model), Runtime(device=CPU, dtype=dtype)
    return planned(model, cond, SIZE, settings, runtime, memory)


@pytest.mark.parametrize(
    ("dtype", "cache", "windows"),
    [
        (torch.float32, None, None),
        (torch.float32, TEACACHE, WINDOWS),
        (torch.bfloat16, None, WINDOWS),
        (torch.bfloat16, TEACACHE, None),
    ],
    ids=["float32", "float32-teacache-windows", "bfloat16-windows", "bfloat16-teacache"],
)
def test_latents_are_the_same_bits_wherever_weights_are(checkpoint, dtype, cache, windows):
    settings = SamplerSettings(steps=4, seed=3, cache=cache, windows=windows, guidance=GuidanceSettings(scale=4.0))
    resting = load_dit(checkpoint, DiTSettings(dtype=dtype), "cpu")
    expected = latents(resting, settings, MemorySettings(), dtype)
    assert expected.isfinite().all()
    parameters = sum(parameter.numel() for parameter in resting.dit.parameters())
    limits = [MemorySettings(vram_limit=0), MemorySettings(vram_limit=0.3)]
    counts = [MemorySettings(persistent_params=count) for count in (0, parameters // 2, parameters)]
    for memory in (*limits, *counts):
        assert torch.equal(latents(resting, settings, memory, dtype), expected), memory
    on_disk = load_dit(checkpoint, DiTSettings(dtype=dtype), "disk")
    for memory in (MemorySettings(), MemorySettings(vram_limit=0)):
        assert torch.equal(latents(on_disk, settings, memory, dtype), expected), memory


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_the_files_of_a_model_are_a_list_of_its_experts(checkpoint, place):
    settings, one = SamplerSettings(steps=2), load_dit(checkpoint, DiTSettings(dtype=torch.float32), "cpu")
    files = [ExpertFile(checkpoint, 900.0), ExpertFile(checkpoint)]
    two = load_dit(files, DiTSettings(dtype=torch.float32), place)
    assert [expert.lowest for expert in two.experts] == [900.0, 0.0] and two.experts[0].dit is not two.experts[1].dit
    for memory in (MemorySettings(), MemorySettings(vram_limit=0)):
        expected = latents(one, settings, memory, torch.float32)
        assert torch.equal(latents(two, settings, memory, torch.float32), expected)


@pytest.mark.parametrize(
    ("lowest", "message"),
    [((), "at least one"), ((900.0,), "end at 0"), ((0.0, 900.0), "must fall")],
)
def test_experts_that_leave_noise_levels_out_are_refused(checkpoint, lowest, message):
    with pytest.raises(ValueError, match=message):
        load_dit([ExpertFile(checkpoint, each) for each in lowest], DiTSettings(), "cpu")


def test_experts_of_two_structures_are_refused(checkpoint):
    other = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, num_layers=1))
    with pytest.raises(ValueError, match="differ in structure"):
        load_dit([ExpertFile(checkpoint, 900.0), ExpertFile(other)], DiTSettings(), "cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_may_rest_in_a_wider_dtype(checkpoint, dtype):
    settings = SamplerSettings(steps=2)
    expected = latents(load_dit(checkpoint, DiTSettings(), "cpu"), settings, MemorySettings(), torch.bfloat16)
    model = load_dit(checkpoint, DiTSettings(), Offload(dtype=dtype))
    assert model.dit.blocks[0].ffn[0].weight.dtype == dtype and model.dit.dtype == torch.bfloat16
    for memory in (MemorySettings(), MemorySettings(vram_limit=0)):
        assert torch.equal(latents(model, settings, memory, torch.bfloat16), expected)


def test_fp8_weights_stream(checkpoint):
    model = load_dit(checkpoint, DiTSettings(), Offload(weights="fp8"))
    settings = SamplerSettings(steps=2)
    expected = latents(model, settings, MemorySettings(), torch.bfloat16)
    assert torch.equal(latents(model, settings, MemorySettings(vram_limit=0), torch.bfloat16), expected)
    plain_model = load_dit(checkpoint, DiTSettings(), "cpu")
    plain = WeightProvider.of(plain_model.dit).inventory()
    eight = WeightProvider.of(model.dit).inventory()
    assert eight.blocks["blocks.1"].bytes < 0.56 * plain.blocks["blocks.1"].bytes


def test_weights_on_disk_are_views_of_the_file(checkpoint):
    dit = load_dit(checkpoint, DiTSettings(dtype=torch.float32), "disk").dit
    inside = {name for path in blocks_of(dit) for name in weights_of(dit) if name.startswith(f"{path}.")}
    assert WeightProvider.of(dit).mapped == inside


def test_vace_blocks_stay_away_without_a_vace_input():
    model = VideoModel.of(tiny_dit("vace"), None, None, "tiny")
    cond = dataclasses.replace(conditioning(model), vace=None)
    memory = MemorySettings(persistent_params=0)
    placement = model.plan(
        RunInputs(cond, SIZE), SamplerSettings(), memory, Runtime(device=CPU, dtype=torch.float32)
    ).placement
    assert placement.streamed == tuple(f"blocks.{index}" for index in range(4))
    assert placement.inventory.idle == {"vace_blocks.0", "vace_blocks.1"}


def test_streamed_branches_share_each_copy():
    model = VideoModel.of(tiny_dit(), None, None, "tiny")
    cond = conditioning(model)
    runtime = Runtime(device=CPU, dtype=torch.float32)
    plan = model.plan(RunInputs(cond, SIZE), SamplerSettings(), MemorySettings(vram_limit=0), runtime)
    assert plan.settings.guidance.mode == "interleaved" and plan.passes_per_step == 1
    batched = SamplerSettings(guidance=GuidanceSettings(mode="batched"))
    assert model.plan(RunInputs(cond, SIZE), batched, MemorySettings(vram_limit=0), runtime).settings == batched


def test_skipped_steps_copy_nothing():
    model = VideoModel.of(tiny_dit(), None, None, "tiny")
    cond, runtime = conditioning(model), Runtime(device=CPU, dtype=torch.float32)
    copied = {}
    for name, cache in (("all", None), ("teacache", TEACACHE)):
        settings = SamplerSettings(steps=6, cache=cache)
        plan = model.plan(RunInputs(cond, SIZE), settings, MemorySettings(vram_limit=0), runtime)
        with WeightProvider.of(model.dit).working(CPU, plan.placement) as stream:
            sample(model.dit, cond, SIZE, plan.settings, runtime)
            copied[name] = stream.copied
    read_ahead = plan.placement.inventory.blocks["blocks.0"].bytes
    assert copied["all"] == 6 * plan.copied_per_step + read_ahead
    assert copied["teacache"] == 2 * plan.copied_per_step + read_ahead, "the first and the last step are computed"


def test_a_run_that_cannot_meet_its_limit_says_so_and_runs(caplog):
    model = VideoModel.of(tiny_dit(), None, None, "tiny")
    cond, memory = conditioning(model), MemorySettings(vram_limit=0.001)
    settings = SamplerSettings(steps=1)
    runtime = dataclasses.replace(Runtime(device=CPU, dtype=torch.float32), memory_left=lambda _: 2**20)
    plan = model.plan(RunInputs(cond, SIZE), settings, memory, runtime)
    assert plan.missing > 0 and len(plan.placement.streamed) == 4
    assert "GB more than it may use" in caplog.text


@pytest.mark.parametrize(
    ("field", "value"),
    [("vram_limit", -1), ("vram_limit", float("nan")), ("vram_buffer", -0.5), ("persistent_params", -1),
     ("persistent_params", 1.5)],
)  # fmt: skip
def test_bad_numbers_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        MemorySettings(**{field: value})
