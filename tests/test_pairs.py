"""Pairs of experts through files on disk: found, read when needed, run from anywhere, each with a LoRA of its own."""

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.loading.test_fp8 import stored
from tests.lora.fixtures import RANK, factors, linear_paths
from tests.reference import HIGH, LOW, drawn_weights, relative_error, tiny_dit
from wan_core import ModelConfig, WanVideoPipeline, bundled, catalog
from wan_core.catalog import tiny_id
from wan_core.loading.foreign_names import diffusers_name
from wan_core.model_files import DiTSettings, Offload, experts_of, inspect_experts, load_dit
from wan_core.offload.quant import QuantisedLinear
from wan_core.offload.read_ahead import PIECE, ReadAhead, read_ahead
from wan_core.offload.weights import WeightProvider
from wan_core.runtime import Cancelled, Runtime
from wan_core.sampling.checkpoint import Checkpoint
from wan_core.sampling.experts import RunInputs
from wan_core.settings import GuidanceSettings, MemorySettings, SamplerSettings
from wan_core.types import Conditioning, VideoSize

CALL = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 4, "seed": 1, "progress_bar_cmd": None}
SHARED = (catalog.TEXT_ENCODER_PATTERN, catalog.VAE_PATTERN)
PICTURE = Image.new("RGB", (40, 30), "red")
EXPERTS = ("high", "low")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Iterator[Path]:
    """A models folder that holds the bundled text-to-video pair, with drawn weights: two experts that differ much."""
    root = tmp_path_factory.mktemp("models")
    with drawn_weights():
        bundled.write_model(root, tiny_id("t2v", is_pair=True))
        bundled.write_model(root, catalog.TINY)
        yield root


def load(models: Path, *dits: ModelConfig, variant: str = "t2v", **changes) -> WanVideoPipeline:
    model_id = tiny_id(variant, is_pair=True)
    named = [ModelConfig(model_id=model_id, origin_file_pattern=p, **changes) for p in catalog.PAIR_PATTERNS]
    shared = [ModelConfig(model_id=catalog.TINY, origin_file_pattern=pattern) for pattern in SHARED]
    return WanVideoPipeline.from_pretrained(
        torch_dtype=torch.float32, device="cpu", local_model_path=models, model_configs=[*(dits or named), *shared]
    )


def latents(pipe: WanVideoPipeline, **changes) -> torch.Tensor:
    return pipe("a dog", "dark", **{**CALL, **changes}, output_type="latent")


@pytest.fixture(scope="module")
def pipe(models) -> WanVideoPipeline:
    return load(models)


@pytest.fixture(scope="module")
def expected(pipe) -> torch.Tensor:
    return latents(pipe)


def file(models: Path, expert: str) -> Path:
    return models / tiny_id("t2v", is_pair=True) / f"{expert}_noise_model" / catalog.DIT_FILE


def unread(pipe: WanVideoPipeline) -> list[bool]:
    return [next(expert.dit.parameters()).is_meta for expert in pipe.models.video.experts]


def as_repack(weights, folder: Path, expert: str) -> Path:
    path = folder / f"wan2.2_t2v_{expert}_noise_14B.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}, path)
    return path


def as_diffusers(weights, folder: Path, expert: str) -> Path:
    path = folder / {"high": "transformer", "low": "transformer_2"}[expert] / catalog.DIT_FILE
    path.parent.mkdir()
    save_file({diffusers_name(name): tensor for name, tensor in weights.items()}, path)
    return path


@pytest.mark.parametrize("write", [as_repack, as_diffusers])
def test_every_layout_gives_the_same_video(models, expected, tmp_path, write):
    files = [write(load_file(file(models, expert)), tmp_path, expert) for expert in EXPERTS]
    for paths in (files, [files], [tmp_path]):
        found = load(models, *(ModelConfig(path=path) for path in paths))
        assert torch.equal(latents(found), expected)
    assert "{" in found.models.video.name


@pytest.mark.parametrize(("kind", "far"), [("fp16", 0.01), ("fp8_scaled", 0.3)])
def test_comfyuis_repacks_in_half_and_in_eight_bits_are_pairs(models, expected, tmp_path, kind, far):
    for expert, seed in zip(EXPERTS, (HIGH, LOW), strict=True):
        dit = tiny_dit("t2v", seed)
        tensors = stored(dit, "old") if kind == "fp8_scaled" else dit.state_dict()
        as_repack({name: t.half() if t.dtype == torch.float32 else t for name, t in tensors.items()}, tmp_path, expert)
    pipe = load(models, ModelConfig(path=tmp_path / "wan2.2_t2v_{high,low}_noise_14B.safetensors"))
    assert 0 < relative_error(latents(pipe), expected) < far
    layers = [pipe.models.video.expert_dit(number).blocks[0].ffn[0] for number in (0, 1)]
    assert all(isinstance(layer, QuantisedLinear) == (kind == "fp8_scaled") for layer in layers)


