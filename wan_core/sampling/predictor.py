"""The seam between a model and everything that samples from it."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from ..models.dit import Prepared, TokenState, WanDiT, check_shapes, vace_strengths
from ..models.motion_controller import MotionController
from ..runtime import Runtime
from ..types import Conditioning, StepInfo


class Predictor(Protocol):
    """Velocity of latents `x` (B, 16, R + F, h, w) at timestep `t`. Features wrap one another through this call."""

    def __call__(self, x: Tensor, t: float, cond: Conditioning, info: StepInfo) -> Tensor: ...


class BranchPredictor(Protocol):
    """Velocities of several branches (conditional, unconditional) at once; only guidance speaks to a model this way."""

    def __call__(self, x: Tensor, t: float, branches: Mapping[str, Conditioning], info: StepInfo) -> list[Tensor]: ...


class BlockRunner(Protocol):
    """Takes token states through the blocks of a model, all of them or none; step caches are built on this seam.

    `keys` names each state's (branch, window); a runner that remembers anything keeps it apart by them.
    """

    def __call__(self, states: Sequence[TokenState], keys: Sequence[tuple[str, int]], info: StepInfo) -> None: ...


class ModelPredictor:
    """Runs a DiT for one sampling run and owns what of it does not change between steps.

    The time path is evaluated once for all `timesteps`; text, image tokens, camera, reference and VACE inputs are
    projected once per (branch, window). A run has one conditioning, so these stay valid for its length.
    """

    def __init__(
        self,
        dit: WanDiT,
        timesteps: Tensor,
        runtime: Runtime,
        *,
        motion_controller: MotionController | None = None,
        run_blocks: BlockRunner | None = None,
    ) -> None:
        self._dit = dit
        self._runtime = runtime
        self._motion_controller = motion_controller
        self._run_blocks = run_blocks or self.run_all_blocks
        self.time = dit.embed_time(timesteps)
        self._prepared: dict[tuple[str, int], Prepared] = {}

    def __call__(self, x: Tensor, t: float, branches: Mapping[str, Conditioning], info: StepInfo) -> list[Tensor]:
        time = self.time[info.index : info.index + 1]
        keys = [(name, info.window) for name in branches]
        states = []
        for key, cond in zip(keys, branches.values(), strict=True):
            prepared = self._prepare(key, cond, x)
            states.append(self._dit.embed(x, time, prepared, vace_strengths(cond, info.index, info.total)))
        self._run_blocks(states, keys, info)
        return [self._dit.unembed(state) for state in states]

    def run_all_blocks(self, states: Sequence[TokenState], keys: Sequence[tuple[str, int]], info: StepInfo) -> None:
        """The plain block runner; asks for cancellation before every block."""
        self._dit.run_blocks(states, lambda _: self._runtime.check_cancelled())

    def _prepare(self, key: tuple[str, int], cond: Conditioning, x: Tensor) -> Prepared:
        if key not in self._prepared:
            check_shapes(self._dit.config, x, cond)
            motion = None
            if self._motion_controller is not None and cond.motion_bucket is not None:
                motion = self._motion_controller(cond.motion_bucket).to(x.device)
            self._prepared[key] = self._dit.prepare(cond, tuple(x.shape[2:]), motion)
        return self._prepared[key]
