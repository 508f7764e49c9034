"""Runs of a transformer whose weights are where it computes."""

from typing import Any

from torch import Tensor

from wan_core.model import VideoModel
from wan_core.models.dit import WanDiT
from wan_core.models.layers import MotionController
from wan_core.runtime import Runtime
from wan_core.sampling.checkpoint import Checkpoint, RunState
from wan_core.sampling.experts import Expert, RunInputs, RunModel
from wan_core.sampling.run import sample as run
from wan_core.settings import MemorySettings, SamplerSettings
from wan_core.types import Conditioning, LatentSize


def sample_state(
    dit: WanDiT,
    cond: Conditioning,
    size: LatentSize,
    settings: SamplerSettings,
    runtime: Runtime,
    start: Tensor | None = None,
    motion_controller: MotionController | None = None,
    *,
    prompts: tuple[Conditioning, ...] = (),
    loras: tuple[Any, ...] = (),
    checkpoint: Checkpoint | None = None,
    earlier: RunState | None = None,
) -> RunState:
    """The state after the steps of `settings`."""
    model = RunModel([Expert(dit, loras=loras)], motion_controller)
    inputs = RunInputs(cond, size, start, tuple(prompts))
    return run(model, inputs, settings, runtime, checkpoint=checkpoint, earlier=earlier)


def sample(
    dit: WanDiT,
    cond: Conditioning,
    size: LatentSize,
    settings: SamplerSettings,
    runtime: Runtime,
    start: Tensor | None = None,
    motion_controller: MotionController | None = None,
    *,
    checkpoint: Checkpoint | None = None,
    **more: Any,
) -> Tensor:
    """Normalised latents (B, 16, F, h, w) of a whole run; what `checkpoint` kept of it is removed."""
    state = sample_state(dit, cond, size, settings, runtime, start, motion_controller, checkpoint=checkpoint, **more)
    if checkpoint is not None and state.run:
        checkpoint.remove(state.run)
    return state.video


def planned(
    model: VideoModel,
    cond: Conditioning,
    size: LatentSize,
    settings: SamplerSettings,
    runtime: Runtime,
    memory: MemorySettings | None = None,
) -> Tensor:
    """The same of a model whose weights are planned and brought."""
    return model.sample(RunInputs(cond, size), settings, memory or MemorySettings(), runtime).video
