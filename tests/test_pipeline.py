"""The pipeline through files on disk: the published end-to-end call, its parameters, and what it refuses."""

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.pictures import materialised
from tests.reference import DITS, arguments, drawn_weights, filled, load_case, relative_error, tiny_dit, tiny_pair
from wan_core import ModelConfig, WanVideoPipeline, load_video, save_video
from wan_core.catalog import tiny_id
from wan_core.loading.download import DownloadError
from wan_core.media import pixels_to_images
from wan_core.model import VideoModel
from wan_core.models.config import ImageEncoderConfig
from wan_core.models.image_encoder import ImageEncoder
from wan_core.variants import match_variant

PATTERNS = ("diffusion_pytorch_model*.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth")
DIT, TEXT, VAE = range(3)
PICTURE = Image.new("RGB", (40, 30), "red")
SMALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "seed": 1}
WINDOWS = {"sliding_window_size": 2, "sliding_window_stride": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Iterator[Path]:
    """A models folder that holds the bundled model, on whose drawn weights the published calls were made."""
    root = tmp_path_factory.mktemp("models")
    with drawn_weights():
        ModelConfig(model_id="WanCore/tiny", origin_file_pattern=PATTERNS[0], local_model_path=root).files()
        yield root


def configs(models: Path, **changes) -> list[ModelConfig]:
    return [ModelConfig(model_id="WanCore/tiny", origin_file_pattern=p, **changes) for p in PATTERNS]


def load(models: Path, model_configs=None, **changes) -> WanVideoPipeline:
    changes = {"torch_dtype": torch.float32, "device": "cpu", "local_model_path": models} | changes
    return WanVideoPipeline.from_pretrained(model_configs=model_configs or configs(models), **changes)


@pytest.fixture(scope="module")
def pipe(models) -> WanVideoPipeline:
    return load(models)


PAIRS = {
    "t2v_a14b": "t2v", "t2v_a14b_unipc": "t2v", "t2v_a14b_dpmpp": "t2v", "i2v_a14b": "i2v_a14b",
    "i2v_a14b_unipc": "i2v_a14b", "i2v_a14b_end": "i2v_a14b", "fun_a14b_control": "fun_a14b_control",
    "vace_fun_a14b": "vace",
}  # fmt: skip
"""The variant of each call of a pair of experts."""


def call_of_pair(case) -> dict:
    """The arguments of such a call under their names of today."""
    names = {"cfg_scale_high": "cfg_scale", "boundary": "switch_DiT_boundary"}
    return {names.get(name, name): value for name, value in materialised(arguments(case)).items()}


@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_published_calls_of_two_experts(pipe, name):
    case = load_case(name, "e2e")
    call = call_of_pair(case)
    model = tiny_pair(PAIRS[name], call["switch_DiT_boundary"])
    paired = dataclasses.replace(pipe, models=dataclasses.replace(pipe.models, video=model))
    latents = paired(**call, output_type="latent")
    assert relative_error(latents, case["latents"]) < 1e-4
    frames = np.stack([np.asarray(frame) for frame in pixels_to_images(pipe.models.vae.decode(latents))])
    difference = np.abs(frames.astype(int) - case["frames"].numpy().astype(int))
    assert difference.mean() <= 0.25
    assert difference.max() <= 6


def reference_pipeline(pipe: WanVideoPipeline, variant: str) -> WanVideoPipeline:
    """A pipeline with the reference's tiny DiT of that variant, and CLIP at its real width."""
    config = DITS[variant]
    model = VideoModel.of(tiny_dit(variant), match_variant(config), None, variant)
    encoder = None
    if config.has_image_input:
        encoder = filled(ImageEncoder, ImageEncoderConfig(dim=1280, mlp_dim=5120, num_layers=2, out_dim=64))
    return dataclasses.replace(pipe, models=dataclasses.replace(pipe.models, video=model, image=encoder))


@pytest.mark.parametrize("name", ["t2v", "i2v", "fun_control", "vace_video"])
def test_equals_the_published_calls(pipe, name):
    case = load_case(name, "e2e")
    variant = json.loads(case.metadata["case"])["variant"]
    frames = reference_pipeline(pipe, variant)(**materialised(arguments(case)))
    difference = np.abs(np.stack([np.asarray(f) for f in frames]).astype(int) - case["frames"].numpy().astype(int))
    assert difference.mean() <= 0.25
    assert difference.max() <= 6


def test_the_tokens_of_a_start_image_are_those_of_the_picture_as_it_is(pipe):
    """The reference call resized the picture before CLIP saw it; given such a picture, ours is the same to rounding."""
    case = load_case("i2v", "e2e")
    call = materialised(arguments(case))
    call["input_image"] = call["input_image"].resize((96, 64))
    latents = reference_pipeline(pipe, "i2v")(**call, output_type="latent")
    assert relative_error(latents, case["latents"]) < 1e-4


INPUTS = {
    "i2v": {"input_image": PICTURE, "end_image": PICTURE},
    "flf2v": {"input_image": PICTURE, "end_image": PICTURE},
    "fun_control": {"control_video": [PICTURE] * 5, "input_image": PICTURE},
    "fun_v1_1_control": {"control_video": [PICTURE] * 5, "reference_image": PICTURE},
    "fun_camera": {"input_image": PICTURE, "camera_control_direction": "Left"},
    "vace": {"vace_video": [PICTURE] * 5, "vace_reference_image": [PICTURE, PICTURE.resize((20, 50))]},
}


@pytest.fixture(scope="module")
def bundled(models):
    """The bundled pipeline of a variant."""

    @functools.cache
    def pipeline(variant: str) -> WanVideoPipeline:
        dit = ModelConfig(model_id=tiny_id(variant), origin_file_pattern=PATTERNS[DIT])
        image = ModelConfig(model_id="WanCore/tiny", origin_file_pattern="models_clip*.pth")
        return load(models, [dit, *configs(models)[1:], *([image] if DITS[variant].has_image_input else [])])

    return pipeline


@pytest.mark.parametrize("variant", INPUTS)
def test_every_input_reaches_the_video(bundled, variant):
    pipe, inputs = bundled(variant), INPUTS[variant]
    whole = pipe("a dog", **SMALL, **inputs, output_type="latent")
    assert whole.shape == (1, 16, 2, 4, 4)
    for name in inputs:
        changed = {"camera_control_direction": "In"}.get(
            name, PICTURE.resize((30, 40)).transpose(Image.Transpose.ROTATE_90)
        )
        changed = Image.new("RGB", (50, 50), "blue") if isinstance(changed, Image.Image) else changed
        other = pipe("a dog", **SMALL, **{**inputs, name: changed}, output_type="latent")
        assert relative_error(other, whole) > 1e-4, name


@pytest.mark.parametrize("variant", INPUTS)
def test_video_to_video_on_every_row(bundled, variant):
    pipe, inputs = bundled(variant), INPUTS[variant]
    video = [Image.new("RGB", (32, 32), (i * 40, 90, 200)) for i in range(5)]
    start = pipe("a dog", **SMALL, **inputs, input_video=video, denoising_strength=0.0, output_type="latent")
    near = pipe("a dog", **SMALL, **inputs, input_video=video, denoising_strength=0.1, output_type="latent")
    far = pipe("a dog", **SMALL, **inputs, input_video=video, denoising_strength=0.8, output_type="latent")
    assert start.shape == (1, 16, 2, 4, 4)
    assert relative_error(near, start) < relative_error(far, start)


def test_an_inpainting_model_without_an_image_makes_video_of_text(bundled):
    assert bundled("i2v")("a dog", **SMALL, output_type="tensor").shape == (1, 3, 5, 32, 32)


def test_a_stream_is_the_same_frames_and_goes_into_a_file(bundled, tmp_path):
    pipe = bundled("t2v")
    frames, stream = (pipe("a dog", **SMALL, output_type=kind) for kind in ("pil", "stream"))
    assert not isinstance(stream, list) and list(stream) == frames
    path = save_video(pipe("a dog", **SMALL, output_type="stream"), tmp_path / "a.mp4")
    assert len(load_video(path)) == len(frames)


def test_a_stream_of_two_videos_is_refused(bundled):
    with pytest.raises(ValueError, match="frames of one video"):
        bundled("t2v")(["a dog", "a cat"], **SMALL, output_type="stream")


@pytest.mark.parametrize("variant", ["i2v", "vace"])
def test_a_batch_shares_its_inputs(bundled, variant):
    pipe, inputs = bundled(variant), INPUTS[variant]
    both = pipe(["a dog", "a dog"], **SMALL, **inputs, output_type="latent")
    assert both.shape[0] == 2


def test_vace_of_strength_zero_is_text_to_video(bundled):
    pipe = bundled("vace")
    video = {"vace_video": [PICTURE] * 5}
    plain = pipe("a dog", **SMALL, output_type="latent")
    assert torch.equal(pipe("a dog", **SMALL, **video, vace_scale=0.0, output_type="latent"), plain)
    assert not torch.equal(pipe("a dog", **SMALL, **video, output_type="latent"), plain)


def test_pictures_without_the_image_encoder_are_refused_before_anything_runs(models):
    dit = ModelConfig(model_id=tiny_id("i2v"), origin_file_pattern=PATTERNS[DIT])
    pipe = load(models, [dit, *configs(models)[1:]])
    with pytest.raises(ValueError, match="reads input_image through the CLIP image encoder too; add models_clip"):
        pipe("a dog", **SMALL, input_image=PICTURE)


def test_speed_control(models):
    controller = ModelConfig(model_id="WanCore/tiny", origin_file_pattern="model.safetensors")
    pipe = load(models, [*configs(models), controller])
    slow, fast, none = (pipe("a dog", **SMALL, motion_bucket_id=m, output_type="latent") for m in (0, 100.0, None))
    assert relative_error(slow, fast) > 1e-3
    assert relative_error(slow, none) > 1e-3


def test_a_vace_branch_from_a_file_of_its_own(models, bundled, tmp_path):
    whole = bundled("vace")
    weights = load_file(models / tiny_id("vace") / "diffusion_pytorch_model.safetensors")
    branch, base = tmp_path / "branch.safetensors", tmp_path / "base.safetensors"
    save_file({n: t for n, t in weights.items() if n.startswith("vace")}, branch)
    save_file({n: t for n, t in weights.items() if not n.startswith("vace")}, base)
    joined = load(models, [ModelConfig(path=base), ModelConfig(path=branch), *configs(models)[1:]])
    call = {**SMALL, **INPUTS["vace"], "output_type": "latent"}
    assert torch.equal(joined("a dog", **call), whole("a dog", **call))


def test_the_published_call_as_a_file(pipe, tmp_path):
    case = load_case("t2v", "e2e")
    latents = pipe(**arguments(case), output_type="latent")
    assert relative_error(latents, case["latents"]) < 1e-4
    frames = pipe(**arguments(case))
    difference = np.abs(np.stack([np.asarray(f) for f in frames]).astype(int) - case["frames"].numpy().astype(int))
    assert difference.mean() <= 0.25
    assert difference.max() <= 6
    path = save_video(frames, tmp_path / "video.mp4", fps=15, quality=5)
    assert [f.size for f in load_video(path)] == [(96, 64)] * 9


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        ({}, (1, 3, 5, 32, 32)),
        ({"num_frames": 1}, (1, 3, 1, 32, 32)),
        ({"num_frames": 2}, (1, 3, 5, 32, 32)),
        ({"width": 33, "height": 17}, (1, 3, 5, 32, 48)),
        ({"prompt": ["a dog", "a cat"]}, (2, 3, 5, 32, 32)),
        ({"cfg_scale": 1}, (1, 3, 5, 32, 32)),
    ],
)
def test_sizes_and_batches(pipe, change, shape):
    pixels = pipe(**{"prompt": "a dog", **SMALL, **change}, output_type="tensor")
    assert pixels.shape == shape
    assert -1 <= pixels.min() < pixels.max() <= 1


