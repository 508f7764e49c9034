"""The plan of a whole run: twins weigh what models weigh, phases take what the engine takes, settings are found."""

from dataclasses import replace

import pytest
import torch

from tests.models.test_real_shapes import STRUCTURES
from tests.reference import tiny_dit
from wan_core import bundled, catalog
from wan_core.cache_settings import EasyCacheSettings
from wan_core.loading.detect import detect_files
from wan_core.loading.load import build
from wan_core.model import VideoModel
from wan_core.models.config import VAEConfig
from wan_core.offload.blocks import weights_of
from wan_core.offload.weights import WeightProvider
from wan_core.planning.encoders import WORKSPACE_BYTES, choose_tiles, vae_peak_bytes, working_encoder
from wan_core.planning.encoders import text_peak_bytes as text_bytes
from wan_core.planning.fit import data_of, fit_plan, text_of
from wan_core.planning.job import InputSizes, Job, placeholder_conditioning, plan_whole
from wan_core.planning.modules import SizedExpert, SizedModule, published_component, published_dit
from wan_core.planning.run import RunPlan
from wan_core.runtime import Runtime
from wan_core.sampling.experts import RunInputs
from wan_core.settings import GuidanceSettings, MemorySettings, SamplerSettings
from wan_core.types import VideoSize
from wan_core.variants import match_variant

SIZE = VideoSize(416, 240, 33)
SHAPES = {
    "Wan-AI/Wan2.1-T2V-1.3B": "T2V-1.3B",
    "Wan-AI/Wan2.1-T2V-14B": "T2V-14B",
    "Wan-AI/Wan2.1-I2V-14B-480P": "I2V-14B",
    "Wan-AI/Wan2.1-I2V-14B-720P": "I2V-14B",
    "Wan-AI/Wan2.1-FLF2V-14B-720P": "FLF2V-14B",
    "PAI/Wan2.1-Fun-1.3B-InP": "Fun-1.3B-InP",
    "PAI/Wan2.1-Fun-14B-InP": "I2V-14B",
    "PAI/Wan2.1-Fun-1.3B-Control": "Fun-1.3B-Control",
    "PAI/Wan2.1-Fun-14B-Control": "Fun-14B-Control",
    "PAI/Wan2.1-Fun-V1.1-1.3B-Control": "Fun-V1.1-1.3B-Control",
    "PAI/Wan2.1-Fun-V1.1-14B-Control": "Fun-V1.1-14B-Control",
    "PAI/Wan2.1-Fun-V1.1-1.3B-InP": "Fun-1.3B-InP",
    "PAI/Wan2.1-Fun-V1.1-14B-InP": "I2V-14B",
    "PAI/Wan2.1-Fun-V1.1-1.3B-Control-Camera": "Fun-V1.1-1.3B-Camera",
    "PAI/Wan2.1-Fun-V1.1-14B-Control-Camera": "Fun-V1.1-14B-Camera",
    "iic/VACE-Wan2.1-1.3B-Preview": "VACE-1.3B",
    "Wan-AI/Wan2.1-VACE-1.3B": "VACE-1.3B",
    "Wan-AI/Wan2.1-VACE-14B": "VACE-14B",
    catalog.SPEED_CONTROL: "T2V-1.3B",
    "Wan-AI/Wan2.2-T2V-A14B": "T2V-14B",
    "Wan-AI/Wan2.2-I2V-A14B": "I2V-A14B",
    "PAI/Wan2.2-Fun-A14B-InP": "I2V-A14B",
    "PAI/Wan2.2-Fun-A14B-Control": "Fun-A14B-Control",
    "PAI/Wan2.2-Fun-A14B-Control-Camera": "Fun-A14B-Camera",
    "PAI/Wan2.2-VACE-Fun-A14B": "VACE-14B",
}


@pytest.mark.parametrize("row", [r for r in catalog.CATALOG if r.size != "5B"], ids=lambda row: row.model_id)
def test_the_catalog_knows_every_published_structure(row):
    assert catalog.published_config(row) == STRUCTURES[SHAPES[row.model_id]][0]
    assert match_variant(catalog.published_config(row)).name == row.variant


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return bundled.write_model(root, catalog.TINY)


FILES = {
    "dit": catalog.DIT_FILE,
    "text_encoder": catalog.TEXT_ENCODER_PATTERN,
    "vae": catalog.VAE_PATTERN,
    "image_encoder": catalog.IMAGE_ENCODER_PATTERN,
}


