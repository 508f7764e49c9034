"""What a model is trained on equals what inference gives it; from the cache as without it; and what is drawn follows
from seed, epoch and position."""

import csv
import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.reference import relative_error
from tests.trainer import material
from tests.trainer.material import INPUTS, model_names
from wan_core import ModelConfig, WanVideoPipeline, load_video
from wan_core.catalog import IMAGE_ENCODER_PATTERN
from wan_core.conditioning.image import LatentEncoder
from wan_core.media.fitting import as_frames, fit_size
from wan_core.model import VideoModel
from wan_core.sampling.checkpoint import RunState
from wan_core.sampling.experts import RunInputs
from wan_core.types import tensors_in
from wancore.trainer.config import TrainConfig
from wancore.trainer.data.cache import Encoders, LatentCache
from wancore.trainer.data.clips import BOTH, BOX, MASKS, SPAN, START, WHOLE, draw_mask, mask_kind
from wancore.trainer.data.conditions import Batch, Examples, collate
from wancore.trainer.data.dataset import load
from wancore.trainer.data.report import check, fit_to_geometry
from wancore.trainer.flags import ConfigError
from wancore.trainer.model.load import find

FIELDS = (
    "text", "image_tokens", "concat", "reference", "camera", "vace", "motion_bucket", "clean", "timestep_factors",
    "timestep_index",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trainer")


def examples(config: TrainConfig) -> Examples:
    models = find(config)
    cache = LatentCache(config.cache_folder) if config.cache == "disk" else None
    data = load(config)
    checked = fit_to_geometry(check(data, config), data, config, models.config.geometry)
    rows = checked.require("error")
    return Examples(rows, models, Encoders(models, torch.float32, "cpu"), config, cache)


def equal(first, second) -> bool:
    pairs = list(zip(tensors_in(first), tensors_in(second), strict=True))
    return all(torch.equal(a, b) for a, b in pairs)


def first_row(data: Path) -> dict[str, str]:
    with (data / "metadata.csv").open(encoding="utf-8", newline="") as file:
        return next(csv.DictReader(file))


def inference(root: Path, variant: str, monkeypatch: pytest.MonkeyPatch):
    """Conditioning as the pipeline's own call hands it to the sampler, for the first row of the synthetic data."""
    row = first_row(root / "data")
    data = root / "data" / "media"
    clip = load_video(data / "000_video.mp4")[:5]
    arguments = {
        "input_image": clip[0],
        "end_image": clip[-1],
        "control_video": load_video(data / "000_control_video.mp4")[:5],
        "reference_image": as_frames(load_image(data / "000_reference.png"), ""),
        "vace_video": load_video(data / "000_vace_video.mp4")[:5],
        "vace_video_mask": load_video(data / "000_vace_video_mask.mp4")[:5],
        "vace_reference_image": load_image(data / "000_reference.png"),
        "motion_bucket_id": float(row["motion_bucket_id"]),
        "camera_control_direction": row["camera_control_direction"],
        "camera_control_speed": float(row["camera_control_speed"]),
    }
    configs = [ModelConfig(model_id=n.split(":")[0], origin_file_pattern=n.split(":")[1]) for n in model_names(variant)]
    pipe = WanVideoPipeline.from_pretrained(torch.float32, "cpu", configs, local_model_path=root / "models")
    seen = []

    def sample(self, inputs: RunInputs, *_: object, **__: object) -> RunState:
        seen.append(inputs.cond)
        return RunState(latents=torch.zeros(1, 16, 2, 4, 4), prefix=0, step=0)

    monkeypatch.setattr(VideoModel, "sample", sample)
    monkeypatch.setattr(WanVideoPipeline, "_output", lambda self, latents, *_: latents)
    names = {name: arguments[name] for name in INPUTS[variant]}
    pipe(row["prompt"], height=32, width=32, num_frames=5, num_inference_steps=1, output_type="latent", seed=0, **names)
    return seen[0], pipe, as_frames(clip, "")


def load_image(path: Path):
    from PIL import Image

    return Image.open(path).convert("RGB")


@pytest.mark.parametrize("variant", INPUTS)
def test_conditioning_equals_that_of_inference(root, variant, monkeypatch):
    sample = examples(material.config(root, variant)).get(0, 0)
    expected, pipe, clip = inference(root, variant, monkeypatch)
    for field in FIELDS:
        ours, theirs = getattr(sample.cond, field), getattr(expected, field)
        assert (ours is None) == (theirs is None), field
        assert ours is None or equal(ours, theirs), field
    latents = LatentEncoder(vae=pipe.vae).frames(clip)[0]
    references = sample.latents.shape[1] - latents.shape[1]
    assert torch.equal(sample.latents[:, references:], latents)
    assert references == (1 if variant == "vace" else 0)
    if references:
        picture = fit_size(as_frames(load_image(root / "data/media/000_reference.png"), ""), 32, 32, "letterbox")
        assert torch.equal(sample.latents[:, :1], LatentEncoder(vae=pipe.vae).frames(picture)[0])


@pytest.mark.parametrize("variant", INPUTS)
def test_a_batch_from_the_cache_equals_one_without_it_and_runs(root, variant, tmp_path):
    plain = examples(material.config(root, variant))
    kept = examples(material.config(root, variant, cache="disk", cache_dir=str(tmp_path)))
    kept.fill()
    kept.encoders.free()
    batches = [collate([e.get(position, 0) for position in range(2)]) for e in (plain, kept)]
    assert kept.encoders.loaded == ()
    first, second = batches
    assert torch.equal(first.latents, second.latents) and first.captions == second.captions
    for field in FIELDS:
        ours, theirs = getattr(first.cond, field), getattr(second.cond, field)
        assert (ours is None) == (theirs is None) and (ours is None or equal(ours, theirs)), field
    model = plain.models.load_dit(torch.float32, "cpu")
    out = model.dit(second.latents, torch.tensor([900.0, 100.0]), second.cond)
    assert out.shape == second.latents.shape and out.isfinite().all()


def encoded_files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.safetensors")}


def test_a_changed_file_or_option_is_encoded_anew_and_the_rest_is_not(root, tmp_path):
    material.config(root)
    write = material.write_dataset
    write(tmp_path / "data", count=2, width=32, height=32, num_frames=9)
    settings = {
        "dataset_base_path": str(tmp_path / "data"),
        "cache": "disk",
        "cache_dir": str(tmp_path / "cache"),
    }

    def filled(**changes) -> set[str]:
        made = examples(material.config(root, "fun_control", **{**settings, **changes}))
        made.fill()
        return encoded_files(tmp_path / "cache")

    first = filled()
    assert len(first) == 3 + 2 + 2  # two captions and the empty one, two clips, two control clips
    assert filled() == first
    control = tmp_path / "data/media/000_control_video.mp4"
    control.write_bytes((tmp_path / "data/media/001_control_video.mp4").read_bytes())
    assert len(filled() - first) == 1
    assert len(filled(num_frames=9) - first) == 1 + 4
    before = encoded_files(tmp_path / "cache")
    assert len(filled(frame_pick="middle") - before) == 4
    before = encoded_files(tmp_path / "cache")
    metadata = tmp_path / "data/metadata.csv"
    prompt = first_row(tmp_path / "data")["prompt"]
    metadata.write_text(metadata.read_text().replace(prompt, prompt[::-1]))
    assert len(filled() - before) == 1


def test_the_dtype_of_the_encoders_is_part_of_the_key(root, tmp_path):
    config = material.config(root, cache="disk", cache_dir=str(tmp_path))
    made = examples(config)
    made.fill()
    before = encoded_files(tmp_path)
    made.encoders.dtype = torch.bfloat16
    made = Examples(made.rows, made.models, Encoders(made.models, torch.bfloat16, "cpu"), config, made.cache)
    made.fill()
    assert len(encoded_files(tmp_path)) == 2 * len(before)


def test_the_text_encoder_is_gone_before_the_others_load(root, tmp_path, monkeypatch):
    made = examples(material.config(root, "i2v", cache="disk", cache_dir=str(tmp_path)))
    together, load_part = [], Encoders._get

    def spy(self, kind):
        part = load_part(self, kind)
        together.append(frozenset(self.loaded))
        return part

    monkeypatch.setattr(Encoders, "_get", spy)
    seen = []
    made.fill(on_progress=lambda *progress: seen.append(progress))
    assert {"text_encoder"} in together
    assert not any("text_encoder" in loaded and len(loaded) > 1 for loaded in together)
    assert seen[-1] == (len(seen), len(seen))


def test_processes_share_the_work(root, tmp_path):
    config = material.config(root, "i2v", cache="disk", cache_dir=str(tmp_path), condition_dropout=0.5)
    made = [examples(config) for _ in range(2)]
    made[0].fill(0, 2)
    half = encoded_files(tmp_path)
    made[1].fill(1, 2)
    whole = encoded_files(tmp_path)
    assert half < whole
    examples(config).fill()
    assert encoded_files(tmp_path) == whole


def test_a_damaged_cache_file_is_made_anew(root, tmp_path):
    made = examples(material.config(root, cache="disk", cache_dir=str(tmp_path)))
    made.fill()
    expected = made.get(1, 0)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(b"damage")
    assert torch.equal(made.get(1, 0).latents, expected.latents)


def test_dropout_follows_its_share_and_the_place_alone(root):
    config = material.config(root, "i2v", caption_dropout=0.3, condition_dropout=0.2, dataset_repeat=500)
    made = examples(config)
    choices = [made.choose(position, 0) for position in range(1000)]
    assert 0.25 < sum(c.caption == "" for c in choices) / 1000 < 0.35
    assert 0.15 < sum(c.names == () for c in choices) / 1000 < 0.25
    assert choices[7:9] == [made.choose(7, 0), made.choose(8, 0)]
    assert choices != [made.choose(position, 1) for position in range(1000)]
    other = examples(dataclasses.replace(config, seed=1))
    assert [c.caption for c in choices] != [other.choose(position, 0).caption for position in range(1000)]
    assert made.fixed(7) == made.fixed(7) and made.fixed(7).caption and made.fixed(7).names == config.extra_inputs


def test_a_dropped_condition_and_caption_are_what_inference_gives_without_them(root):
    config = material.config(root, "i2v", caption_dropout=1.0, condition_dropout=1.0)
    sample = examples(config).get(0, 0)
    empty = examples(material.config(root)).encoders.text.encode([""])
    assert sample.cond.image_tokens is None and sample.cond.concat is None
    assert torch.equal(sample.cond.text, empty) and sample.caption == ""


@pytest.mark.parametrize(
    ("variant", "kept"),
    [
        ("fun_v1_1_control", ("control_video",)),
        ("flf2v", ("input_image", "end_image")),
        ("vace", ("vace_video", "vace_video_mask")),
        ("speed", ("motion_bucket_id",)),
        ("fun_camera", ("input_image", "camera_control_direction", "camera_control_speed")),
    ],
)
def test_what_a_model_requires_is_never_dropped(root, variant, kept):
    assert examples(material.config(root, variant, condition_dropout=1.0)).choose(0, 0).names == kept


def test_a_vace_branch_keeps_its_only_input(root):
    config = material.config(root, "vace", extra_inputs=("vace_reference_image",), condition_dropout=1.0)
    assert examples(config).choose(0, 0).names == ("vace_reference_image",)


def test_shapes_keep_unlike_samples_apart(root):
    config = material.config(root, "i2v", condition_dropout=0.5, dataset_repeat=20)
    made = examples(config)
    shapes = made.shapes(0)
    assert len(shapes) == len(made) == 40 and len(set(shapes)) == 2
    unlike = [shapes.index(shape) for shape in set(shapes)]
    with pytest.raises(ValueError, match="same inputs"):
        collate([made.get(position, 0) for position in unlike])
    alike = [position for position, shape in enumerate(shapes) if shape == shapes[0]][:3]
    batch = collate([made.get(position, 0) for position in alike])
    assert isinstance(batch, Batch) and batch.positions == tuple(alike) and len(batch.latents) == 3
    assert all(len(tensor) == 3 for field in FIELDS for tensor in tensors_in(getattr(batch.cond, field)))


def test_shapes_without_anything_drawn_are_those_of_the_rows(root):
    made = examples(material.config(root, "vace", dataset_repeat=3))
    assert not made.shapes_change
    assert made.shapes(0) == made.shapes(1) == [made._shape(made.choose(position, 1)) for position in range(6)]
    assert examples(material.config(root, "i2v", extra_inputs=(), random_mask=True)).shapes_change


def test_latents_stay_in_float32_and_all_else_takes_the_dtype_of_the_model(root):
    config = material.config(root, "i2v")
    made = examples(config)
    sample = Examples(made.rows, made.models, Encoders(made.models, torch.bfloat16, "cpu"), config).get(0, 0)
    assert sample.latents.dtype == torch.float32
    assert {tensor.dtype for field in FIELDS for tensor in tensors_in(getattr(sample.cond, field))} == {torch.bfloat16}


def test_pixels_are_there_only_for_a_vae_that_is_trained(root):
    assert examples(material.config(root)).get(0, 0).pixels is None
    made = examples(material.config(root, trainable_models=("vae",)))
    batch = collate([made.get(position, 0) for position in range(2)])
    assert batch.pixels.shape == (2, 3, 5, 32, 32) and -1 <= batch.pixels.min() < batch.pixels.max() <= 1
    torch.testing.assert_close(made.encoders.latents.pixels(batch.pixels), batch.latents)


def test_a_full_disk_is_no_fault_of_a_row(root, tmp_path, monkeypatch):
    made = examples(material.config(root, cache="disk", cache_dir=str(tmp_path)))

    def full(self, key, tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LatentCache, "put", full)
    with pytest.raises(OSError, match="No space left"):
        made.fill()


def test_what_overflows_is_named_and_not_kept(root, tmp_path, monkeypatch):
    made = examples(material.config(root, cache="disk", cache_dir=str(tmp_path)))
    monkeypatch.setattr(LatentEncoder, "frames", lambda self, frames: torch.full((1, 16, 2, 4, 4), float("nan")))
    with pytest.raises(ValueError, match=r"row 1 \(000_video\.mp4\): encoding gave NaN .* in its latents"):
        made.fill()
    with pytest.raises(ValueError, match=r"row 2 .* gave NaN"):
        made.get(1, 0)
    assert len(encoded_files(tmp_path)) == 3  # the texts


def test_a_notice_on_fitting_is_given_once(root, caplog):
    made = examples(material.config(root, "vace", width=48))
    for epoch in range(3):
        made.get(0, epoch)
    assert caplog.text.count("is resized to") == 1


def test_captions_are_drawn_from_all(root, tmp_path):
    material.config(root)
    row = {"prompt": ["one", "two", "three"], "video": str(root / "data/media/000_video.mp4")}
    material.write_metadata(tmp_path, [row], "metadata.json")
    made = examples(material.config(root, dataset_base_path=str(tmp_path), dataset_repeat=300))
    counts = Counter(made.choose(position, 0).caption for position in range(300))
    assert set(counts) == {"one", "two", "three"} and min(counts.values()) > 70


def test_a_random_start_moves_all_clips_alike(root, tmp_path):
    path = material.write_video(tmp_path / "clip.mp4", material.numbered(9))
    row = {"prompt": "x", "video": path.name, "control_video": path.name}
    material.write_metadata(tmp_path, [row])
    settings = {"dataset_base_path": str(tmp_path), "frame_pick": "random", "dataset_repeat": 40}
    made = examples(material.config(root, "fun_control", **settings))
    places = {made.choose(position, 0).places for position in range(40)}
    assert places == {tuple(range(start, start + 5)) for start in range(5)}
    sample = made.get(3, 0)
    assert torch.equal(sample.cond.concat[0, :16], sample.latents)


def test_a_control_clip_of_another_size_is_cropped_as_the_clip_is(root, tmp_path):
    frames = material.numbered(5, 64, 32)
    for frame in frames:
        frame[:, :16] = 255
    material.write_video(tmp_path / "clip.mp4", frames)
    material.write_metadata(tmp_path, [{"prompt": "x", "video": "clip.mp4", "control_video": "clip.mp4"}])
    sample = examples(material.config(root, "fun_control", dataset_base_path=str(tmp_path))).get(0, 0)
    assert torch.equal(sample.cond.concat[0, :16], sample.latents)


def test_a_pose_file_moves_the_camera(root, tmp_path):
    moves = [f"{n} 0.5 0.9 0.5 0.5 0 0 1 0 0 {n / 10} 0 1 0 0 0 0 1 0" for n in range(9)]
    (tmp_path / "poses.txt").write_text("header\n" + "\n".join(moves))
    clip = str(root / "data/media/000_video.mp4")
    material.config(root)
    material.write_metadata(tmp_path, [{"prompt": "x", "video": clip, "camera_path": "poses.txt"}])
    settings = {"dataset_base_path": str(tmp_path), "extra_inputs": ("input_image", "camera_path")}
    sample = examples(material.config(root, "fun_camera", **settings)).get(0, 0)
    assert sample.cond.camera.shape == (1, 24, 2, 32, 32) and sample.cond.camera[:, 0:12].any()


REFUSED = {
    "i2v without an image": ("i2v", {"extra_inputs": ()}, "--input_contains_input_image"),
    "control without its video": ("fun_control", {"extra_inputs": ()}, "control_video"),
    "an input that the model lacks": ("t2v", {"extra_inputs": ("control_video",)}, "control_video"),
    "speed without the adapter": ("t2v", {"extra_inputs": ("motion_bucket_id",)}, "speed-control adapter"),
    "a VACE branch without input": ("vace", {"extra_inputs": (), "trainable_models": ("vace",)}, "vace_video"),
    "a LoRA on it": ("vace", {"extra_inputs": (), "lora_base_model": "vace"}, "vace_reference_image"),
    "an idle adapter": ("speed", {"extra_inputs": (), "trainable_models": ("motion_controller",)}, "motion_bucket_id"),
    "random masks on another model": ("t2v", {"random_mask": True}, "inpaint_video"),
    "no models": ("t2v", {"model_id_with_origin_paths": ()}, "--model_paths"),
    "half a name": ("t2v", {"model_id_with_origin_paths": ("WanCore/tiny",)}, "model_id:file_pattern"),
    "a missing file": ("t2v", {"model_paths": (("nowhere.safetensors",),)}, "nowhere.safetensors does not exist"),
    "the same model twice": ("t2v", {"model_id_with_origin_paths": model_names("t2v") * 2}, "Two models"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_use_the_inputs_are_refused_before_they_are_read(root, name, monkeypatch):
    variant, changes, message = REFUSED[name]
    config = material.config(root, variant, **changes)
    monkeypatch.setattr("wan_core.model_files.build", None)
    with pytest.raises(ValueError, match=message):
        find(config)


def test_the_image_encoder_is_asked_for(root):
    names = tuple(name for name in model_names("i2v") if IMAGE_ENCODER_PATTERN not in name)
    for changes in ({}, {"extra_inputs": (), "random_mask": True}):
        with pytest.raises(ConfigError, match="CLIP image encoder"):
            find(material.config(root, "i2v", model_id_with_origin_paths=names, **changes))


def test_a_clip_that_goes_bad_later_is_named(root, tmp_path):
    material.config(root)
    material.write_dataset(tmp_path / "data", count=2, width=32, height=32, num_frames=9)
    made = examples(material.config(root, dataset_base_path=str(tmp_path / "data")))
    (tmp_path / "data/media/001_video.mp4").write_text("gone bad")
    with pytest.raises(ValueError, match=r"row 2 \(001_video\.mp4\): .*001_video\.mp4 cannot be read"):
        made.get(1, 0)


@pytest.mark.parametrize("kind", MASKS)
def test_random_masks_are_drawn_and_trained(root, kind, monkeypatch):
    config = material.config(root, "i2v", extra_inputs=(), random_mask=True)
    monkeypatch.setattr("wancore.trainer.data.choices.mask_kind", lambda fraction: kind)
    made = examples(config)
    sample = made.get(0, 0)
    known = sample.cond.concat[0, :4]
    assert (sample.cond.image_tokens is not None) == (kind in (START, BOTH))
    assert made.choose(0, 0).inputs == {START: ("input_image",), BOTH: ("input_image", "end_image")}.get(
        kind, ("inpaint_video",)
    )
    if kind == WHOLE:
        assert not known.any()
    elif kind in (START, BOTH):
        assert known[:, 0].all() and known[:, 1].any() == (kind == BOTH)
    elif kind == BOX:
        assert known.any() and not known.all()
    assert torch.equal(made.get(0, 0).cond.concat, sample.cond.concat)
    others = [made.get(0, epoch).cond.concat for epoch in range(1, 5)]
    assert all(torch.equal(other, sample.cond.concat) for other in others) != (kind in (BOX, SPAN))


def test_a_picture_is_trained_without_a_start_image_where_that_would_be_clean(root):
    """Else nothing of it would count."""
    given = {"num_frames": 1, "frame_pick": "middle", "caption_dropout": 0.0}
    picture, clip = (examples(material.config(root, "ti2v_5b", **changes)).get(0, 0) for changes in (given, {}))
    assert picture.latents.shape[1] == 1 and picture.cond.clean is None and not picture.cond.inputs
    assert clip.cond.clean_places == [0] and clip.cond.inputs == ("input_image",)
    assert relative_error(clip.cond.clean[0, :, :1], clip.latents[:, :1]) < 1e-5
    masked = examples(material.config(root, "fun_5b_inp", num_frames=1, extra_inputs=(), random_mask=True))
    assert all(masked.get(0, epoch).cond.clean is None for epoch in range(9))


def test_a_start_image_is_dropped_for_a_share_of_the_draws(root):
    """One model learns text to video and image to video."""
    made = examples(material.config(root, "ti2v_5b", condition_dropout=0.5))
    seen = [made.get(0, epoch).cond.clean is None for epoch in range(12)]
    assert 2 < sum(seen) < 10


def test_clips_of_one_batch_have_the_same_timesteps(root):
    with pytest.raises(ConfigError, match="set --batch_size 1, with more --gradient_accumulation_steps"):
        find(material.config(root, "fun_5b_inp", extra_inputs=(), random_mask=True, batch_size=2))


def test_an_expert_is_trained_alone_and_on_its_own_timesteps(root, caplog):
    high, *others = model_names("i2v_a14b")
    low = high.replace("high_noise", "low_noise")
    both = (high, low, *others)
    find(material.config(root, "i2v_a14b", model_id_with_origin_paths=both))
    with pytest.raises(ConfigError, match=r"split at 0\.358 of the schedule.* leave one of them out"):
        find(material.config(root, "i2v_a14b", model_id_with_origin_paths=both, max_timestep_boundary=0.2))
    for name, flag in ((high, {"max_timestep_boundary": 0.358}), (low, {"min_timestep_boundary": 0.358})):
        caplog.clear()
        find(material.config(root, "i2v_a14b", model_id_with_origin_paths=(name, *others)))
        ((shown, value),) = flag.items()
        assert f"--{shown} {value} trains it on its own" in caplog.text
        caplog.clear()
        find(material.config(root, "i2v_a14b", model_id_with_origin_paths=(name, *others), **flag))
        assert "on its own" not in caplog.text


def test_masks_come_in_their_shares():
    counts = Counter(mask_kind(index / 1000) for index in range(1000))
    assert {kind: counts[kind] / 1000 for kind in MASKS} == pytest.approx(MASKS, abs=0.01)
    generator = torch.Generator().manual_seed(0)
    for kind in MASKS:
        for frames in (1, 5):
            mask = draw_mask(kind, frames, 16, 16, generator)
            assert mask.shape == (frames, 16, 16) and set(mask.unique().tolist()) <= {0.0, 1.0} and mask.any()
    span = draw_mask(SPAN, 9, 4, 4, generator)
    assert not span[0].any() and not span[-1].any() and all(frame.all() or not frame.any() for frame in span)