def test_a_batch_of_prompts_returns_a_video_each(pipe):
    videos = pipe(["a dog", "a cat"], ["dark", "rain"], **SMALL)
    assert [len(v) for v in videos] == [5, 5]


def test_merged_guidance_and_tiles_change_nothing_that_matters(pipe):
    plain = pipe("a dog", "dark", **SMALL, output_type="tensor")
    merged = pipe("a dog", "dark", **SMALL, output_type="tensor", cfg_merge=True)
    tiled = pipe("a dog", "dark", **SMALL, output_type="tensor", tiled=True, tile_size=(8, 8), tile_stride=(8, 8))
    assert relative_error(merged, plain) < 1e-4
    assert torch.equal(tiled, plain)


def test_the_seed_decides(pipe):
    first, again = (pipe("a dog", **SMALL, output_type="latent") for _ in range(2))
    assert torch.equal(first, again)
    without = {k: v for k, v in SMALL.items() if k != "seed"}
    assert not torch.equal(
        pipe("a dog", **without, output_type="latent"), pipe("a dog", **without, output_type="latent")
    )


def test_the_progress_bar_is_walked_to_its_end(pipe):
    seen = []

    def bar(steps):
        for step in steps:
            seen.append(step)
            yield step
        seen.append("end")

    pipe("a dog", **SMALL, progress_bar_cmd=bar, output_type="latent")
    assert seen == [0, 1, "end"]


