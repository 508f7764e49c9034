"""Wan 2.2 5B: published whole runs, and clean frames, which come out as they went in whatever surrounds them."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from tests.pictures import materialised
from tests.reference import (
    DITS_5B,
    arguments,
    filled,
    load_case,
    relative_error,
    tiny_text_encoder,
    tiny_vae_22,
)
from tests.sampling.runs import planned, sample, sample_state
from wan_core import ModelConfig, bundled, catalog
from wan_core.cache_settings import EasyCacheSettings, TeaCacheSettings
from wan_core.conditioning.image import LatentEncoder, clean_start_conditioning, image_conditioning
from wan_core.conditioning.inputs import VideoInputs, condition
from wan_core.conditioning.text import TextEncoder, Tokenizer
from wan_core.media.fitting import as_frames, fit_size, size_by_rule
from wan_core.model import VideoModel
from wan_core.models.config import WAN_22
from wan_core.models.dit import WanDiT
from wan_core.offload.weights import WeightProvider
from wan_core.pipeline import WanVideoPipeline
from wan_core.pipeline_models import LoadedModels
from wan_core.runtime import Runtime
from wan_core.sampling import run
from wan_core.sampling.checkpoint import Checkpoint
from wan_core.sampling.predictor import TimeTable
from wan_core.settings import GuidanceSettings, MemorySettings, SamplerSettings, WindowSettings
from wan_core.types import Conditioning, VideoSize
from wan_core.variants import fit, match_variant

RUNTIME = Runtime(device=torch.device("cpu"), dtype=torch.float32)
SMALL = {name: dataclasses.replace(config, dim=128, ffn_dim=256, num_layers=3) for name, config in DITS_5B.items()}
SIZE = VideoSize(64, 64, 17, WAN_22)
TEXT = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(5))
GUIDED = GuidanceSettings(scale=3.0)


FUN = ("fun_5b_inp", "fun_5b_inp_text", "fun_5b_control", "fun_5b_control_plain", "fun_5b_camera")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    bundled.write_tokenizer(folder / bundled.TOKENIZER_FILE)
    dit = filled(WanDiT, DITS_5B["ti2v_5b"])
    video = VideoModel.of(dit, match_variant(dit.config), None, "ti2v_5b")
    text = TextEncoder(tiny_text_encoder(), Tokenizer.from_folder(folder), None)
    return WanVideoPipeline(torch.device("cpu"), torch.float32, LoadedModels(video, text, tiny_vae_22()))


@pytest.mark.parametrize("name", ["ti2v_5b_t2v", "ti2v_5b_t2v_unipc", "ti2v_5b_i2v", "ti2v_5b_i2v_unipc"])
def test_equals_the_published_calls(pipe, name):
    case = load_case(name, "e2e")
    assert json.loads(case.metadata["case"])["variant"] == pipe.models.video.variant.name
    call = materialised(arguments(case)) | {"progress_bar_cmd": None}
    assert relative_error(pipe(**call, output_type="latent"), case["latents"]) < 1e-4
    frames = np.stack([np.asarray(frame) for frame in pipe(**call)]).astype(int)
    difference = np.abs(frames - case["frames"].numpy().astype(int))
    assert difference.mean() <= 0.25 and difference.max() <= 6


@pytest.mark.parametrize("name", FUN)
def test_equals_the_published_pipelines_of_fun(pipe, name):
    """VideoX-Fun's pipelines and transformer with UniPC, on VAE and text embeddings of ours."""
    case = load_case(name, "e2e")
    dit = filled(WanDiT, DITS_5B[json.loads(case.metadata["case"])["variant"]])
    video = VideoModel.of(dit, match_variant(dit.config), None, name)
    call = materialised(arguments(case)) | {"progress_bar_cmd": None, "output_type": "latent"}
    fun = dataclasses.replace(pipe, models=dataclasses.replace(pipe.models, video=video))
    assert relative_error(fun(**call), case["latents"]) < 1e-4


def test_a_start_image_comes_back(pipe):
    """The first latent frame is the encoded picture to the last bit, whatever the seed and the solver."""
    call = materialised(arguments(load_case("ti2v_5b_i2v", "e2e"))) | {"progress_bar_cmd": None}
    call |= {"output_type": "latent", "num_inference_steps": 2}
    size = VideoSize(96, 64, 9, WAN_22)
    picture = torch.tensor(np.asarray(call["input_image"])).float()[None] / 255
    encoder = LatentEncoder(vae=pipe.models.vae)
    expected = clean_start_conditioning(Conditioning(), size, encoder, picture).clean[:, :, :1]
    runs = [pipe(**call | {"seed": seed, "solver": solver}) for seed in (1, 2) for solver in ("euler", "lcm")]
    assert all(torch.equal(run[:, :, :1], expected) for run in runs)
    assert relative_error(runs[0][:, :, 1:], runs[2][:, :, 1:]) > 0.01


