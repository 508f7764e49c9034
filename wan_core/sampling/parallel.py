"""A sampling run on several ranks: rank 0 leads it with noise, solver and checkpoints, the others follow its words.

Every rank has the model, its conditioning and its part of the step caches. In each evaluation of a step rank 0 sends
one control word and the latents, all ranks predict, and rank 0 has the velocity.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor

from ..models import kernels
from ..offload.streaming import Placement
from ..parallel.mesh import Ranks, Step
from ..runtime import Runtime
from ..settings import SamplerSettings
from ..types import Conditioning, StepInfo
from .checkpoint import restore
from .compose import Composed, build_solver, compose
from .experts import Active, RunModel
from .predictor import NonFiniteError, Predictor, is_finite
from .skip_rules import Magnitudes
from .solvers import Solver
from .split import SplitMemory, on_cpu, part_of


@dataclass(frozen=True, eq=False)
class Compose:
    """What the ranks predict with from here on: the arguments of `compose.compose`.

    Attributes:
        expert: the number of the transformer; `run` are the settings of the run and `settings` as its plan has them.
        shape: of the latents, (B, z, R + F, h, w).
    """

    expert: int
    run: SamplerSettings
    settings: SamplerSettings
    placement: Placement | None
    cond: Conditioning
    shape: tuple[int, ...]
    frames: int
    prompts: tuple[Conditioning, ...]
    shares: tuple[range, ...]


@dataclass(frozen=True)
class AskMemory:
    """Every rank says how much memory its device has left."""


@dataclass(frozen=True)
class GiveCache:
    """Every rank gives rank 0 what its step cache remembers."""


@dataclass(frozen=True, eq=False)
class TakeCache:
    """The memory of a step cache, of which every rank takes its part."""

    memory: Mapping[str, Tensor]


@dataclass(frozen=True)
class EndRun:
    """The run is over, or rank 0 has stopped it."""


class Leading:
    """The predictor of rank 0, which the others join."""

    def __init__(self, predict: Predictor, ranks: Ranks) -> None:
        self._predict, self._ranks = predict, ranks
        self._checked: int | None = None

    def __call__(self, x: Tensor, t: float, cond: Conditioning, info: StepInfo) -> Tensor:
        ranks = self._ranks
        self._checked = info.index if self._checked is None else self._checked
        with ranks.together():
            ranks.tell(Step(info.index, info.evaluation))
            velocity = self._predict(ranks.spread(x.contiguous()), t, cond, info)
        if info.index == self._checked and not info.evaluation and not is_finite(velocity):
            raise NonFiniteError(
                f"The model gave NaN or infinity in step {info.index + 1} of {info.total}. On one card the message "
                "names the block; likely causes are a value beyond 65504 in fp16, or too strong a cfg or LoRA."
            )
        return velocity


def composed(
    model: RunModel,
    active: Active,
    solver: Solver,
    cond: Conditioning,
    shape: tuple[int, ...],
    frames: int,
    run: SamplerSettings,
    runtime: Runtime,
    prompts: tuple[Conditioning, ...] = (),
    magnitudes: Magnitudes | None = None,
) -> Composed:
    """The predictor of a run with the active expert, on this rank alone or on all; arguments as of `Compose`."""
    shares = tuple(share for _, share in model.shares(solver.timesteps, range(run.total_steps)))
    ranks, settings, cpu = runtime.ranks, active.settings, torch.device("cpu")
    if ranks is not None:
        inputs = cond.to(cpu), shape, frames, tuple(prompt.to(cpu) for prompt in prompts), shares
        ranks.tell(Compose(model.number, run, settings, active.placement, *inputs))
    parts = compose(
        active.dit, solver, cond, frames, settings, runtime, model.motion_controller, prompts, shares=shares,
        magnitudes=magnitudes,
    )  # fmt: skip
    if ranks is None or parts.mesh is None:
        return parts
    memories = {
        name: SplitMemory(memory, parts.mesh, GiveCache(), TakeCache) for name, memory in parts.memories.items()
    }
    return replace(parts, predict=Leading(parts.predict, ranks), memories=memories)


def sharing(runtime: Runtime) -> Runtime:
    """`runtime` for plans of all ranks: what is left of a device's memory is the least of any."""
    ranks = runtime.ranks
    if ranks is None:
        return runtime

    def left(device: torch.device) -> float | None:
        own = runtime.memory_left(device)
        if own is None or device != runtime.device:
            return own
        ranks.tell(AskMemory())
        return ranks.least(own)

    return replace(runtime, memory_left=left)


@contextmanager
def leading(ranks: Ranks | None, task: Any = None) -> Iterator[None]:
    """Around work that others follow: they are told the task, and at its end, whatever ends it, they are free again."""
    if ranks is None:
        yield
        return
    if task is not None:
        ranks.tell(task)
    try:
        yield
    finally:
        if not ranks.broken:
            ranks.tell(EndRun())


@torch.no_grad()
def follow(model: RunModel, runtime: Runtime, *, deterministic: bool = False) -> None:
    """Take part in a run that rank 0 leads, until it ends."""
    ranks, device = runtime.ranks, runtime.device
    assert ranks is not None, "a run is followed on a rank"
    with kernels.run(deterministic=deterministic), model:
        while not isinstance(message := ranks.hear(), EndRun):
            match message:
                case AskMemory():
                    left = runtime.memory_left(device)
                    ranks.least(inf if left is None else left)
                case Compose():
                    active = model.active(message.expert, message.run, message.placement)
                    solver, cond = build_solver(message.run), message.cond.to(device)
                    x = torch.empty(message.shape, device=device)
                    prompts = [prompt.to(device) for prompt in message.prompts]
                    parts = compose(
                        active.dit, solver, cond, message.frames, message.settings, runtime, model.motion_controller,
                        prompts, shares=message.shares,
                    )  # fmt: skip
                    total, index = message.run.total_steps, -1
                case Step():
                    if message.index != index:
                        index = message.index
                        active.before_step(index, total)
                    info = StepInfo(index, total, evaluation=message.evaluation)
                    t = solver.evaluations[index][message.evaluation]
                    parts.predict(ranks.spread(x), t, cond, info)
                case GiveCache():
                    ranks.collected(on_cpu(parts.memories["cache"].memory))
                case TakeCache():
                    assert parts.mesh is not None, "it was composed for several ranks"
                    own = part_of(message.memory, parts.mesh)
                    restore({"": parts.memories["cache"]}, {f".{name}": value for name, value in own.items()}, device)
