"""Runs of the trainer on tiny models, here and as programs of their own."""

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState

from tests import fork_server
from tests.trainer import material
from wancore.trainer.config import TrainConfig
from wancore.trainer.run.events import read_events
from wancore.trainer.run.state import States, read_weights_and_optimizer
from wancore.trainer.train import Result, train

ROOT = fork_server.ROOT


def config(shared: Path, out: Path, variant: str = "t2v", **changes: Any) -> TrainConfig:
    """A short run of rank 4 that writes to `out` and takes its samples from the cache."""
    settings = {
        "output_path": str(out), "cache": "disk", "cache_dir": str(shared / "cache"), "lora_rank": 4,
        "dataset_repeat": 2, "min_free_gb": 0.0,
    }  # fmt: skip
    if "lora_base_model" not in changes and "trainable_models" not in changes:
        settings["lora_base_model"] = "dit"
    return material.config(shared, variant, **{**settings, **changes})


def run(settings: TrainConfig) -> Result:
    """Train in this process."""
    try:
        return train(settings)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()


def events(out: Path, name: str = "step") -> list[dict[str, Any]]:
    return [event for event in read_events(out / "events.jsonl") if event["event"] == name]


def losses(out: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events(out)}


def weights(out: Path, step: int | None = None):
    """The trained weights and the optimizer's state of the newest saved state, or that of `step`."""
    states = States(out / "states")
    return read_weights_and_optimizer(states.latest() if step is None else states.path(step))


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


def program(settings: TrainConfig, *launcher: str, cwd: Path = ROOT) -> fork_server.Process:
    """The same run as a program of its own, begun from the pack's folder or another."""
    words = [*(launcher or ("-m", "trainer.train")), *material.flags(settings)]
    return fork_server.start(words, cwd=cwd, env=environment(), stderr=subprocess.STDOUT)