@pytest.mark.parametrize("settings", [{}, {"weights": "fp8"}, {"weights": "plain"}, {"mapped": True}], ids=str)
@pytest.mark.parametrize("kind", FILES)
def test_a_planned_part_weighs_what_the_loaded_one_does(files, kind, settings):
    component = detect_files(files / FILES[kind])
    loaded = build(component, dtype=torch.bfloat16, **settings)
    part = SizedModule.planned(component, torch.bfloat16, **settings)
    twin = weights_of(part.module)
    assert all(weight.is_meta for weight in twin.values())
    described = {name: (tuple(w.shape), w.dtype) for name, w in weights_of(loaded).items()}
    assert {name: (tuple(w.shape), w.dtype) for name, w in twin.items()} == described
    assert part.provider.mapped == WeightProvider.of(loaded).mapped
    assert part.provider.work_dtypes == WeightProvider.of(loaded).work_dtypes
    assert part.inventory == WeightProvider.of(loaded).inventory()
    assert bool(part.file_bytes) == (bool(settings.get("mapped")) and kind != "vae")


@pytest.mark.parametrize("kind", FILES)
def test_what_is_published_of_a_bundled_part_is_its_file(files, kind):
    stored = detect_files(files / FILES[kind])
    known = published_dit(catalog.find_row(catalog.TINY)) if kind == "dit" else published_component(kind, catalog.TINY)
    assert known.config == stored.config
    assert {n: s.shape for n, s in known.sources.items()} == {n: s.shape for n, s in stored.sources.items()}


def test_what_is_published_of_the_bundled_vae_of_wan_22_is_its_file(tmp_path):
    stored = detect_files(bundled.write_model(tmp_path, catalog.TINY_TI2V) / catalog.VAE_22_PATTERN)
    assert published_component("vae", catalog.TINY_TI2V).config == stored.config == bundled.VAE_22
    assert published_component("vae", catalog.TI2V_BASE).config.geometry == stored.config.geometry
    assert published_component("vae", catalog.T2V_BASE).config == VAEConfig()


def test_ti2v_5b_at_its_authors_size_fits_into_8_gb():
    """The whole run: 121 frames of 1280x704 from a picture, streamed where it must be; FP8 weights stay on the card."""
    row = catalog.published(catalog.TI2V_BASE)
    preset = row.preset
    size = VideoSize(preset.width, preset.height, preset.num_frames, published_dit(row).config.geometry)
    assert str(size) == "1280x704, 121 frames"
    peaks = {}
    for weights in ("auto", "fp8"):
        dit = SizedExpert.planned(published_dit(row), torch.bfloat16, weights=weights)
        vae, text = (
            SizedModule.planned(published_component(kind, model_id), torch.bfloat16)
            for kind, model_id in (("vae", row.vae[0]), ("text_encoder", catalog.T2V_BASE))
        )
        settings = SamplerSettings(steps=preset.steps, guidance=GuidanceSettings(scale=preset.cfg))
        given = InputSizes(encoded_frames=1)
        plan = plan_whole(
            Job(name="5B", experts=(dit,), size=size, settings=settings, vae=vae, text_encoder=text, given=given), 8e9
        )
        assert plan.fits and plan.peak_bytes <= 8e9
        peaks[weights] = {phase.name: phase for phase in plan.phases}
    assert peaks["fp8"]["sampling"].peak_bytes == pytest.approx(6.5e9, rel=0.02)
    assert 0 == peaks["fp8"]["sampling"].streamed_bytes < peaks["auto"]["sampling"].streamed_bytes < 5e9
    assert peaks["auto"]["VAE decoding"].note == "at once"


def part(kind: str, **settings) -> SizedModule:
    return SizedModule.planned(published_component(kind, catalog.TINY), torch.bfloat16, **settings)


def expert(model_id: str = catalog.TINY, **settings) -> SizedExpert:
    return SizedExpert.planned(published_dit(catalog.find_row(model_id)), torch.bfloat16, **settings)


def job(**changes) -> Job:
    models = {"experts": (expert(),), **{kind: part(kind) for kind in ("text_encoder", "vae")}}
    return Job(**{"name": "tiny", "size": SIZE, "settings": SamplerSettings(), **models, **changes})


@pytest.mark.parametrize("variant", bundled.DITS)
def test_every_structure_can_be_planned(variant):
    dit = expert(catalog.tiny_id(variant))
    given = InputSizes(vace=(2, 0) if variant == "vace" else (), camera=True, pictures=1, encoded_frames=9)
    plan = plan_whole(job(experts=(dit,), given=given, image_encoder=part("image_encoder")), 2**30)
    assert [phase.name for phase in plan.phases] == [
        "text encoding", "image encoding", "VAE encoding", "sampling", "VAE decoding",
    ]  # fmt: skip
    assert plan.fits
    assert plan.peak_bytes == max(phase.peak_bytes for phase in plan.phases) < 2**30
    assert plan.ram["video model"] == dit.ram_bytes


