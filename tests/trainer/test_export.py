import dataclasses
import json

import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tests.disks import full_disk
from tests.reference import relative_error, tiny_text_encoder, tiny_vae
from tests.trainer.models import config, inputs, trainables, video_model
from wan_core.loading.detect import detect_files
from wan_core.loading.foreign_names import diffusers_name
from wan_core.loading.tensor_files import write_safetensors
from wan_core.lora.target import open_lora
from wancore.trainer.export import RUN, Exporter, ExportError
from wancore.trainer.model.trainable import lora_patches, prepare


def exporter(tmp_path, variant="t2v", **changes):
    found = trainables(variant, output_path=str(tmp_path), **changes)
    generator = torch.Generator().manual_seed(5)
    for parameter in found.parameters().values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return Exporter(config(output_path=str(tmp_path), **changes), found, "run")


def written(made, stem="epoch-0"):
    return made.write(stem, made.trainables.parameters(), {"ss_steps": "3"})


def outputs(made, model):
    """What training computed with, and what inference computes with the saved file on `model`."""
    x, timesteps, cond = inputs()
    with torch.no_grad():
        trained = made.trainables.module.velocity(x, timesteps, cond)
        with model.working(1, torch.device("cpu")):
            return trained, model.dit(x, timesteps, cond, model.motion_controller(cond.motion_bucket))


@pytest.mark.parametrize("names", ["comfyui", "diffsynth", "kohya", "diffusers"])
@pytest.mark.parametrize("alpha", [None, 2.0, 16.0])
def test_a_saved_lora_does_in_inference_what_it_did_in_training(tmp_path, names, alpha):
    made = exporter(tmp_path, lora_base_model="dit", lora_format=names, lora_alpha=alpha)
    (file,) = written(made)
    model, report = video_model().with_lora(file)
    trained, found = outputs(made, model)
    assert relative_error(found, trained) < 1e-4
    assert not report.skipped
    plain = video_model().with_lora(file, strength=0.0)[0]
    assert relative_error(outputs(made, plain)[1], trained) > 1e-2


def test_names_and_metadata_are_what_loaders_look_for(tmp_path):
    made = exporter(tmp_path, lora_base_model="dit", lora_alpha=2.0, mixed_precision="bf16")
    (file,) = written(made)
    tensors = load_file(file)
    assert file.name == "epoch-0.safetensors"
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in tensors
    assert not any("alpha" in name for name in tensors)
    told = open_lora(file).metadata
    assert told[RUN] == "run" and told["ss_steps"] == "3" and told["ss_network_dim"] == "4"
    assert json.loads(told["ss_network_args"])["alpha"] == 2.0
    assert told["modelspec.title"] == "epoch-0"
    assert str(tmp_path) not in json.dumps(told)


@pytest.mark.parametrize(
    ("variant", "part", "prefix", "name"),
    [
        ("t2v", "dit", "pipe.dit.", "blocks.0.self_attn.q.weight"),
        ("t2v", "dit", "", "pipe.dit.blocks.0.self_attn.q.weight"),
        ("vace", "vace", "pipe.vace.", "vace_blocks.0.self_attn.q.weight"),
        ("vace", "vace", "pipe.dit.", "vace_blocks.0.self_attn.q.weight"),
        ("t2v", "motion_controller", "pipe.motion_controller.", "linear.0.weight"),
        ("t2v", "dit", "pipe.", "blocks.0.self_attn.q.weight"),
        ("t2v", "dit", "pipe.dit.blocks.0.self", "blocks.0.self_attn.q.weight"),
        ("vace", "vace", "模型", "vace_blocks.0.self_attn.q.weight"),
    ],
)
def test_whole_weights_keep_their_original_names(tmp_path, variant, part, prefix, name):
    made = exporter(tmp_path, variant, trainable_models=(part,), remove_prefix_in_ckpt=prefix)
    (file,) = written(made)
    assert name in load_file(file)
    assert detect_files(file).kind == part
    if part != "vace":
        assert relative_error(*outputs(made, video_model().with_lora(file)[0])) < 1e-6


def test_encoders_are_saved_too(tmp_path):
    from wan_core.conditioning.text import TextEncoder

    settings = config(trainable_models=("vae", "text_encoder"), cache="off", output_path=str(tmp_path))
    found = prepare(video_model(), settings, TextEncoder(tiny_text_encoder(), None), tiny_vae())
    files = written(Exporter(settings, found, "run"))
    assert [detect_files(file).kind for file in files] == ["vae", "text_encoder"]


def test_each_part_gets_a_file_of_its_own(tmp_path):
    made = exporter(tmp_path, lora_base_model="dit", trainable_models=("motion_controller",))
    files = written(made)
    assert [f.name for f in files] == ["epoch-0.motion_controller.safetensors", "epoch-0.lora.safetensors"]
    model = video_model()
    for file in files:
        model = model.with_lora(file)[0]
    assert relative_error(*outputs(made, model)) < 1e-5


