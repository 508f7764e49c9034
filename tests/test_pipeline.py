"""The pipeline through files on disk: the published end-to-end call, its parameters, and what it refuses."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from wancore.wan_core import ModelConfig, WanVideoPipeline, load_video, save_video
from wancore.wan_core.checkpoints.download import DownloadError

from tests.reference import arguments, load_case, relative_error

PATTERNS = ("diffusion_pytorch_model*.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth")
DIT, TEXT, VAE = range(3)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A models folder that holds the bundled model."""
    root = tmp_path_factory.mktemp("models")
    ModelConfig(model_id="WanCore/tiny", origin_file_pattern=PATTERNS[0], local_model_path=root).files()
    return root


def configs(models: Path, **changes) -> list[ModelConfig]:
    return [ModelConfig(model_id="WanCore/tiny", origin_file_pattern=p, **changes) for p in PATTERNS]


def load(models: Path, model_configs=None, **changes) -> WanVideoPipeline:
    changes = {"torch_dtype": torch.float32, "device": "cpu", "local_model_path": models} | changes
    return WanVideoPipeline.from_pretrained(model_configs=model_configs or configs(models), **changes)


@pytest.fixture(scope="module")
def pipe(models) -> WanVideoPipeline:
    return load(models)


def test_equals_the_published_call(pipe, tmp_path):
    case = load_case("t2v", "e2e")
    latents = pipe(**arguments(case), output_type="latent")
    assert relative_error(latents, case["latents"]) < 1e-4
    frames = pipe(**arguments(case))
    difference = np.abs(np.stack([np.asarray(f) for f in frames]).astype(int) - case["frames"].numpy().astype(int))
    assert difference.mean() <= 0.25
    assert difference.max() <= 6
    path = save_video(frames, tmp_path / "video.mp4", fps=15, quality=5)
    assert [f.size for f in load_video(path)] == [(96, 64)] * 9


SMALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "seed": 1}


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
        ({"sigma_shift": float("inf")}, "shift must be"),
        ({"num_inference_steps": 0}, "steps must be"),
        ({"solver": "heun"}, "solver must be one of"),
        ({"seed": -1}, "seed must be"),
        ({"tiled": True, "tile_size": (4, 4), "tile_stride": (5, 4)}, "Tiles need"),
        ({"output_type": "gif"}, "output_type must be"),
        ({"input_image": object()}, "input_image is not supported"),
        ({"tea_cache_l1_thresh": 0.1}, "tea_cache_l1_thresh is not supported"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(pipe, monkeypatch, change, words):
    monkeypatch.setattr(type(pipe.text_encoder.model), "forward", lambda *_: pytest.fail("the text encoder ran"))
    with pytest.raises(ValueError, match=words):
        pipe(**{"prompt": "a dog", **SMALL, **change})


def test_an_unknown_argument_is_a_type_error(pipe):
    with pytest.raises(TypeError, match="no parameter 'promt'"):
        pipe(promt="a dog")


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
    with pytest.raises(ValueError, match="Two models of one kind"):
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


def test_later_parts_say_that_they_are_later(pipe):
    with pytest.raises(ValueError, match="not part of this version"):
        pipe.enable_vram_management(vram_limit=8)
    with pytest.raises(ValueError, match="not supported by this version"):
        pipe.load_lora(pipe.dit, "style.safetensors", alpha=1)
