"""A run for a process of its own, which says on every line which step it has done."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.reference import tiny_dit
from tests.sampling.runs import sample
from tests.sampling.variants import conditioning
from wan_core.cache_settings import EasyCacheSettings, FirstBlockSettings, TeaCacheSettings
from wan_core.runtime import Runtime
from wan_core.sampling.checkpoint import Checkpoint
from wan_core.settings import SamplerSettings, WindowSettings
from wan_core.types import LatentSize

SIZE = LatentSize(5, 2, 4)
CACHES = {
    "none": None,
    "teacache": TeaCacheSettings(threshold=1000.0, template="Wan2.1-T2V-14B", start_step=2),
    "easycache": EasyCacheSettings(threshold=0.2, start_step=2),
    "first block": FirstBlockSettings(threshold=0.2, start_step=2, max_skips=2),
}
WINDOWS = {
    "none": None,
    "blend": WindowSettings(size=3, stride=2),
    "chain": WindowSettings(size=3, stride=2, mode="chain"),
}


def run(
    folder: Path | None, solver: str, cache: str, windows: str, before_end: Callable[[], object] = bool
) -> torch.Tensor:
    settings = SamplerSettings(steps=7, seed=4, solver=solver, cache=CACHES[cache], windows=WINDOWS[windows])

    def report(phase: str, done: int, total: int, latents: torch.Tensor) -> None:
        print(done, flush=True)
        if done == total:
            before_end()

    runtime = Runtime(device=torch.device("cpu"), dtype=torch.float32, on_progress=report)
    checkpoint = Checkpoint(folder, every=1) if folder else None
    return sample(tiny_dit("vace"), conditioning("vace", SIZE), SIZE, settings, runtime, checkpoint=checkpoint)


def main(folder: str, solver: str, cache: str, windows: str, result: str) -> None:
    torch.set_num_threads(1)
    # Whoever means to kill this process has time to do so, however busy the machine is.
    latents = run(Path(folder), solver, cache, windows, before_end=sys.stdin.read)
    save_file({"latents": latents.contiguous()}, result)