def test_in_the_names_of_the_reference_all_parts_share_one_file(tmp_path):
    changes = dict(lora_base_model="dit", trainable_models=("motion_controller",), lora_format="diffsynth")
    made = exporter(tmp_path, **changes)
    (file,) = written(made)
    assert file.name == "epoch-0.safetensors"
    names = {"blocks.0.self_attn.q.lora_A.default.weight", "pipe.motion_controller.linear.0.weight"}
    assert names <= load_file(file).keys() and open_lora(file).metadata[RUN] == "run"
    assert relative_error(*outputs(made, video_model().with_lora(file)[0])) < 1e-5


def test_a_run_replaces_its_own_files_and_no_others(tmp_path):
    made = exporter(tmp_path, lora_base_model="dit")
    (file,) = written(made)
    written(made)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="not of this run"):
        written(dataclasses.replace(made, run="other"))
    assert file.read_bytes() == before
    save_file({"x": torch.zeros(1)}, tmp_path / "epoch-1.safetensors")
    with pytest.raises(ValueError, match="not of this run"):
        written(made, "epoch-1")
    assert {p.name for p in tmp_path.iterdir()} == {"epoch-0.safetensors", "epoch-1.safetensors"}


def test_a_lora_that_changes_nothing_is_reported(tmp_path, caplog):
    found = trainables(lora_base_model="dit")
    written(Exporter(config(lora_base_model="dit", output_path=str(tmp_path)), found, "run"))
    assert "will change nothing" in caplog.text


@pytest.mark.parametrize("mode", [dict(lora_base_model="dit"), dict(trainable_models=("dit",))], ids=str)
def test_a_file_that_differs_from_what_was_trained_never_gets_its_name(tmp_path, monkeypatch, mode):
    made = exporter(tmp_path, **mode)

    def spoiled(file, tensors, metadata):
        write_safetensors(file, {name: t + (t.ndim > 1) for name, t in tensors.items()}, metadata)

    for module in ("wancore.trainer.export", "wan_core.lora.convert"):
        monkeypatch.setattr(f"{module}.write_safetensors", spoiled)
    with pytest.raises(ExportError):
        written(made)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_older_file(tmp_path):
    made = exporter(tmp_path, lora_base_model="dit")
    (file,) = written(made)
    before = file.read_bytes()
    with full_disk(2**10), pytest.raises(OSError, match="too large"):
        written(made)
    assert [p.name for p in tmp_path.iterdir()] == [file.name] and file.read_bytes() == before


def test_a_lora_is_continued_from_its_file(tmp_path):
    made = exporter(tmp_path, lora_base_model="dit", lora_alpha=2.0)
    (file,) = written(made)
    again = trainables(lora_base_model="dit", lora_alpha=8.0, lora_checkpoint=str(file))
    expected = dict(lora_patches(made.trainables.parts[0], made.trainables.parameters(), 2.0))
    for name, patch in lora_patches(again.parts[0], again.parameters(), 8.0):
        assert relative_error(patch.delta(), expected[name].delta()) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [(dict(lora_rank=8), "set --lora_rank"), (dict(lora_target_modules=("q", "k")), "no place for")],
    ids=str,
)
def test_a_lora_that_does_not_fit_is_not_continued(tmp_path, changes, message):
    (file,) = written(exporter(tmp_path, lora_base_model="dit"))
    with pytest.raises(ValueError, match=message):
        trainables(lora_base_model="dit", lora_checkpoint=str(file), **changes)


def test_diffusers_reads_the_default_names(tmp_path):
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    made = exporter(tmp_path, lora_base_model="dit", lora_alpha=2.0)
    (file,) = written(made)
    found = conversion._convert_non_diffusers_wan_lora_to_diffusers(load_file(file))
    for name, patch in lora_patches(made.trainables.parts[0], made.trainables.parameters(), 2.0):
        path = f"transformer.{diffusers_name(name.removesuffix('.weight'))}"
        down, up = (found.pop(f"{path}.lora_{side}.weight") for side in "AB")
        assert relative_error(up @ down, patch.delta()) < 1e-5
    assert not found


def test_peft_reads_the_default_names_without_their_prefix(tmp_path):
    made = exporter(tmp_path, lora_base_model="dit")
    (file,) = written(made)
    fresh = trainables(lora_base_model="dit")
    tensors = {name.removeprefix("diffusion_model."): tensor for name, tensor in load_file(file).items()}
    result = set_peft_model_state_dict(fresh.module.dit, tensors)
    assert not result.unexpected_keys
    x, timesteps, cond = inputs()
    with torch.no_grad():
        expected, found = (t.module.velocity(x, timesteps, cond) for t in (made.trainables, fresh))
    assert relative_error(found, expected) < 1e-5
