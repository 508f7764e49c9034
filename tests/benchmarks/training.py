"""What a step of LoRA training takes at the true shapes: seconds, and memory of the card, with each way to save memory.

Weights are random and so are samples; nothing is read or downloaded. The steps are those of `trainer.run.loop`.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState

import pack

pack.register()

from tests.benchmarks.bench import random_dit  # noqa: E402
from wan_core import bundled, catalog  # noqa: E402
from wan_core.model_files import VideoModel  # noqa: E402
from wan_core.models.config import DiTConfig  # noqa: E402
from wan_core.offload.quant import quantise  # noqa: E402
from wan_core.runtime import GIB, OutOfMemoryError  # noqa: E402
from wan_core.types import Conditioning, VideoSize  # noqa: E402
from wan_core.variants import match_variant  # noqa: E402
from wancore.trainer.config import TrainConfig  # noqa: E402
from wancore.trainer.data.choices import Plan  # noqa: E402
from wancore.trainer.data.conditions import EncodedSample  # noqa: E402
from wancore.trainer.model.trainable import prepare  # noqa: E402
from wancore.trainer.run import engine  # noqa: E402
from wancore.trainer.run.estimate import Estimator  # noqa: E402
from wancore.trainer.run.events import Events  # noqa: E402
from wancore.trainer.run.loop import Loop, StopRequest  # noqa: E402

OPTIONS: dict[str, dict[str, Any]] = {
    "checkpointing": {},
    "checkpointing, offload": {"use_gradient_checkpointing_offload": True},
    "streaming": {"stream_base": True},
    "FP8 base": {"fp8_base": True},
    "FP8 base, streaming, offload": {
        "fp8_base": True, "stream_base": True, "use_gradient_checkpointing_offload": True,
    },
}  # fmt: skip
"""Ways to save memory, by name, as flags of the trainer."""

STEPS = 4
"""Steps per row; the first allocates memory and chooses kernels, and is left out."""


class Clock(Events):
    """Keeps the seconds of each step in place of writing them down."""

    def __init__(self) -> None:
        super().__init__(None)
        self.seconds: list[float] = []

    def step(self, step: int, total: int, **values: Any) -> None:
        self.seconds.append(values["seconds"])


def training_rows(device: torch.device | str, quick: bool) -> list[dict[str, Any]]:
    """A row for each length and each way to save memory.

    Args:
        quick: on the bundled tiny model at a tiny size, to see that everything runs.

    Returns:
        Rows of `model`, `trained`, `size`, `frames`, `option`, `seconds` per step (None where memory was too small),
        `peak_gib` of the device (None on a CPU) and `counted_gib`, what the trainer counted before.
    """
    return list(_rows(torch.device(device), quick))


def _rows(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    config = bundled.DITS["t2v"] if quick else catalog.published_config(catalog.find_row("Wan-AI/Wan2.1-T2V-1.3B"))
    sizes = [VideoSize(32, 32, 5)] if quick else [VideoSize(832, 480, 49), VideoSize(832, 480, 81)]
    for size in sizes:
        for option, flags in OPTIONS.items():
            named = {"model": "tiny" if quick else "T2V 1.3B", "trained": "LoRA of rank 32"}
            named |= {"size": f"{size.width}x{size.height}", "frames": size.num_frames, "option": option}
            yield named | measured(config, size, flags, device, steps=2 if quick else STEPS)


def measured(
    config: DiTConfig, size: VideoSize, flags: dict[str, Any], device: torch.device, steps: int
) -> dict[str, Any]:
    """Seconds per step, peak and estimate of a run of `steps` steps."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainConfig(
            lora_base_model="dit", cache="off", output_path=folder, max_steps=steps, dataset_repeat=steps, **flags
        )
        accelerator = engine.start(settings)
        try:
            return _measured(config, size, settings, accelerator, device)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState._reset_state()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _measured(config: DiTConfig, size: VideoSize, settings: TrainConfig, accelerator: Any, device: torch.device) -> Any:
    dit = random_dit(config, torch.device("cpu") if settings.streams else device)
    if settings.fp8_base:
        quantise(dit)
    trainables = prepare(VideoModel.of(dit, match_variant(dit.config), None, "random", None), settings)
    latents = torch.randn(16, *size.latent.shape)
    sample = EncodedSample(
        latents=latents,
        cond=Conditioning(text=torch.randn(1, 512, config.text_dim)),
        caption="",
        position=0,
        name="random",
    )
    expected = Estimator(trainables, [tuple(latents.shape)]).needs(settings)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trained = engine.Engine(accelerator, trainables, settings)
    clock = Clock()
    idle = SimpleNamespace(after_step=lambda *_, **__: None, saved=0)
    examples = SimpleNamespace(get=lambda position, epoch: replace(sample, position=position))
    loop = Loop(
        settings, trained, examples, Plan(settings, lambda epoch: [0] * settings.max_steps), settings.objective,
        idle, idle, clock, StopRequest(Path(settings.output_path) / "stop"),
    )  # fmt: skip
    told: dict[str, Any] = {"seconds": None, "peak_gib": None, "counted_gib": expected.device / GIB}
    try:
        with trained.weights_on_device():
            loop.run(0)
    except OutOfMemoryError:
        return told
    peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
    return told | {"seconds": median(clock.seconds[1:]), "peak_gib": peak}


def line(row: dict[str, Any]) -> str:
    """A row as one line of Markdown."""
    told = {float: "{:.2f}".format, type(None): lambda _: "-"}
    return f"| {' | '.join(told.get(type(value), str)(value) for value in row.values())} |"


def main(words: Sequence[str]) -> None:
    """`python -m tests.benchmarks.training [--quick]`, from the pack's folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for row in _rows(torch.device(device), "--quick" in words):
        sys.stdout.write(line(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
