"""Films that go on and films through pictures, by every model that can, through the files of the bundled models."""

import dataclasses
import functools
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests import fork_server
from tests.reference import ALL_DITS, filled, tiny_vae_22
from tests.sampling.variants import SMALL
from tools.family.judge import Family
from wan_core import ModelConfig, WanVideoPipeline, save_video
from wan_core.conditioning.film import Extension, extend_conditioning, keyframe_inputs
from wan_core.conditioning.image import Fit, LatentEncoder
from wan_core.conditioning.inputs import VideoInputs
from wan_core.drift import measure_drift
from wan_core.model import VideoModel
from wan_core.models.config import PreviewDecoderConfig
from wan_core.models.dit import WanDiT
from wan_core.models.preview_decoder import PreviewDecoder
from wan_core.sampling.checkpoint import save_latents
from wan_core.sampling.experts import Expert
from wan_core.types import Conditioning, VideoSize
from wan_core.variants import VARIANTS, match_variant
from wancore.trainer.data.synthetic import Scene

PATTERNS = (
    "diffusion_pytorch_model*.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "models_clip*.pth"
)  # fmt: skip
FAST = {"num_frames": 9, "num_inference_steps": 1, "seed": 1, "cfg_scale": 1.0, "progress_bar_cmd": None}


def pictures(count: int, side: int = 32, seed: int = 0) -> list[Image.Image]:
    noise = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)
    return [Image.fromarray(frame) for frame in noise]


def loaded(folder: Path, *further: ModelConfig) -> WanVideoPipeline:
    configs = [ModelConfig(model_id="WanCore/tiny", origin_file_pattern=pattern) for pattern in PATTERNS]
    return WanVideoPipeline.from_pretrained(torch.float32, "cpu", [*configs, *further], local_model_path=folder)


def of_variant(pipeline: WanVideoPipeline, variant: str) -> WanVideoPipeline:
    """`pipeline` with a small model of that structure; two experts where those of the authors are."""
    config = dataclasses.replace(SMALL[variant], image_dim=pipeline.models.image.config.dim)
    seeds = (1, 2) if "a14b" in variant else (0,)
    experts = [Expert(filled(WanDiT, config, seed), 500.0 * (seed == 1)) for seed in seeds]
    models = dataclasses.replace(
        pipeline.models, video=VideoModel(tuple(experts), match_variant(config), None, variant),
        vae=tiny_vae_22() if config.geometry.frame_times else pipeline.models.vae,
        image=pipeline.models.image if config.has_image_input else None,
    )  # fmt: skip
    return dataclasses.replace(pipeline, models=models)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def pipe(models):
    """A pipeline of each variant, on the bundled encoders."""
    return functools.cache(functools.partial(of_variant, loaded(models)))


CAN_EXTEND = ("t2v", "i2v", "vace", "i2v_a14b", "ti2v_5b", "fun_5b_inp")


@pytest.mark.parametrize("variant", CAN_EXTEND)
def test_a_film_of_frames_goes_on(pipe, variant):
    """Its frames come out as they are; a clip of nine frames that takes over five adds four."""
    film = pictures(7)
    longer = pipe(variant).extend(film, ["a dog", "a cat"], **FAST)
    assert len(longer) == 7 + 2 * 4
    assert all(np.array_equal(old, new) for old, new in zip(film, longer, strict=False))
    other = pipe(variant).extend([*film[:-1], pictures(1, seed=5)[0]], ["a dog", "a cat"], **FAST)
    assert not np.array_equal(other[-1], longer[-1]), "the last clip depends on the last frame"


