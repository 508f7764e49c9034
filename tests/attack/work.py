"""What is attacked: commands on the bundled tiny models, and what each leaves when nobody disturbs it."""

import atexit
import contextlib
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.attack.processes import ROOT, files, run, scratch
from tests.trainer import material
from wan_core import bundled
from wancore.headless.core_nodes import core_nodes
from wancore.headless.folders import Folders
from wancore.headless.overrides import apply_tiny
from wancore.headless.workflow import Workflow
from wancore.nodes import NODE_CLASS_MAPPINGS

Words = Sequence[object]


@dataclass(frozen=True)
class Job:
    """A command that writes into the folder `out`: `words(out)` are its arguments, and `results` the names of what it
    is there for, whose content is compared; what else it leaves is kept only for people.
    """

    module: str
    words: Callable[[Path], Words]
    results: Callable[[str], bool]


@dataclass
class Bench:
    """The jobs by name, with their inputs in `folder`."""

    folder: Path
    jobs: dict[str, Job]
    _undisturbed: dict[str, tuple[dict[str, bytes], float]] = field(default_factory=dict)

    def undisturbed(self, name: str) -> tuple[dict[str, bytes], float]:
        """What a job leaves when nobody disturbs it, and the seconds that it takes."""
        if name not in self._undisturbed:
            job = self.jobs[name]
            for attempt in ("first", "second"):
                # The first fills caches; what the second takes, an attempt takes.
                out = self.folder / f"{name}_{attempt}"
                out.mkdir()
                started = time.monotonic()
                code, said = run(job.module, job.words(out), self.folder / "log")
                seconds = time.monotonic() - started
                assert code == 0, said
            self._undisturbed[name] = results(job, out), seconds
        return self._undisturbed[name]


@functools.cache
def bench() -> Bench:
    """The bench of this process; its folder ends with it."""
    until_the_end = contextlib.ExitStack()
    atexit.register(until_the_end.close)
    folder = until_the_end.enter_context(scratch("bench"))
    return Bench(folder, prepare(folder))


def results(job: Job, out: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(out).items() if job.results(name)}


def prepare(folder: Path) -> dict[str, Job]:
    """The jobs by name, with their inputs in `folder`."""
    models = bundled.write_model(ROOT / "models", "WanCore/tiny")
    base = models / "diffusion_pytorch_model.safetensors"
    tuned = folder / "tuned.safetensors"
    changed = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
        for name, tensor in load_file(base).items()
    }
    save_file(changed, tuned)
    workflow = folder / "t2v.json"
    workflow.write_text(json.dumps(text_to_video()), encoding="utf-8")
    sample = ("run", workflow, "--device", "cpu", "--out")
    return {
        "sample": Job("headless.cli", lambda out: (*sample, out), lambda name: name.endswith((".mp4", ".latent"))),
        "convert": Job(
            "headless.cli", lambda out: ("convert", base, out / "model.safetensors", "--dtype", "fp16"), bool
        ),
        "extract": Job(
            "headless.cli",
            lambda out: ("lora", tuned, "--base", base, "--extract", "--rank", 4, "--out", out / "lora.safetensors"),
            bool,
        ),
        "train": Job("trainer.train", lambda out: training(folder, out), is_trained),
    }


def text_to_video() -> dict:
    """The workflow on the tiny model, written down after each step, with its latents kept."""
    classes = {**core_nodes(Folders()), **NODE_CLASS_MAPPINGS}
    prompt = apply_tiny(Workflow.load(ROOT / "workflows" / "api" / "t2v.json"), classes).to_api()
    (sampler,) = (node for node in prompt.values() if node["class_type"] == "WanCoreSampler")
    prompt["run"] = {"class_type": "WanCoreLongRun", "inputs": {"checkpoint_every": 1, "keep_latents": True}}
    sampler["inputs"] |= {"run": ["run", 0], "seed": 5, "width": 32, "height": 32, "num_frames": 5}
    return prompt


def training(folder: Path, out: Path, **changes: object) -> Words:
    """A LoRA in four steps, saved after each."""
    settings = {
        "output_path": str(out), "cache": "disk", "cache_dir": str(folder / "cache"), "lora_rank": 2,
        "dataset_repeat": 2, "min_free_gb": 0.0, "save_steps": 1,
    }  # fmt: skip
    return material.flags(material.config(folder, "t2v", **{**settings, **changes}))


def is_trained(name: str) -> bool:
    """Whether a file of that name in a training's folder is the same whenever it is written."""
    return name.endswith((".safetensors", ".pt"))
