"""Weights that processes share, as `trainer/accelerate` launches them, on two CPU processes."""

import importlib.util
import json
import os
import socket
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.reference import relative_error
from tests.trainer import material
from tests.trainer.runs import ROOT, config, environment, events, losses, run, shared

__all__ = ["shared"]

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
    "vace": dict(variant="vace", lora_base_model="vace"),
}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def launch(launcher, runs, place, processes=2):
    """Train by `accelerate launch` with the shipped configuration; every run is to end well."""
    file = place / "runs.json"
    file.write_text(json.dumps([material.flags(settings) for settings in runs]), encoding="utf-8")
    words = ["--config_file", f"trainer/accelerate/{launcher}.yaml", "--num_processes", str(processes)]
    words += ["--main_process_port", free_port(), "--mixed_precision", runs[0].mixed_precision]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words, "-m", "tests.trainer.sharded", str(file)],
        cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=100, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def file_of(out):
    (file,) = out.glob("epoch-1.safetensors")
    return load_file(file)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_shared_weights_train_as_whole_ones_and_continue_exactly(shared, tmp_path, launcher):
    """Every mode in one launch, as each would take ten seconds to begin."""
    runs, places = [], {mode: [tmp_path / f"{mode}-{n}" for n in ("one", "whole", "parts")] for mode in MODES}
    for mode, (one, whole, parts) in places.items():
        more = dict(learning_rate=1e-3, num_epochs=2, validation_clips=0, lora_dropout=0.0, **MODES[mode])
        if launcher != "fsdp":
            more["mixed_precision"] = "bf16"
        run(config(shared, one, batch_size=2, **more))
        runs += [config(shared, whole, **more), config(shared, parts, max_steps=1, **more)]
        runs += [config(shared, parts, **more)]
    for precision in ("no", "bf16"):
        code, text = launch(launcher, group, tmp_path) if (group := [
            settings for settings in runs if settings.mixed_precision == precision]) else (0, "")
        assert code == 0, text
    for mode, (one, whole, parts) in places.items():
        exact = MODES[mode].get("mixed_precision", "no") == "no" and launcher == "fsdp"
        assert losses(whole) == pytest.approx(losses(one), rel=1e-4 if exact else 1e-2), mode
        for name, tensor in file_of(one).items():
            assert relative_error(file_of(whole)[name].float(), tensor.float()) < (1e-2 if exact else 0.1), (mode, name)
        assert len(events(parts, "resume")) == 1
        assert losses(parts) == losses(whole), mode
        assert all(file_of(parts)[name].equal(tensor) for name, tensor in file_of(whole).items()), mode
