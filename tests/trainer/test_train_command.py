import dataclasses
import json
import subprocess
import sys

import pytest
import yaml

from tests import fork_server
from tests.programs import PATIENCE
from tests.trainer import material
from tests.trainer.runs import ROOT, config, environment, events, losses, program, run
from wan_core.lora.target import open_lora
from wancore.trainer.config import TrainConfig
from wancore.trainer.recipe import TRAIN


def ended(process):
    text = process.communicate(timeout=PATIENCE)[0]
    return process.returncode, text


@pytest.mark.parametrize("launcher", ["python", "accelerate"])
def test_the_command_trains_from_any_folder(shared, tmp_path, launcher):
    settings = config(shared, tmp_path / "with space 模型", max_steps=2)
    if launcher == "python":  # a cold one, as users start it
        words = [sys.executable, str(TRAIN), *material.flags(settings)]
        done = subprocess.run(words, cwd=tmp_path, env=environment(), text=True, capture_output=True, timeout=PATIENCE)
        code, text = done.returncode, done.stdout + done.stderr
    else:
        code, text = ended(program(settings, "-m", "accelerate.commands.launch", "--cpu", str(TRAIN), cwd=tmp_path))
    assert code == 0, text
    assert "2 good rows" in text and "Finished after 2 steps" in text
    assert open_lora(tmp_path / "with space 模型" / "step-2.safetensors").layers


AS_FILES = """
import contextlib, importlib.util, runpy, sys

folder, *names = sys.argv[1:]
for name in names:
    sys.path[0], sys.argv[:] = folder, [f"{folder}/{name}.py", "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert importlib.util.find_spec("objective") is None, name
    # Seconds of imports that only the first LoRA needs.
    assert not {"peft", "transformers"} & sys.modules.keys(), name
    print("clean after", name)
"""


def test_a_command_that_is_run_as_a_file_hides_no_package(tmp_path):
    """Python looks beside the file first, where ours have names such as `config` and `flags`. One interpreter runs them
    all, that with the fewest imports first.
    """
    names = ["recipe", "check", "train"]
    words = [sys.executable, "-c", AS_FILES, (ROOT / "trainer").as_posix(), *names]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == 3 and all(f"clean after {name}" in done.stdout for name in names)


def test_the_command_gives_what_the_function_gives(shared, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    run(config(shared, here))
    ended(program(config(shared, there)))
    assert losses(here) == pytest.approx(losses(there), rel=1e-6)


def test_a_run_repeats_itself_from_its_config_file(shared, tmp_path):
    run(config(shared, tmp_path / "first", max_steps=2))
    again = ["-m", "trainer.train", "--config", tmp_path / "first" / "config.json"]
    done = fork_server.run([*again, "--output_path", tmp_path / "second"], env=environment())
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "first") == pytest.approx(losses(tmp_path / "second"), rel=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learnign_rate", "1"], "Did you mean --learning_rate"),
        (["--dataset_base_path", "/nowhere"], "not a folder"),
        ([], "Nothing is to be trained"),
        (["--trainable_models", "dit", "--fp8_base"], "--fp8_base is for frozen weights"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, words, message):
    if "--dataset_base_path" in words:
        words = [*words, "--lora_base_model", "dit"]
    done = fork_server.run(["-m", "trainer.train", "--output_path", tmp_path / "out", *words], env=environment())
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_bad_data_is_one_report_and_no_model_is_loaded(shared, tmp_path):
    settings = config(shared, tmp_path / "out", dataset_base_path=str(tmp_path))
    (tmp_path / "metadata.csv").write_text("video,prompt\ngone.mp4,a dog\nnone.mp4,\n", encoding="utf-8")
    code, text = ended(program(dataclasses.replace(settings, local_model_path=str(tmp_path / "empty"))))
    assert code == 2
    assert "row 1" in text and "row 2" in text and "caption" in text
    assert not (tmp_path / "empty").exists() and "Traceback" not in text
    assert events(tmp_path / "out", "check")[0]["good"] == 0


@pytest.mark.parametrize("file", sorted((ROOT / "trainer" / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_launcher_configurations_are_read_by_accelerate(file):
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(file))
    assert found.mixed_precision == "bf16" and found.num_processes >= 2
    # Which blocks there are to be wrapped is known when the model is.
    assert "fsdp_transformer_layer_cls_to_wrap" not in (found.fsdp_config or {})


def test_the_large_configuration_is_that_of_the_reference():
    found = yaml.safe_load((ROOT / "trainer" / "accelerate" / "zero2_offload.yaml").read_text())
    assert found["deepspeed_config"] == {
        "gradient_accumulation_steps": 1, "offload_optimizer_device": "cpu", "offload_param_device": "cpu",
        "zero3_init_flag": False, "zero_stage": 2,
    }  # fmt: skip
    assert found["num_processes"] == 8


def test_a_resolved_configuration_is_json(tmp_path):
    assert json.loads(json.dumps(TrainConfig(lora_base_model="dit").resolved()))["lora_base_model"] == "dit"