def test_frames_of_a_clip_are_continued(pipe):
    call = {"prompt": "a dog", "height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 2, "seed": 1}
    call |= {"progress_bar_cmd": None, "output_type": "latent"}
    clip = torch.rand(6, 64, 64, 3, generator=torch.Generator().manual_seed(0)).numpy()
    found = pipe(**call, input_image=clip)
    # Two latent frames hold five of the six.
    expected = LatentEncoder(vae=pipe.models.vae).frames(torch.from_numpy(clip[:5]))
    assert torch.equal(found[:, :, :2], expected)
    assert not torch.equal(pipe(**call, input_image=clip[:1])[:, :, 1], found[:, :, 1])
    with pytest.raises(ValueError, match="input_image holds 6 frames, which leaves none of the video's 5 to generate"):
        pipe(**call | {"num_frames": 5}, input_image=clip)


def test_inputs_that_it_cannot_use_are_refused(pipe):
    with pytest.raises(ValueError, match="takes input_image, but got end_image"):
        pipe("a dog", end_image=np.zeros((8, 8, 3), np.uint8))


def small(name="ti2v_5b", frames=1, seed=3):
    """A small model, and conditioning with clean frames."""
    config = SMALL[name]
    generator = torch.Generator().manual_seed(seed)
    cond = Conditioning(text=TEXT, negative_text=TEXT.flip(1))
    if config.concat_channels:
        concat = torch.randn(1, config.concat_channels, *SIZE.latent.shape, generator=generator)
        cond = dataclasses.replace(cond, concat=concat)
    if config.camera_channels:
        cond = dataclasses.replace(cond, camera=torch.randn(1, 24, 5, 64, 64, generator=generator))
    clean = torch.randn(1, 48, frames, 4, 4, generator=generator)
    return filled(WanDiT, config), cond.with_clean_frames(clean, SIZE.latent.frames), clean


RUNS = {
    "euler": {},
    "unipc": {"solver": "unipc"},
    "heun": {"solver": "heun"},
    "lcm": {"solver": "lcm"},
    "interleaved": {"guidance": dataclasses.replace(GUIDED, mode="interleaved")},
    "batched": {"guidance": dataclasses.replace(GUIDED, mode="batched")},
    "CFG-Zero*": {"guidance": dataclasses.replace(GUIDED, zero_star=True, zero_steps=1)},
    "windows": {"windows": WindowSettings(size=3, stride=2)},
    "kept": {"keep_projections": True},
    "TeaCache": {"cache": TeaCacheSettings(threshold=0.3, template="Wan2.1-T2V-1.3B", start_step=1)},
    "EasyCache": {"cache": EasyCacheSettings(threshold=1000.0, start_step=1)},
    "from a video": {"denoise": 0.6},
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("frames", [1, 2])
def test_clean_frames_stay_in_every_run(name, frames):
    dit, cond, clean = small(frames=frames)
    settings = SamplerSettings(**{"steps": 4, "seed": 4, "guidance": GUIDED} | RUNS[name])
    start = torch.ones(1, 48, 5, 4, 4) if "denoise" in RUNS[name] else None
    found = sample(dit, cond, SIZE.latent, settings, RUNTIME, start)
    assert torch.equal(found[:, :, :frames], clean) and found.isfinite().all()
    changed = cond.with_clean_frames(clean + 1, SIZE.latent.frames)
    other = sample(dit, changed, SIZE.latent, settings, RUNTIME, start)
    assert relative_error(other[:, :, frames:], found[:, :, frames:]) > 1e-4


@pytest.mark.parametrize("name", ["euler", "unipc", "windows", "EasyCache"])
def test_the_noise_of_clean_frames_changes_nothing(name, monkeypatch):
    dit, cond, _ = small()
    settings = SamplerSettings(**{"steps": 3, "seed": 4, "guidance": GUIDED} | RUNS[name])
    plain = sample(dit, cond, SIZE.latent, settings, RUNTIME)
    noise = run.initial_noise

    def other(*args):
        x = noise(*args)
        x[:, :, 0] = 100
        return x

    monkeypatch.setattr(run, "initial_noise", other)
    assert torch.equal(sample(dit, cond, SIZE.latent, settings, RUNTIME), plain)


def test_one_window_over_all_frames_is_none():
    dit, cond, _ = small(frames=2)
    settings = SamplerSettings(steps=2, guidance=GUIDED)
    whole = dataclasses.replace(settings, windows=WindowSettings(size=5, stride=5))
    assert torch.equal(*(sample(dit, cond, SIZE.latent, each, RUNTIME) for each in (settings, whole)))


@pytest.mark.parametrize("name", ["ti2v_5b", "fun_5b_inp", "fun_5b_control", "fun_5b_camera"])
@pytest.mark.parametrize("memory", [MemorySettings(persistent_params=0), MemorySettings(persistent_params=200_000)])
def test_streamed_equals_resident(name, memory):
    dit, cond, _ = small(name)
    model = VideoModel.of(dit, match_variant(dit.config), None, "tiny")
    settings = SamplerSettings(steps=2, guidance=GUIDED)
    resident = planned(model, cond, SIZE.latent, settings, RUNTIME)
    assert torch.equal(planned(model, cond, SIZE.latent, settings, RUNTIME, memory), resident)


def test_a_chain_hands_clean_frames_from_clip_to_clip(monkeypatch):
    dit, cond, clean = small()
    windows = WindowSettings(size=3, stride=2, mode="chain", colour_limit=0.0)
    settings = SamplerSettings(steps=2, guidance=GUIDED, windows=windows)
    embed, seen = dit.embed, []

    def look(x, *others):
        seen.append(x[:, :, :1].clone())
        return embed(x, *others)

    monkeypatch.setattr(dit, "embed", look)
    found = sample(dit, cond, SIZE.latent, settings, RUNTIME)
    assert torch.equal(found[:, :, :1], clean)
    calls = len(seen) // 2
    assert all(torch.equal(first, clean) for first in seen[:calls])
    assert all(torch.equal(first, found[:, :, 2:3]) for first in seen[calls:])


def test_caches_measure_the_noisy_frames():
    dit, cond, _ = small()
    evaluations = [(900.0,), (500.0,), (100.0,)]
    plain, held = (TimeTable(dit, evaluations, each) for each in (Conditioning(), cond))
    assert relative_error(held.modulations, plain.modulations) < 1e-6


def test_a_run_in_two_parts_gives_the_same_bits():
    dit, cond, _ = small()
    settings = SamplerSettings(steps=4, guidance=GUIDED, solver="unipc")
    whole = sample(dit, cond, SIZE.latent, settings, RUNTIME)
    first = sample_state(dit, cond, SIZE.latent, dataclasses.replace(settings, end_step=2), RUNTIME)
    second = dataclasses.replace(settings, start_step=2)
    assert torch.equal(sample_state(dit, cond, SIZE.latent, second, RUNTIME, earlier=first).video, whole)


def clip(frames, seed=0):
    return torch.rand(frames, 64, 64, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def encoder():
    return LatentEncoder(vae=tiny_vae_22())


TINY = VideoSize(64, 64, 9, WAN_22)


def test_a_known_first_frame_is_clean_and_everything_else_is_noise(encoder):
    cond = image_conditioning(Conditioning(), TINY, encoder, None, start=clip(1), end=clip(1, seed=1))
    assert torch.equal(cond.clean[:, :, :1], cond.slots["image"][:, :, :1]) and cond.clean[:, :, 1:].eq(0).all()
    assert cond.timestep_index.flatten().tolist() == [0, 1, 1]
    assert relative_error(cond.clean[:, :, :1], encoder.frames(clip(1))) < 1e-5


def test_without_a_first_frame_nothing_is_held(encoder):
    """The mask of the first frame of each group counts, so an end image alone leaves all timesteps whole."""
    end = image_conditioning(Conditioning(), TINY, encoder, None, end=clip(1))
    assert end.clean is end.timestep_index is None
    mask = torch.zeros(9, 64, 64)
    mask[:, :, 32:] = 1
    half = image_conditioning(Conditioning(), TINY, encoder, None, video=clip(9), mask=mask)
    assert half.clean is None and half.timestep_index.shape == (1, 3, 2, 2)
    times = half.timestep_factors[0][half.timestep_index[0]]
    assert times[:, :, 0].eq(0).all() and times[:, :, 1].eq(1).all()


@pytest.mark.parametrize("name", ["fun_5b_inp", "fun_5b_control", "fun_5b_camera"])
def test_the_rows_of_fun_take_their_inputs(name, encoder):
    dit = filled(WanDiT, SMALL[name])
    variant = match_variant(dit.config)
    assert variant.name == name
    inputs = {"input_image": clip(1)}
    if name == "fun_5b_control":
        inputs |= {"control_video": clip(9, seed=1), "reference_image": clip(1, seed=2)}
    cond = condition(Conditioning(text=TEXT, negative_text=TEXT), VideoInputs(**inputs), variant, TINY, encoder, None)
    if name == "fun_5b_camera":
        camera = torch.randn(1, 24, 3, 64, 64)
        cond = cond.with_inputs("camera", camera=camera)
    fitted = fit(cond, variant, dit.config, "model", TINY)
    assert fitted.concat.shape == (1, dit.config.concat_channels, 3, 4, 4)
    found = sample(dit, fitted, TINY.latent, SamplerSettings(steps=2, guidance=GUIDED), RUNTIME)
    assert torch.equal(found[:, :, :1], cond.clean[:, :, :1])
    with pytest.raises(ValueError, match="VAE that belongs to the model"):
        wrong = dataclasses.replace(cond, clean=torch.zeros(1, 16, 3, 4, 4), slots=None)
        fit(wrong, variant, dit.config, "model", TINY)


@pytest.fixture(scope="module")
def from_files(tmp_path_factory):
    """A pipeline of the bundled text-and-image model."""
    root = tmp_path_factory.mktemp("models")

    def load(vae=(catalog.TINY_TI2V, catalog.VAE_22_PATTERN), **changes):
        files = [(catalog.TINY_TI2V, catalog.DIT_PATTERN), (catalog.TINY, catalog.TEXT_ENCODER_PATTERN), vae]
        configs = [ModelConfig(model_id=name, origin_file_pattern=pattern, **changes) for name, pattern in files]
        return WanVideoPipeline.from_pretrained(torch.float32, "cpu", configs, local_model_path=root)

    return load


def test_weights_on_disk_give_the_same_bits(from_files):
    call = {"prompt": "a dog", "height": 32, "width": 64, "num_frames": 5, "num_inference_steps": 2, "seed": 1}
    call |= {"progress_bar_cmd": None, "output_type": "latent", "input_image": clip(1).numpy()}
    resident = from_files()(**call)
    assert resident.shape == (1, 48, 2, 2, 4)
    pipe = from_files(offload_device="disk")
    assert WeightProvider.of(pipe.models.video.dit).mapped
    pipe.enable_vram_management(num_persistent_param_in_dit=0)
    assert torch.equal(pipe(**call), resident)


def test_the_vae_of_wan_21_is_refused_by_its_header(from_files):
    with pytest.raises(ValueError, match=r"VAE of Wan 2\.2 TI2V-5B: Wan2\.2_VAE\.pth, or ComfyUI's wan2\.2_vae"):
        from_files(vae=(catalog.TINY, catalog.VAE_PATTERN))


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_a_picture_is_cropped_as_its_authors_do(name):
    """The size and the crop of the authors; resizing differs by a rounding of colours at most."""
    case = load_case(f"geometry_{name}")
    picture = as_frames(case["image"].numpy(), "input_image")
    across, down = picture.shape[2], picture.shape[1]
    area = int(case.metadata["max_area"])
    # The rule works on the area alone.
    for rule, multiple, key in (("area and crop", 32, "ti2v"), ("area", 16, "i2v")):
        expected = case[key]
        size = size_by_rule(rule, area, 1, (across, down), multiple)
        assert size == (expected.shape[2], expected.shape[1])
    ours = fit_size(picture, case["ti2v"].shape[2], case["ti2v"].shape[1], "crop")[0].permute(2, 0, 1) * 2 - 1
    difference = (ours - case["ti2v"]).abs()
    assert difference.mean() < 0.01 and difference.max() < 0.05


@pytest.mark.parametrize("merge", [False, True])
def test_a_batch_shares_its_start_image(pipe, merge):
    call = {"height": 32, "width": 64, "num_frames": 9, "num_inference_steps": 2, "seed": 1, "cfg_merge": merge}
    call |= {"progress_bar_cmd": None, "output_type": "latent", "input_image": clip(1).numpy()}
    both = pipe(["a dog", "a cat"], **call)
    assert both.shape[0] == 2 and torch.equal(both[0, :, 0], both[1, :, 0])
    assert relative_error(both[0, :, 1:], both[1, :, 1:]) > 1e-3


@pytest.mark.parametrize("chained", [False, True])
def test_an_interrupted_run_continues_with_the_same_bits(tmp_path, chained):
    dit, cond, clean = small()
    windows = WindowSettings(size=3, stride=2, mode="chain") if chained else None
    settings = SamplerSettings(steps=3, guidance=GUIDED, solver="unipc", windows=windows)
    whole = sample(dit, cond, SIZE.latent, settings, RUNTIME)
    steps = []

    def stop(index, total):
        steps.append(index)
        if len(steps) == (5 if chained else 3):
            raise KeyboardInterrupt

    checkpoint = Checkpoint(tmp_path / "run", every=1)
    with pytest.raises(KeyboardInterrupt):
        sample(dit, cond, SIZE.latent, settings, dataclasses.replace(RUNTIME, before_step=stop), checkpoint=checkpoint)
    found = sample(dit, cond, SIZE.latent, settings, RUNTIME, checkpoint=checkpoint)
    assert torch.equal(found, whole) and torch.equal(found[:, :, :1], clean)