def test_references_and_inputs_of_vace_take_memory():
    dit = expert(catalog.tiny_id("vace"))
    references = ((), (0,), (0, 0), (3, 0))
    plans = [plan_whole(job(experts=(dit,), given=InputSizes(vace=vace)), None) for vace in references]
    peaks = [plan.sampling[0].peak_bytes for plan in plans]
    assert peaks == sorted(set(peaks))
    cond = placeholder_conditioning(dit.module.config, SIZE.latent, InputSizes(vace=(3, 0)))
    assert cond.prefix_frames(SIZE.latent.frames) == 3


@pytest.mark.parametrize("share", [None, 0.9, 0.4])
def test_sampling_is_planned_as_the_run_will_plan_it(share):
    (whole,) = plan_whole(job(), None).sampling
    limit = None if share is None else share * whole.placement.device_bytes + whole.activations
    limit = limit and limit + whole.allowance
    dit = tiny_dit("t2v").to(torch.bfloat16)
    model = VideoModel.of(dit, match_variant(dit.config), None, "tiny")
    runtime = Runtime(device=torch.device("cpu"), dtype=torch.bfloat16, memory_left=lambda _: limit or 1e12)
    cond = placeholder_conditioning(dit.config, SIZE.latent, InputSizes())
    for parameter in dit.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    twin = replace(job(), experts=(SizedExpert(dit),))
    own = model.plan(RunInputs(cond, SIZE.latent), SamplerSettings(), MemorySettings(), runtime)
    (plan,) = plan_whole(twin, limit).sampling
    assert (plan.placement.streamed, plan.peak_bytes) == (own.placement.streamed, own.peak_bytes)
    assert bool(plan.placement.streamed) == (share is not None)


def two_experts(**changes) -> Job:
    """The first takes the steps above timestep 900; the second is FP8, and so the smaller one."""
    first, second = replace(expert(), lowest=900.0), expert().quantised()
    return job(experts=(first, second), text_encoder=None, vae=None, **changes)


def test_of_two_experts_one_is_on_the_device_at_a_time():
    both = two_experts()
    alone = [plan_whole(replace(both, experts=(replace(each, lowest=0.0),)), None) for each in both.experts]
    whole = plan_whole(both, None)
    assert [phase.name for phase in whole.phases] == ["sampling, expert 1", "sampling, expert 2"]
    assert [phase.peak_bytes for phase in whole.phases] == [plan.peak_bytes for plan in alone]
    assert whole.peak_bytes == alone[0].peak_bytes > alone[1].peak_bytes
    assert whole.ram["video model, expert 1"] + whole.ram["video model, expert 2"] == sum(
        plan.ram["video model"] for plan in alone
    )


@pytest.mark.parametrize(
    ("settings", "working"),
    [
        ({}, (0, 1)),
        ({"end_step": 2}, (0,)),
        ({"start_step": 45}, (1,)),
        ({"denoise": 0.5, "shift": 1.0}, (1,)),
    ],
)
def test_an_expert_that_no_step_needs_is_not_read(settings, working):
    run = two_experts(settings=SamplerSettings(**settings))
    mapped = tuple(replace(expert(mapped=True), lowest=each.lowest) for each in run.experts)
    plan = plan_whole(replace(run, experts=mapped), None)
    assert run.working_experts == working
    assert list(plan.files) == [f"video model, expert {number + 1}" for number in working]
    assert len(plan.sampling) == len(plan.phases) == len(working)


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_a_solver_of_two_evaluations_copies_and_computes_twice(mode):
    def planned(solver: str) -> RunPlan:
        settings = SamplerSettings(solver=solver, guidance=GuidanceSettings(mode=mode))
        return plan_whole(job(settings=settings, memory=MemorySettings(vram_limit=0)), None).sampling[0]

    euler, heun = planned("euler"), planned("heun")
    assert heun.placement.streamed == euler.placement.streamed != ()
    assert (heun.copied_per_step, heun.flops) == (2 * euler.copied_per_step, 2 * euler.flops)
    assert heun.hidden == pytest.approx(euler.hidden)
    latents = 16 * SIZE.latent.frames * SIZE.latent.height * SIZE.latent.width * 4
    assert heun.activations == euler.activations + 2 * latents