def test_the_authors_folder_is_one_model(models, expected):
    found = load(models, ModelConfig(path=models / tiny_id("t2v", is_pair=True)))
    assert found.models.video.row.model_id == tiny_id("t2v", is_pair=True) and found.models.video.boundary == 0.875
    assert torch.equal(latents(found), expected)


@pytest.mark.parametrize("changes", [{"offload_device": "disk"}, {"offload_dtype": torch.float64}], ids=str)
@pytest.mark.parametrize("streamed", [False, True])
def test_weights_may_rest_anywhere(models, expected, changes, streamed):
    pipe = load(models, **changes)
    if streamed:
        pipe.enable_vram_management(num_persistent_param_in_dit=0)
    assert torch.equal(latents(pipe), expected)


def test_experts_that_host_memory_has_no_room_for_stay_in_their_files(models, expected, monkeypatch, caplog):
    monkeypatch.setattr("wan_core.model_files.available_ram", lambda: 1000)
    pipe = load(models)
    assert torch.equal(latents(pipe), expected) and "their weights stay in their files" in caplog.text
    assert all(WeightProvider.of(expert.dit).mapped for expert in pipe.models.video.experts)
    experts = experts_of(inspect_experts(models / tiny_id("t2v", is_pair=True)))
    made = load_dit(experts, DiTSettings(dtype=torch.float32), Offload(weights="fp8"))
    assert not WeightProvider.of(made.expert_dit(0)).mapped, "quantised weights are in no file"


def test_fp8_experts_are_those_of_fp8_files(models):
    experts = experts_of(inspect_experts(models / tiny_id("t2v", is_pair=True)))
    pair = load_dit(experts, DiTSettings(dtype=torch.float32), Offload(weights="fp8"))
    for number, expert in enumerate(experts):
        alone = load_dit(expert.component, DiTSettings(dtype=torch.float32), Offload(weights="fp8"))
        weights = pair.expert_dit(number).state_dict()
        assert alone.dit.state_dict().keys() == weights.keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in alone.dit.state_dict().items())


def test_an_expert_is_read_when_its_first_step_comes(models):
    pipe = load(models)
    assert unread(pipe) == [True, True]
    low = latents(pipe, switch_DiT_boundary=2)
    assert unread(pipe) == [True, False]
    assert torch.equal(low, latents(load(models, ModelConfig(path=file(models, "low")))))
    start = [Image.new("RGB", (48, 32), (i * 40, 90, 200)) for i in range(5)]
    pipe = load(models)
    latents(pipe, input_video=start, denoising_strength=0.3)
    assert unread(pipe) == [True, False]
    latents(pipe, switch_DiT_boundary=0)
    assert unread(pipe) == [False, False]


def test_host_memory_holds_one_expert_where_it_has_no_room_for_two(models, expected, monkeypatch):
    """The expert before is dropped and read again in the next run, unless a script has its weights in hand."""
    pipe, taken = load(models, offload_dtype=torch.float64), load(models)
    assert not torch.equal(latents(pipe, seed=2), expected) and unread(pipe) == [False, False]
    monkeypatch.setattr("wan_core.model.available_ram", lambda: 1000)
    pipe = load(models, offload_dtype=torch.float64)
    for left in ([True, False], [True, False]):
        assert torch.equal(latents(pipe), expected) and unread(pipe) == left
    latents(pipe, switch_DiT_boundary=0)
    assert unread(pipe) == [False, True]
    weights = taken.dit.state_dict()
    assert torch.equal(latents(taken), expected) and unread(taken) == [False, False]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in taken.dit.state_dict().items())


def test_the_parts_of_a_pair_have_the_names_of_the_reference(models, pipe):
    assert pipe.vace is None and pipe.vace2 is None
    for part, seed in ((pipe.dit, HIGH), (pipe.dit2, LOW)):
        weights = tiny_dit("t2v", seed).state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in part.state_dict().items())
    bundled.write_model(models, tiny_id("vace", is_pair=True))
    vace = load(models, variant="vace")
    first, second = (dict(part.named_parameters()) for part in (vace.vace, vace.vace2))
    assert first.keys() == second.keys() and all(name.startswith("vace_") for name in first)
    assert not any(name.startswith("vace_") for name, _ in vace.dit2.named_parameters())
    single = load(models, ModelConfig(path=file(models, "high")))
    assert single.dit2 is None and single.vace2 is None