@pytest.mark.parametrize("variant", CAN_EXTEND)
def test_a_film_of_latents_goes_on(pipe, variant, tmp_path):
    """They stay as they are and are encoded no more; a file of them is the same film."""
    pipeline, geometry = pipe(variant), ALL_DITS[variant].geometry
    film = torch.randn(1, geometry.channels, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    longer = pipeline.extend(film, "a dog", clips=2, output_type="latent", **FAST)
    assert longer.shape[2] == 3 + 2
    assert torch.equal(longer[:, :, :3], film)
    again = pipeline.extend(longer[:, :, :4], "a dog", output_type="latent", **FAST)
    assert torch.equal(again[:, :, :4], longer[:, :, :4])


def encoder_of(pipeline) -> tuple[LatentEncoder, list[int]]:
    """An encoder that writes down how many frames it encodes."""
    lengths: list[int] = []

    def encode(pixels):
        lengths.append(pixels.shape[2])
        return pipeline.models.vae.encode(pixels)

    return LatentEncoder(vae=pipeline.models.vae, encode=encode), lengths


@pytest.mark.parametrize(
    ("variant", "frames", "latents"),
    [("i2v_a14b", [9, 9], [9]), ("vace", [9, 9, 9, 9], [9, 9]), ("t2v", [5], []), ("ti2v_5b", [5], [])],
)
def test_nothing_is_encoded_twice(pipe, variant, frames, latents):
    """The first clip with its kept frames, and what is unknown of all others once; VACE has two videos of each."""
    pipeline = pipe(variant)
    geometry, row = ALL_DITS[variant].geometry, match_variant(ALL_DITS[variant])
    extension = Extension.of(VideoSize(32, 32, 9, geometry), 4, None, row)
    encoder, lengths = encoder_of(pipeline)
    extend = functools.partial(
        extend_conditioning, Conditioning(text=torch.zeros(1, 4, 64)), VideoInputs(), extension, row, encoder, None
    )
    tail = torch.rand(5, 32, 32, 3)
    given = extend(tail=tail)
    assert sorted(lengths) == frames
    expected = pipeline.models.vae.encode(tail.permute(3, 0, 1, 2)[None] * 2 - 1)
    assert torch.allclose(given.continues.film, expected, atol=1e-5)
    lengths.clear()
    extend(film=given.continues.film, decode=pipeline.models.vae.decode)
    assert sorted(lengths) == latents


@pytest.mark.parametrize("variant", ["i2v", "flf2v", "vace", "i2v_a14b"])
def test_a_loop_ends_in_the_first_frame(pipe, variant):
    """The model is told so: another first frame of the film changes the new frames, without a loop it does not."""
    call = {"keep_frames": 1, **FAST}
    film, other = pictures(6), [*pictures(1, seed=7), *pictures(6)[1:]]
    looped, changed = (pipe(variant).extend(frames, loop=True, **call) for frames in (film, other))
    assert not np.array_equal(looped[-2], changed[-2])
    if variant != "flf2v":
        assert np.array_equal(*(pipe(variant).extend(frames, **call)[-2] for frames in (film, other)))


def program(folder: str, result: str, stop: str) -> None:
    """An extension by two clips of three steps in a process of its own, which kills itself after step `stop`."""
    torch.set_num_threads(1)

    def steps(numbers):
        for number in numbers:
            if number == int(stop):
                os.kill(os.getpid(), signal.SIGKILL)
            print(number, flush=True)
            yield number

    call = {**FAST, "num_inference_steps": 3, "progress_bar_cmd": steps}
    pipeline = of_variant(loaded(Path(folder, "models")), "vace")
    latents = pipeline.extend(
        pictures(6), ["a dog", "a cat"], resume=Path(folder, "kept"), output_type="latent", **call
    )
    torch.save(latents, result)


def test_a_film_that_is_killed_between_clips_goes_on_bit_for_bit(models, pipe, tmp_path):
    whole = pipe("vace").extend(
        pictures(6), ["a dog", "a cat"], output_type="latent", **FAST | {"num_inference_steps": 3}
    )
    (tmp_path / "models").symlink_to(models)
    command = ["-c", "import sys, tests.conftest; from tests.test_films import program; program(*sys.argv[1:])",
               tmp_path, tmp_path / "result"]  # fmt: skip
    assert fork_server.run([*command, "4"]).returncode == -9
    assert not (tmp_path / "result").exists()
    again = fork_server.run([*command, "99"])
    assert again.returncode == 0, again.stderr
    assert len(again.stdout.split()) == 4, "the steps of the second clip, and one before the first"
    assert torch.equal(torch.load(tmp_path / "result"), whole)
    assert not list((tmp_path / "kept").iterdir())


class Stopped(Exception):
    """What ends a run between two steps."""


def counting(log: list[int], stop: int = 0):
    """A progress bar that writes down each item, and raises in place of item `stop`, counted from 1 over all bars."""

    def bar(numbers):
        for number in numbers:
            if len(log) + 1 == stop:
                raise Stopped
            log.append(number)
            yield number

    return bar


UNFINISHED = {
    "extend, in the second clip": ("vace", "extend", 1, 6, 1 + 2),
    "extend with two experts": ("i2v_a14b", "extend", 1, 6, 1 + 2),
    "extend, clean frames": ("ti2v_5b", "extend", 1, 3, 1 + 5),
    "extend, saved after each clip": ("vace", "extend", None, 6, 1 + 3),
    "extend, held": ("t2v", "extend", 2, 4, 1 + 4),
    "segments, in the second clip": ("flf2v", "segments", 1, 6, 1 + 1 + 2),
    "segments, saved after each clip": ("vace", "segments", None, 6, 1 + 3),
}
"""Variant, call, steps between saved states, the item of the progress bars that raises, and those of another call."""


@pytest.mark.parametrize("name", UNFINISHED)
def test_a_film_that_ends_between_steps_goes_on_bit_for_bit(pipe, tmp_path, name):
    """Only what was not saved is made again; what was kept is removed with the last frame."""
    variant, what, every, stop, left = UNFINISHED[name]
    frames = {"extend": pictures(6), "segments": pictures(3)}[what]
    sides = {"height": 32, "width": 32} if what == "segments" else {}
    make = functools.partial(getattr(pipe(variant), what), frames, ["a dog", "a cat"], output_type="latent",
                             **{**FAST, "num_inference_steps": 3, **sides})  # fmt: skip
    kept = functools.partial(make, resume=tmp_path / "kept", checkpoint_every=every)
    with pytest.raises(Stopped):
        kept(progress_bar_cmd=counting([], stop))
    seen: list[int] = []
    again, whole = kept(progress_bar_cmd=counting(seen)), make()
    assert len(seen) == left
    pairs = zip(again, whole, strict=True) if what == "segments" else [(again, whole)]
    assert all(torch.equal(*pair) for pair in pairs)
    assert not list((tmp_path / "kept").iterdir())


@pytest.mark.parametrize("variant", ["flf2v", "i2v", "i2v_a14b"])
def test_keyframes_at_both_ends_are_a_start_and_an_end_image(pipe, variant):
    first, last = pictures(2)
    make = functools.partial(pipe(variant), "a dog", height=32, width=32, output_type="latent", **FAST)
    assert torch.equal(make(keyframes={-1: last, 0: first}), make(input_image=first, end_image=last))


@pytest.mark.parametrize("variant", [row.name for row in VARIANTS])
def test_keyframes_are_inputs_that_the_model_takes(variant):
    """At any frame, at the ends, at the beginning, or nowhere."""
    row = next(row for row in VARIANTS if row.name == variant)
    size, picture = VideoSize(32, 32, 9), torch.rand(1, 32, 32, 3)
    takes = {"any": (0, 4, 8), "ends": (0, 8), "first": (0,), "none": ()}[row.keyframes]
    for frame in (0, 4, 8):
        if frame in takes:
            fields = keyframe_inputs(row, {frame: picture}, size, Fit())
            assert set(VideoInputs(**fields).names()) <= set(row.accepts)
        else:
            with pytest.raises(ValueError, match="takes pictures at"):
                keyframe_inputs(row, {frame: picture}, size, Fit())


def test_keyframes_of_vace_are_the_kept_part_of_a_video(pipe):
    picture = pictures(1)[0]
    video, drawn = torch.full((9, 32, 32, 3), 0.5), torch.ones(9, 32, 32)
    video[4], drawn[4] = torch.from_numpy(np.asarray(picture) / np.float32(255)), 0
    make = functools.partial(pipe("vace"), "a dog", height=32, width=32, output_type="latent", **FAST)
    assert torch.equal(make(keyframes={4: picture}), make(vace_video=video, vace_video_mask=drawn))
    assert not torch.allclose(make(keyframes={4: picture}), make(), atol=2e-2)


def test_segments_are_calls_of_first_and_last_frames_joined(pipe):
    stops = pictures(3)
    call = {"height": 32, "width": 32, "output_type": "tensor", **FAST}
    film = pipe("flf2v").segments(stops, ["a dog", "a cat"], **call)
    first = pipe("flf2v")("a dog", input_image=stops[0], end_image=stops[1], **call)
    second = pipe("flf2v")("a cat", input_image=stops[1], end_image=stops[2], **call)
    assert torch.equal(film, torch.cat((first, second[:, :, 1:]), 2))
    looped = pipe("flf2v").segments(stops, "a dog", loop=True, **call | {"output_type": "stream"})
    assert len(list(looped)) == 1 + 3 * 8


def test_a_film_is_a_file_too(pipe, tmp_path):
    film = pictures(6, 64)
    save_video(film, tmp_path / "film.mp4", fps=16, quality=9)
    longer = pipe("t2v").extend(tmp_path / "film.mp4", "a dog", output_type="stream", **FAST)
    assert len(list(longer)) == 6 + 4
    raw = torch.randn(1, 16, 3, 4, 4)
    path = save_latents(tmp_path, "film", raw, {})
    longer = pipe("t2v").extend(path, "a dog", output_type="latent", **FAST)
    assert longer.shape == (1, 16, 4, 4, 4)


@pytest.mark.parametrize("variant", ["t2v", "ti2v_5b"])
def test_the_tiny_autoencoder_decodes_what_is_made(pipe, variant):
    """Calls and films take its frames in place of the VAE's; latents stay the same, and kept frames are the VAE's."""
    pipeline = pipe(variant)
    z, patch = (48, 2) if variant == "ti2v_5b" else (16, 1)
    tiny = filled(PreviewDecoder, PreviewDecoderConfig(latent_channels=z, widths=(8, 6, 4, 4), patch=patch))
    pipeline = dataclasses.replace(pipeline, models=dataclasses.replace(pipeline.models, tiny_autoencoder=tiny))
    call = {**FAST, "height": 32, "width": 32}
    latents = pipeline("a dog", **call, output_type="latent")
    assert torch.equal(pipeline("a dog", **call, output_type="latent", decoder="taew2"), latents)
    video = pipeline("a dog", **call, output_type="tensor", decoder="taew2")
    assert torch.equal(video, tiny.decode(latents))
    film = pictures(6)
    plain, fast = (pipeline.extend(film, "a dog", **FAST, decoder=name) for name in ("vae", "taew2"))
    assert len(plain) == len(fast)
    assert all(np.array_equal(old, new) for old, new in zip(film, fast, strict=False))
    assert not np.array_equal(plain[-1], fast[-1])


def test_a_tiny_autoencoder_is_one_of_the_models(models, tmp_path):
    """Loaded from its file; without it, or with the one for other latents, the choice is refused before a run."""
    for name, channels, patch in (("taew2_1", 16, 1), ("taew2_2", 48, 2)):
        config = PreviewDecoderConfig(latent_channels=channels, widths=(8, 6, 4, 4), patch=patch)
        save_file(filled(PreviewDecoder, config).state_dict(), tmp_path / f"{name}.safetensors")
    loaded_with = loaded(models, ModelConfig(path=tmp_path / "taew2_1.safetensors"))
    call = {**FAST, "height": 32, "width": 32}
    assert len(loaded_with("a dog", decoder="taew2", **call)) == 9
    with pytest.raises(ValueError, match="add taew2_1 to model_configs"):
        loaded(models)("a dog", decoder="taew2", **call)
    with pytest.raises(ValueError, match="decoder must be one of vae, taew2"):
        loaded_with("a dog", decoder="tiny", **call)
    with pytest.raises(ValueError, match="latents of 48 channels, but"):
        loaded(models, ModelConfig(path=tmp_path / "taew2_2.safetensors"))


@pytest.mark.parametrize("variant", ["t2v", "i2v", "vace"])
@pytest.mark.parametrize("seed", [0, 2])
def test_joints_of_a_trained_model_are_not_seen(models, variant, seed):
    """By the drift meter, which sees a cut to the same clip in a mirror."""
    pipeline, scene = Family(models).pipe(variant), Scene.random(seed)
    drawn = torch.from_numpy(scene.drawn(96, 64, 17).video).movedim(3, 0)[None] / 127.5 - 1
    call = {**FAST, "num_frames": 17, "num_inference_steps": 8, "output_type": "tensor"}
    longer = pipeline.extend(pipeline.models.vae.encode(drawn), scene.caption(), **call)
    frames = (longer[0].movedim(0, 3) + 1) / 2
    joint, cut = (
        measure_drift(torch.cat((frames[:17], after)), (17,)).joints[0] for after in (frames[17:], frames[17:].flip(2))
    )
    assert joint.motion < 2.5
    assert joint.colour < 2.5
    assert cut.motion > 2 * joint.motion


REFUSED = {
    "no prompt": ("t2v", {"prompts": []}, "prompts must be"),
    "no clip": ("t2v", {"clips": 0}, "clips must be a whole number"),
    "nothing new": ("t2v", {"keep_frames": 9}, "leaves nothing of a clip of 9"),
    "too short": ("t2v", {"film": pictures(3)}, "has 3 frames, and each clip takes over 5"),
    "tiny": ("t2v", {"film": pictures(6, 15)}, "sides of at least 16 pixels; got 15x15"),
    "few latents": ("t2v", {"film": torch.zeros(1, 16, 1, 4, 4)}, "has 1 latent frames"),
    "windows": ("t2v", {"sliding_window_size": 3}, "does not take sliding_window_size"),
    "no seed": ("t2v", {"seed": None, "resume": "here"}, "give a seed"),
    "loop of text": ("t2v", {"loop": True}, "takes no last frame"),
    "loop of clean frames": ("ti2v_5b", {"loop": True}, "takes no last frame"),
    "loop and end": ("i2v", {"loop": True, "end_image": pictures(1)[0]}, "give end_image or loop"),
    "first to last": ("flf2v", {}, "needs a last frame for each clip"),
    "first to last, five": ("flf2v", {"keep_frames": 5, "loop": True}, "set keep_frames to 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_on_is_refused_before_anything_runs(pipe, name):
    variant, call, words = REFUSED[name]
    film = call.get("film", pictures(6))
    with pytest.raises(ValueError, match=words):
        pipe(variant).extend(film, **{"prompts": "a dog", **FAST, **{k: v for k, v in call.items() if k != "film"}})