def test_text_encoding_is_placed_as_the_encoder_will_be():
    encoder = part("text_encoder")
    activations = text_bytes(encoder.module.config, torch.bfloat16, 512)
    least = encoder.inventory.outside.bytes + 2 * max(block.bytes for block in encoder.inventory.blocks.values())
    limit = least + activations + WORKSPACE_BYTES
    phase = plan_whole(job(text_encoder=encoder), limit).phases[0]
    assert (phase.peak_bytes, phase.missing) == (limit, 0)
    assert phase.streamed_bytes == sum(block.bytes for block in encoder.inventory.blocks.values())
    runtime = Runtime(device=torch.device("cpu"), dtype=torch.bfloat16, memory_left=lambda _: limit)
    loaded = SizedModule(build_tiny_text_encoder())
    with working_encoder(loaded.module, runtime, MemorySettings(), activations):
        hooked = sum(bool(block._forward_pre_hooks) for block in loaded.module.blocks)
    assert hooked == len(loaded.inventory.blocks)


def build_tiny_text_encoder() -> torch.nn.Module:
    module = bundled.UMT5Encoder(bundled.TEXT_ENCODER).requires_grad_(False)
    return module.to(torch.bfloat16)


def test_the_vae_is_planned_with_the_tiles_that_it_will_choose():
    vae = part("vae")
    plan = (vae.module.config, torch.bfloat16, SIZE.latent)
    weights = vae.inventory.bytes
    limit = weights + vae_peak_bytes(*plan) - 1
    phase = plan_whole(job(), limit).phases[-1]
    tiles = choose_tiles(*plan, limit - weights)
    assert phase.peak_bytes == weights + vae_peak_bytes(*plan, tiles)
    assert phase.note.startswith("in 2 tiles of")
    assert plan_whole(job(), limit + 1).phases[-1].note == "at once"
    assert plan_whole(job(), 1e6).phases[-1].missing > 0


def test_weights_on_disk_are_no_host_memory():
    held, mapped = expert(), expert(mapped=True)
    assert mapped.file_bytes > 1.9 * (held.ram_bytes - mapped.ram_bytes) > 0, "the bundled file is float32"
    plan = plan_whole(job(experts=(mapped,)), None)
    assert plan.files == {"video model": mapped.file_bytes}
    assert mapped.quantised() is None


def test_fp8_takes_half_the_memory_and_once_is_enough():
    held, quantised = expert(), expert().quantised()
    big = sum(w.nbytes for n, w in weights_of(held.module).items() if n.startswith("blocks") and w.ndim == 2)
    assert held.ram_bytes - quantised.ram_bytes == pytest.approx(big / 2, rel=0.05)
    assert quantised.quantised() is None


def greedy() -> Job:
    settings = SamplerSettings(guidance=GuidanceSettings(mode="batched"), cache=EasyCacheSettings())
    return job(settings=settings, text_encoder=None, vae=None)


def test_fit_changes_no_more_than_it_must():
    alone = greedy()
    one_by_one = replace(alone.settings, guidance=GuidanceSettings(mode="sequential"))
    on_host = replace(one_by_one, cache=EasyCacheSettings(residual_on_cpu=True))
    steps = [alone, replace(alone, settings=one_by_one), replace(alone, settings=on_host)]
    steps += [replace(steps[-1], experts=(alone.experts[0].quantised(),))]
    limits = [plan_whole(step, 1).peak_bytes for step in steps]
    assert limits == sorted(set(limits), reverse=True)
    expected = ["cfg_mode sequential", "residual_on_cpu", "weights fp8 in Load Model"]
    for count, limit in enumerate(limits):
        found = fit_plan(alone, limit)
        assert found.plan.fits
        assert len(found.changes) == count
        assert all(change.startswith(start) for change, start in zip(found.changes, expected, strict=False))
    assert not fit_plan(alone, limits[-1] - 1).plan.fits


def test_what_never_fits_says_how_much_is_missing_and_what_helps():
    least = fit_plan(greedy(), 1)
    assert (least.plan.missing, least.suggestions) == (least.plan.peak_bytes - 1, ())
    assert "No smaller picture" in text_of(least)
    near = fit_plan(greedy(), least.plan.peak_bytes - 1)
    assert not near.plan.fits
    assert near.plan.missing == 1
    assert any(help.startswith("half as many frames (416x240, 17 frames)") for help in near.suggestions)
    assert any(help.startswith("a smaller picture (208x112, 33 frames)") for help in near.suggestions)
    assert data_of(near)["missing"] == 1


def test_a_limit_of_the_memory_settings_counts_too():
    whole = plan_whole(job(), None)
    strict = plan_whole(replace(job(), memory=MemorySettings(vram_limit=0.3)), 2**40)
    assert strict.limit == 0.3 * 2**30
    assert whole.limit is None
    streamed = plan_whole(replace(job(), memory=MemorySettings(vram_limit=0)), 2**40)
    assert len(streamed.sampling[0].placement.streamed) == 4
    assert streamed.fits
    with pytest.raises(ValueError, match="vram_limit"):
        MemorySettings(vram_limit=float("nan"))