def test_a_vace_branch_for_each_expert(models, tmp_path):
    folder = bundled.write_model(models, tiny_id("vace", is_pair=True))
    parts: dict[str, list[Path]] = {"base": [], "vace": []}
    for expert in EXPERTS:
        weights = load_file(folder / f"{expert}_noise_model" / catalog.DIT_FILE)
        for part, found in parts.items():
            found.append(tmp_path / f"{part}_{expert}.safetensors")
            save_file({n: t for n, t in weights.items() if n.startswith("vace") == (part == "vace")}, found[-1])
    call = {"vace_video": [PICTURE] * 5}
    whole = latents(load(models, variant="vace"), **call)
    joined = load(models, *(ModelConfig(path=path) for found in parts.values() for path in found))
    assert torch.equal(latents(joined, **call), whole)
    one = load(models, *(ModelConfig(path=path) for path in (*parts["base"], parts["vace"][0])))
    assert not torch.equal(latents(one, **call), whole)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("low", "high"), "was given for high noise and .* but their names say otherwise"),
        (("high", "high"), "was given for both experts"),
        (("high", "low", "low"), "Two models of one kind"),
    ],
)
def test_mistakes_are_told_before_a_weight_is_read(models, names, message, monkeypatch):
    monkeypatch.setattr("wan_core.model_files.build", None)
    with pytest.raises(ValueError, match=message):
        load(models, *(ModelConfig(path=file(models, name)) for name in names))


def test_guidance_and_boundary_need_a_pair(models):
    single = load(models, ModelConfig(path=file(models, "high")))
    with pytest.raises(ValueError, match="cfg_scale_low is for models of two experts"):
        latents(single, cfg_scale_low=3.0)
    with pytest.raises(ValueError, match="switch_DiT_boundary is for models of two experts"):
        latents(single, switch_DiT_boundary=0.9)