def test_rounding_is_said(pipe, caplog):
    pipe("a dog", **{**SMALL, "num_frames": 3}, output_type="latent")
    assert "Rounded up to 32x32, 5 frames" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": []}, "prompt must be"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["d", "e"]}, "3 prompts need"),
        ({"height": 0}, "height must be"),
        ({"width": -16}, "width must be"),
        ({"num_frames": 0}, "num_frames must be"),
        ({"num_frames": 4.5}, "num_frames must be"),
        ({"cfg_scale": float("nan")}, "cfg_scale must be"),
        ({"sigma_shift": float("inf")}, "sigma_shift must be"),
        ({"num_inference_steps": 0}, "num_inference_steps must be"),
        ({"solver": "rk4"}, "solver must be one of"),
        ({"seed": -1}, "seed must be"),
        ({"tiled": True, "tile_size": (4, 4), "tile_stride": (5, 4)}, "tile_stride must not be above tile_size"),
        ({"output_type": "gif"}, "output_type must be"),
        ({"input_image": object()}, "input_image must be a picture"),
        ({"input_image": PICTURE}, r"WanCore/tiny takes motion_bucket_id, but got input_image\. Remove it, or load"),
        ({"motion_bucket_id": 50}, "needs the speed-control adapter"),
        ({"camera_control_direction": "Left"}, "but got camera"),
        ({"vace_video": [PICTURE], "vace_scale": float("nan")}, "vace_scale must be a number"),
        ({"tea_cache_l1_thresh": 0.1, "tea_cache_model_id": "Wan3"}, "tea_cache_model_id must be one of"),
        ({"tea_cache_l1_thresh": -1.0}, "tea_cache_l1_thresh must be"),
        ({"sliding_window_size": 5}, "belong together"),
        ({"sliding_window_size": 2, "sliding_window_stride": 3}, "sliding_window_stride must be from 1 to 2"),
        ({"cfg_scale": [5.0, float("nan")]}, "cfg_scale must be"),
        ({"window_prompts": ["a cat"]}, "window_prompts needs windows"),
        ({"window_prompts": "a cat", **WINDOWS}, "must be a list with a prompt for each window"),
        ({"window_prompts": [7], **WINDOWS}, "window_prompts must be a string or a list"),
        ({"window_prompts": [["a", "b"]], **WINDOWS}, "one prompt or 1, as in prompt"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(pipe, monkeypatch, change, words):
    monkeypatch.setattr(type(pipe.models.text.model), "forward", lambda *_: pytest.fail("the text encoder ran"))
    with pytest.raises(ValueError, match=words):
        pipe(**{"prompt": "a dog", **SMALL, **change})


def paths(models: Path) -> list[Path]:
    folder = models / "WanCore" / "tiny"
    return [folder / "diffusion_pytorch_model.safetensors", folder / PATTERNS[TEXT], folder / PATTERNS[VAE]]


def test_models_are_found_by_path_and_in_any_order(models, pipe):
    by_path = load(models, [ModelConfig(path=str(p)) for p in reversed(paths(models))])
    assert torch.equal(by_path("a dog", **SMALL, output_type="latent"), pipe("a dog", **SMALL, output_type="latent"))


def test_shards_given_flat_are_one_model(models, pipe, tmp_path):
    weights = load_file(paths(models)[DIT])
    names = sorted(weights)
    shards = []
    for i in range(3):
        shards.append(tmp_path / f"diffusion_pytorch_model-0000{i + 1}-of-00003.safetensors")
        save_file({n: weights[n] for n in names[i::3]}, shards[-1])
    files = paths(models)
    sharded = load(
        models, [ModelConfig(path=[str(s) for s in reversed(shards)]), *(ModelConfig(path=f) for f in files[1:])]
    )
    assert torch.equal(sharded("a dog", **SMALL, output_type="latent"), pipe("a dog", **SMALL, output_type="latent"))


def test_weights_that_rest_elsewhere_give_the_same_video(models, pipe):
    offloaded = load(models, configs(models, offload_device="cpu"))
    assert torch.equal(offloaded("a dog", **SMALL, output_type="latent"), pipe("a dog", **SMALL, output_type="latent"))


def test_a_component_missing_or_given_twice(models):
    with pytest.raises(ValueError, match="lacks a VAE; it has dit, text_encoder"):
        load(models, configs(models)[:2])
    with pytest.raises(ValueError, match="was given for both experts"):
        load(models, [*configs(models), configs(models)[0]])


@pytest.mark.parametrize("config", [ModelConfig(), ModelConfig(model_id="a/b")])
def test_a_config_that_names_nothing(models, config):
    with pytest.raises(ValueError, match="ModelConfig needs"):
        load(models, [config])


def test_a_published_model_that_is_not_here(models):
    absent = ModelConfig(model_id="Wan-AI/Wan2.1-T2V-14B", origin_file_pattern=PATTERNS[DIT], skip_download=True)
    with pytest.raises(DownloadError, match=re.escape("Wan-AI/Wan2.1-T2V-14B")):
        load(models, [absent])


def test_a_tokenizer_folder_without_its_files(models, tmp_path):
    broken = tmp_path / "WanCore" / "tiny"
    shutil.copytree(models / "WanCore" / "tiny", broken)
    (broken / "google" / "umt5-xxl" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json or spiece\.model expected, found nothing"):
        load(models, [ModelConfig(path=p) for p in paths(tmp_path)])


@pytest.mark.parametrize("rest", ["cpu", "disk"])
@pytest.mark.parametrize(
    "limit",
    [{"vram_limit": 0}, {"num_persistent_param_in_dit": 0}, {"num_persistent_param_in_dit": 5 * 10**6},
     {"vram_limit": 2, "vram_buffer": 1.995}, {}],
    ids=str,
)  # fmt: skip
def test_memory_options_change_no_bit(models, pipe, rest, limit):
    managed = load(models, configs(models, offload_device=rest))
    managed.enable_vram_management(**limit)
    call = {**SMALL, "output_type": "tensor"}
    assert torch.equal(managed("a dog", **call), pipe("a dog", **call))


def test_weights_can_rest_in_fp8(models, pipe):
    eight = load(models, [*configs(models, offload_dtype=torch.float8_e4m3fn)[:2], configs(models)[2]])
    assert eight.dit.blocks[0].ffn[0].weight.dtype == torch.float8_e4m3fn
    call = {**SMALL, "output_type": "latent"}
    assert relative_error(eight("a dog", **call), pipe("a dog", **call)) < 0.05


def test_disk_and_another_dtype_contradict_each_other(models):
    with pytest.raises(ValueError, match="Weights on disk have the dtype of their file"):
        load(models, configs(models, offload_device="disk", offload_dtype=torch.float16))


def test_windows_equal_the_published_call(pipe):
    case = load_case("t2v_window", "e2e")
    frames = pipe(**arguments(case))
    difference = np.abs(np.stack([np.asarray(f) for f in frames]).astype(int) - case["frames"].numpy().astype(int))
    assert difference.mean() <= 0.25
    assert difference.max() <= 6


def test_each_window_shows_its_own_prompt(pipe):
    def call(prompt="a dog", size=2, **changes):
        windows = {"sliding_window_size": size, "sliding_window_stride": 1}
        return pipe(prompt, **{**SMALL, "num_frames": 13}, **windows, **changes, output_type="latent")

    plain = call()
    assert torch.equal(call(window_prompts=["a dog"]), plain)
    changed = call(window_prompts=["a dog", "a dog", "a cat"])
    assert torch.equal(changed[:, :, :1], plain[:, :, :1])
    assert not torch.equal(changed[:, :, 3:], plain[:, :, 3:])
    assert torch.equal(call(size=9, window_prompts=["a cat"]), call("a cat", size=9))
    both = call(["a dog", "a tree"], window_prompts=["a dog", ["a dog", "a cat"]])
    assert torch.allclose(both[:1], plain, atol=1e-4)
    assert not torch.allclose(both[1:], call("a tree"), atol=1e-3)


def test_teacache_leaves_out_steps_and_a_threshold_of_zero_none(pipe, caplog):
    caplog.set_level("INFO", "wancore")
    call = {**SMALL, "num_inference_steps": 12, "output_type": "latent"}
    plain = pipe("a dog", **call)
    assert torch.equal(pipe("a dog", **call, tea_cache_l1_thresh=0.0), plain)
    skipped = pipe("a dog", **call, tea_cache_l1_thresh=50.0, tea_cache_model_id="Wan2.1-T2V-1.3B")
    assert not torch.equal(skipped, plain)
    assert "of 12 steps" in caplog.text


def test_a_lora_is_applied_and_cleared(models, tmp_path):
    pipe = load(models)
    lora = {
        f"diffusion_model.blocks.0.self_attn.q.lora_{x}.weight": torch.randn(*s)
        for x, s in (("A", (4, 256)), ("B", (256, 4)))
    }
    save_file(lora, tmp_path / "style.safetensors")
    plain = pipe("a dog", **SMALL, output_type="latent")
    report = pipe.load_lora(pipe.dit, tmp_path / "style.safetensors", alpha=1)
    assert "1" in report.summary
    assert relative_error(pipe("a dog", **SMALL, output_type="latent"), plain) > 1e-3
    pipe.clear_lora()
    assert torch.equal(pipe("a dog", **SMALL, output_type="latent"), plain)
    with pytest.raises(ValueError, match=r"pipe\.dit, pipe\.vace or pipe\.motion_controller; got vae"):
        pipe.load_lora(pipe.vae, tmp_path / "style.safetensors")
