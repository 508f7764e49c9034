"""Where a run begins: at the data, at what was encoded before, at weights or a LoRA that were trained before."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import material
from tests.trainer.runs import config, losses, run
from wan_core.offload.quant import QuantisedLinear
from wancore.trainer.check import main as check
from wancore.trainer.config import TrainConfig
from wancore.trainer.flags import ConfigError
from wancore.trainer.model import load
from wancore.trainer.run.output import RECORD


@pytest.fixture(scope="module")
def earlier(shared, tmp_path_factory):
    """What short runs at a high rate left: by name the folder of the run."""
    kinds = {
        "dit": dict(trainable_models=("dit",)),
        "lora": dict(lora_base_model="dit"),
        "controller": dict(variant="speed", trainable_models=("motion_controller",)),
        "vace": dict(variant="vace", trainable_models=("vace",)),
        "vae": dict(trainable_models=("vae",)),
    }
    made = {name: tmp_path_factory.mktemp(name) for name in kinds}
    for name, changes in kinds.items():
        run(config(shared, made[name], max_steps=1, learning_rate=1e-2, **changes))
    return {name: str(folder / "step-1.safetensors") for name, folder in made.items()}


def test_data_is_encoded_by_one_command_and_trained_on_by_another(shared, tmp_path):
    encoded, trained, whole = tmp_path / "encoded", tmp_path / "trained", tmp_path / "whole"
    own = dict(cache_dir=None, extra_inputs=())
    assert run(config(shared, encoded, task="sft:data_process", **own)).steps == 0
    files = {file: file.stat().st_mtime_ns for file in (encoded / "cache").rglob("*.safetensors")}
    assert files and not list(encoded.glob("*.safetensors"))

    second = config(
        shared, trained, task="sft:train", dataset_base_path=str(encoded), height=64, width=64, num_frames=81, **own
    )
    run(second)
    run(config(shared, whole, **own))
    assert losses(trained) == losses(whole)
    assert {file: file.stat().st_mtime_ns for file in (encoded / "cache").rglob("*.safetensors")} == files
    assert not (trained / "cache").exists()


def test_the_check_reads_encoded_data_too(shared, tmp_path, capsys):
    settings = config(shared, tmp_path, task="sft:data_process", cache_dir=None)
    run(settings)
    words = ["--task", "sft:train", "--dataset_base_path", str(tmp_path)]
    assert check(words) == 0
    assert "2 good rows" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "[1]", "{", '{"num_frames": "many"}', '{"dataset_base_path": 3}'])
def test_a_folder_without_encoded_data_is_named(shared, tmp_path, text):
    if text is not None:
        (tmp_path / RECORD).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="no data was encoded" if text is None else RECORD):
        run(config(shared, tmp_path / "out", task="sft:train", dataset_base_path=str(tmp_path)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "variant"), [("dit", "t2v"), ("controller", "speed"), ("vace", "vace")])
def test_a_run_starts_from_trained_weights(shared, tmp_path, earlier, kind, variant):
    """They are those of the model then, and all else is as it was."""
    settings = config(shared, tmp_path, variant, resume_from_checkpoint=earlier[kind])
    model = load.find(settings).load_dit(torch.float32, "cpu")
    before = {n: t.clone() for m in model.modules for n, t in m.state_dict().items()}
    load.change_weights(model, settings)
    after = {n: t for m in model.modules for n, t in m.state_dict().items()}
    trained = load_file(earlier[kind])
    assert trained and all(torch.equal(after[name], tensor) for name, tensor in trained.items())
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - trained.keys())
    assert any(not torch.equal(after[name], before[name]) for name in trained)


def test_starting_from_weights_is_training_the_model_that_they_are(shared, tmp_path, earlier):
    first, second = tmp_path / "first", tmp_path / "second"
    run(config(shared, first, max_steps=2, resume_from_checkpoint=earlier["dit"]))
    names = material.model_names("t2v")[1:]
    run(config(shared, second, max_steps=2, model_paths=((earlier["dit"],),), model_id_with_origin_paths=names))
    assert losses(first) == losses(second)


def test_a_trained_encoder_takes_the_place_of_its_file(shared, tmp_path, earlier):
    found = load.find(config(shared, tmp_path, resume_from_checkpoint=earlier["vae"]))
    assert str(found.components["vae"].header.files[0]) == earlier["vae"]


@pytest.mark.parametrize("fp8", [False, True])
def test_a_preset_lora_is_part_of_the_model(shared, tmp_path, earlier, fp8):
    """Weights with the LoRA in them are, to the rounding of a sum, weights with the LoRA beside them."""
    first, second = tmp_path / "first", tmp_path / "second"
    run(config(shared, first, max_steps=1, preset_lora_path=earlier["lora"], fp8_base=fp8))
    run(config(shared, second, max_steps=1, lora_checkpoint=earlier["lora"], fp8_base=fp8))
    plain = tmp_path / "plain"
    run(config(shared, plain, max_steps=1, fp8_base=fp8))
    assert losses(first)[1] == pytest.approx(losses(second)[1], rel=0.02 if fp8 else 1e-5)
    assert abs(losses(plain)[1] - losses(second)[1]) > (0 if fp8 else 1e-4) * losses(plain)[1]


def test_frozen_weights_are_8_bit_after_a_preset_lora(shared, tmp_path, earlier):
    from wancore.trainer import train as module

    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "quantise", lambda dit: kept.append(quantise(dit)))
        from wan_core.offload.quant import quantise

        run(config(shared, tmp_path, max_steps=1, preset_lora_path=earlier["lora"], fp8_base=True))
    assert any(isinstance(layer, QuantisedLinear) for layer in kept[0].modules())


@pytest.mark.parametrize(
    ("flag", "kind", "message"),
    [
        ("resume_from_checkpoint", "lora", "--resume_from_checkpoint: .* is a LoRA; name it in --lora_checkpoint"),
        ("resume_from_checkpoint", "vace", "--resume_from_checkpoint"),
        ("resume_from_checkpoint", "controller", "--resume_from_checkpoint"),
        ("preset_lora_path", "vae", "--preset_lora_path"),
        ("preset_lora_path", "vace", "--preset_lora_path"),
        ("lora_checkpoint", "vace", "--lora_checkpoint"),
        ("lora_checkpoint", None, "--lora_checkpoint.*gone"),
        ("preset_lora_path", None, "--preset_lora_path.*gone"),
        ("resume_from_checkpoint", None, "--resume_from_checkpoint.*gone"),
    ],
)
def test_what_a_run_cannot_start_from_is_named(shared, tmp_path, earlier, flag, kind, message):
    path = earlier[kind] if kind else str(tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match=message):
        run(config(shared, tmp_path / "out", cache_dir=None, **{flag: path}))
    assert not (tmp_path / "out" / "cache").exists(), "nothing long was done before"


def test_the_record_holds_whole_paths(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(shared)
    run(config(shared, tmp_path, task="sft:data_process", cache_dir=None, dataset_base_path="data"))
    told = json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))
    assert told["dataset_base_path"] == str((shared / "data").resolve())
    assert told["cache_dir"] == str((tmp_path / "cache").resolve())


@pytest.mark.parametrize("name", ["x", ":", "a/b:", "\0:x", "a/b:" + "x" * 300])
def test_a_published_model_is_named_by_id_and_pattern(name):
    settings = TrainConfig(model_id_with_origin_paths=(name,), skip_download=True)
    with pytest.raises(ConfigError, match="--model_id_with_origin_paths takes model_id:file_pattern; got '"):
        load.find(settings)