@pytest.mark.parametrize(
    "change", [{"cfg_scale_low": -1}, {"cfg_scale_low": "much"}, {"switch_DiT_boundary": 3}, {"size_rule": "square"}]
)
def test_arguments_out_of_range_are_named(pipe, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        latents(pipe, **change)


def test_the_guidance_of_each_expert_reaches_the_video(pipe, expected):
    assert torch.equal(latents(pipe, cfg_scale_low=5.0), expected)
    changed = [latents(pipe, cfg_scale=a, cfg_scale_low=b) for a, b in ((4.0, 5.0), (5.0, 4.0), (5.0, [5.0, 1.0]))]
    for one, other in itertools.combinations([expected, *changed], 2):
        assert relative_error(one, other) > 1e-4


def test_a_start_image_may_decide_the_size(models):
    bundled.write_model(models, tiny_id("i2v_a14b"))
    pipe = load(models, variant="i2v_a14b")
    call = {"input_image": PICTURE, "width": 64, "height": 64}
    assert latents(pipe, **call).shape[-2:] == (8, 8)
    assert latents(pipe, **call, size_rule="area").shape[-2:] == (6, 8)
    assert latents(pipe, **call, size_rule="area and crop").shape[-2:] == (6, 10)


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> Path:
    """A LoRA for each expert, with alpha as LightX2V stores it: a whole number."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, expert in enumerate(EXPERTS):
        made = factors(tiny_dit("t2v"), linear_paths(tiny_dit("t2v")), seed=seed)
        tensors = {}
        for path, (down, up) in made.items():
            name = f"diffusion_model.{path}"
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(RANK // 2)
        save_file(tensors, folder / f"{expert}_noise_model.safetensors")
    return folder


def test_a_pair_of_loras_is_one_call(models, loras, expected):
    separate, pair = load(models), load(models)
    for part, expert in ((separate.dit, "high"), (separate.dit2, "low")):
        report = separate.load_lora(part, loras / f"{expert}_noise_model.safetensors", alpha=0.5)
        assert not report.notes and report.alpha == "alpha tensor over rank"
    reports = pair.load_lora_pair(loras / "low_noise_model.safetensors", alpha=0.5)
    assert [report.name for report in reports] == ["high_noise_model.safetensors", "low_noise_model.safetensors"]
    changed = latents(pair)
    assert torch.equal(changed, latents(separate))
    assert relative_error(changed, expected) > 1e-3
    pair.clear_lora()
    assert torch.equal(latents(pair), expected)
    pair.load_lora_pair(loras, alpha=0.5, alpha_low=0.0)
    assert not torch.equal(latents(pair), changed)


def test_a_lora_on_the_wrong_expert_is_told(models, loras):
    pipe = load(models)
    report = pipe.load_lora(pipe.dit, loras / "low_noise_model.safetensors")
    assert "for low noise, but it is applied to the expert for high noise" in report.summary
    _, report = pipe.models.video.with_lora(loras / "low_noise_model.safetensors")
    assert "for low noise, but it is applied to both experts" in report.summary
    single = load(models, ModelConfig(path=file(models, "high")))
    assert not single.load_lora(single.dit, loras / "low_noise_model.safetensors").notes
    with pytest.raises(ValueError, match="for a model of two experts"):
        single.load_lora_pair(loras)


def test_a_lora_needs_no_weights_of_an_expert(models, loras):
    pipe = load(models)
    pipe.load_lora_pair(loras)
    assert unread(pipe) == [True, True]


def test_weights_that_are_replaced_make_another_run(models):
    pipe = load(models)
    before = [WeightProvider.of(expert.dit).origin for expert in pipe.models.video.experts]
    assert all(before) and before[0] != before[1]
    pipe.dit2.load_state_dict(pipe.dit.state_dict())
    assert WeightProvider.of(pipe.models.video.experts[1].dit).origin == ""
    twins = latents(pipe)
    assert torch.equal(twins, latents(load(models, ModelConfig(path=file(models, "high")))))


@pytest.mark.parametrize("done", [1, 3])
def test_a_run_that_was_killed_goes_on_without_the_expert_that_is_done(models, tmp_path, done):
    """Four steps at shift 5, two of each expert; the run is cut off in the one after `done`."""
    settings = SamplerSettings(steps=4, seed=3, solver="unipc", guidance=GuidanceSettings(scale=1.0))
    size = VideoSize(48, 32, 5).latent
    text = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    inputs, runtime = RunInputs(Conditioning(text=text), size), Runtime(device=CPU, dtype=torch.float32)
    place = models / tiny_id("t2v", is_pair=True)

    def fresh():
        return load_dit(experts_of(inspect_experts(place)), DiTSettings(dtype=torch.float32), "cpu")

    def sample(model, **changes):
        return model.sample(inputs, settings, MemorySettings(), runtime, **changes)

    def cut_off(phase, steps, total, latents):
        if steps == done + 1:
            raise Cancelled

    with pytest.raises(Cancelled):
        fresh().sample(
            inputs, settings, MemorySettings(), replace(runtime, on_progress=cut_off),
            checkpoint=Checkpoint(tmp_path, 1),
        )  # fmt: skip
    model, checkpoint = fresh(), Checkpoint(tmp_path, 1)
    resumed = sample(model, checkpoint=checkpoint)
    assert checkpoint.resumed and torch.equal(resumed.video, sample(fresh()).video)
    assert [next(expert.dit.parameters()).is_meta for expert in model.experts] == [done > 2, False]


def test_the_file_of_the_next_expert_is_read_ahead_in_the_last_step_before_it(models, monkeypatch):
    pipe, seen = load(models), []
    monkeypatch.setattr(ReadAhead, "start", lambda self, files: seen.append(("read", *files)))

    def bar(steps):
        for step in steps:
            seen.append(step)
            yield step

    latents(pipe, progress_bar_cmd=bar)
    assert seen == [0, 1, ("read", file(models, "low")), 2, 3]
    seen.clear()
    latents(pipe)
    assert not seen, "the weights are in memory by now"


def test_as_much_is_read_ahead_as_there_is_room_for(tmp_path):
    files = [tmp_path / name for name in "ab"]
    for path in files:
        path.write_bytes(bytes(3 * PIECE))
    stopped = threading.Event()
    assert read_ahead(files, 1e12, stopped) == 6 * PIECE
    assert read_ahead(files, PIECE + 1, stopped) == 2 * PIECE
    assert read_ahead([*files, tmp_path / "absent"], 1e12, stopped) == 6 * PIECE
    stopped.set()
    assert read_ahead(files, 1e12, stopped) == 0
    with ReadAhead() as ahead:
        ahead.start(files)
    assert not any(thread.is_alive() for thread in ahead._threads)
