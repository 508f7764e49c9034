"""The seam between a model and everything that samples from it."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from ..models.dit import Prepared, WanDiT, check_shapes
from ..runtime import Runtime
from ..types import Conditioning, StepInfo


class Predictor(Protocol):
    """Velocity of latents `x` (B, 16, R + F, h, w) at timestep `t`. Features wrap one another through this call."""

    def __call__(self, x: Tensor, t: float, cond: Conditioning, info: StepInfo) -> Tensor: ...


class BranchPredictor(Protocol):
    """Velocities of several branches (conditional, unconditional) at once; only guidance speaks to a model this way."""

    def __call__(self, x: Tensor, t: float, branches: Mapping[str, Conditioning], info: StepInfo) -> list[Tensor]: ...


class ModelPredictor:
    """Runs a DiT for one sampling run and owns what of it does not change between steps.

    The time path is evaluated once for all `timesteps`; text, image tokens, camera, reference and VACE inputs are
    projected once per (branch, window). A run has one conditioning, so these stay valid for its length.
    """

    def __init__(self, dit: WanDiT, timesteps: Tensor, runtime: Runtime) -> None:
        self._dit = dit
        self._runtime = runtime
        self._time = dit.embed_time(timesteps)
        self._prepared: dict[tuple[str, int], Prepared] = {}

    def __call__(self, x: Tensor, t: float, branches: Mapping[str, Conditioning], info: StepInfo) -> list[Tensor]:
        time = self._time[info.index : info.index + 1]
        states = [self._dit.embed(x, time, self._prepare(name, cond, x, info)) for name, cond in branches.items()]
        self._dit.run_blocks(states, lambda _: self._runtime.check_cancelled())
        return [self._dit.unembed(state) for state in states]

    def _prepare(self, name: str, cond: Conditioning, x: Tensor, info: StepInfo) -> Prepared:
        key = (name, info.window)
        if key not in self._prepared:
            check_shapes(self._dit.config, x, cond)
            self._prepared[key] = self._dit.prepare(cond, tuple(x.shape[2:]))
        return self._prepared[key]
