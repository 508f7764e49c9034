"""Weights that processes share, as `trainer/accelerate` launches them, on two CPU processes."""

import importlib.util
import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from tests import fork_server
from tests.programs import PATIENCE
from tests.reference import relative_error
from tests.trainer import material
from tests.trainer.runs import config, environment, events, free_port, losses, run

LAUNCHERS = [
    "fsdp",
    *(
        pytest.param(name, marks=pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="no DeepSpeed"))
        for name in ("zero2_offload", "zero3")
    ),
]
MODES = {
    "full": dict(trainable_models=("dit",), gradient_accumulation_steps=3, dataset_repeat=5),
    "lora": dict(mixed_precision="bf16"),
    "vace": dict(variant="vace", lora_base_model="vace", max_steps=2),
}
CONTINUED = ("full", "lora")


def launch(launcher, runs, place, processes=2):
    """Train by `accelerate launch` with the shipped configuration; every run is to end well."""
    file = place / "runs.json"
    file.write_text(json.dumps([material.flags(settings) for settings in runs]), encoding="utf-8")
    words = ["--config_file", f"trainer/accelerate/{launcher}.yaml", "--num_processes", str(processes)]
    words += ["--main_process_port", free_port()]
    command = ["-m", "accelerate.commands.launch", *words, "-m", "tests.trainer.sharded", file]
    done = fork_server.run(command, timeout=PATIENCE, env=environment())
    return done.returncode, done.stdout + done.stderr


def last_weights(out):
    return load_file(max(out.glob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_shared_weights_train_as_whole_ones_and_continue_exactly(shared, tmp_path, launcher):
    """All modes in one launch, as each would take ten seconds to begin."""
    runs, more = [], {}
    for mode, changes in MODES.items():
        more[mode] = dict(learning_rate=1e-3, num_epochs=2, **changes)
        if launcher != "fsdp":
            more[mode]["mixed_precision"] = "bf16"
        run(config(shared, tmp_path / f"{mode}-one", batch_size=2, **more[mode]))
        runs.append(config(shared, tmp_path / f"{mode}-whole", **more[mode]))
        if mode in CONTINUED:
            settings = config(shared, tmp_path / f"{mode}-parts", **more[mode])
            runs += [replace(settings, max_steps=1), settings]
    code, text = launch(launcher, runs, tmp_path)
    assert code == 0, text
    for mode in MODES:
        one, whole, parts = (tmp_path / f"{mode}-{name}" for name in ("one", "whole", "parts"))
        exact = more[mode].get("mixed_precision") != "bf16"
        assert losses(whole) == pytest.approx(losses(one), rel=1e-4 if exact else 1e-2), mode
        expected, found = last_weights(one), last_weights(whole)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert relative_error(found[name].float(), tensor.float()) < (1e-2 if exact else 0.2), name
        if mode in CONTINUED:
            assert len(events(parts, "resume")) == 1
            assert losses(parts) == losses(whole), mode
            continued = last_weights(parts)
            assert all(continued[name].equal(tensor) for name, tensor in found.items()), mode
