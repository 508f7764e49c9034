"""The interface between a model and everything that samples from it, and the check that its velocities are finite."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from ..models.attention import RotaryTable
from ..models.dit import Prepared, TimeEmbedding, TokenState, WanDiT, check_shapes, vace_strengths
from ..models.fused import TokenRows
from ..models.layers import MotionController
from ..parallel.mesh import Mesh
from ..runtime import Runtime
from ..settings import GuidanceSettings
from ..types import Conditioning, Curve, StepInfo, tensors_in


class NonFiniteError(ValueError):
    """NaN or infinity where finite numbers are expected. The message names the place and the likely cause."""


def is_finite(x: Tensor) -> bool:
    """Whether no value of `x` is NaN or infinite; waits for the device. Meta tensors have no values and pass."""
    return x.is_meta or bool(torch.isfinite(x).all())


def check_latents(latents: Tensor, when: str) -> None:
    """Raise NonFiniteError when latents (B, z, F, h, w) hold NaN or infinity; `when` is part of the message."""
    if not is_finite(latents):
        bad = 100 * (~torch.isfinite(latents)).double().mean().item()
        raise NonFiniteError(
            f"{bad:.3g}% of the latents are NaN or infinite {when}; the video would be black. Load the "
            "model in bf16 or fp32, or lower cfg, VACE strength or LoRA strength, and sample again."
        )


def check_pixels(pixels: Tensor) -> None:
    """Raise NonFiniteError when decoded pixels (B, 3, T, H, W) hold NaN or infinity."""
    if not is_finite(pixels):
        bad = 100 * (~torch.isfinite(pixels)).double().mean().item()
        raise NonFiniteError(
            f"{bad:.3g}% of the decoded pixels are NaN or infinite, though the latents are not: the VAE's weights are "
            "broken, or a value is beyond 65504 in fp16. Check its file, or load the VAE in bf16 or fp32."
        )


def locate(dit: WanDiT, x: Tensor, cond: Conditioning, states: Sequence[TokenState], info: StepInfo) -> NonFiniteError:
    """The error for a step whose velocity is not finite.

    The step runs once more from `states`, its newly embedded tokens, which are checked before every block.
    """
    step = f"step {info.index + 1} of {info.total}"
    if not is_finite(x):
        return NonFiniteError(f"The latents were NaN or infinite before {step}: the noise or the latent input is bad.")
    if not all(is_finite(tensor) for tensor in tensors_in(cond)):
        return NonFiniteError(
            f"The conditioning holds NaN or infinity before {step}: the text encoder or an input image overflowed; "
            "load the text encoder in bf16 or fp32."
        )
    bad = [name for name, weight in dit.named_parameters() if not is_finite(weight)]
    if bad:
        return NonFiniteError(
            f"{len(bad)} weights of the model hold NaN or infinity, the first is {bad[0]}: the file, a LoRA or a "
            "conversion is broken."
        )
    place = "the embedding of the latents"
    if all(is_finite(state.tokens) for state in states):
        found: list[int] = []

        def look(index: int) -> None:
            if not found and not all(is_finite(state.tokens) for state in states):
                found.append(index - 1)

        dit.run_blocks(states, look)
        look(len(dit.blocks))
        place = f"block {found[0]} of 0 to {len(dit.blocks) - 1}" if found else "the output head"
    likely = "a value beyond 65504 in fp16; load the model in bf16, or with precision exact"
    if dit.dtype != torch.float16:
        likely = "too strong a cfg, VACE strength or LoRA, or an attention kernel that fails here; try sdpa"
    return NonFiniteError(f"The model gave NaN or infinity in {step}, first after {place}. Likely cause: {likely}.")


class Predictor(Protocol):
    """Velocity of latents `x` (B, z, R + F, h, w) at timestep `t`. Features wrap one another through this call."""

    def __call__(self, x: Tensor, t: float, cond: Conditioning, info: StepInfo) -> Tensor: ...


class BranchPredictor(Protocol):
    """Velocities of several branches (conditional, unconditional) at once; only guidance calls a model this way."""

    def __call__(self, x: Tensor, t: float, branches: Mapping[str, Conditioning], info: StepInfo) -> list[Tensor]: ...


Key = tuple[str, int]
"""The branch and the window of a token state; the branch of a joined batch is the names of all its branches, see
`branches_of`.
"""


SKIPPING = "skipping"
"""The branch of skip-layer guidance: the conditional one without some blocks."""


def skip_scale(guidance: GuidanceSettings, index: int, total: int) -> float:
    """How far step `index` of `total` is led away from the branch `SKIPPING`; 0 does not run it."""
    skip = guidance.skip
    return Curve((skip.scale,), skip.start, skip.end, 0.0).at(index, total) if skip.blocks and skip.scale else 0.0


def skipped_blocks(guidance: GuidanceSettings, branch: str, index: int, total: int) -> frozenset[int]:
    """The blocks that `branch` leaves out at step `index` of `total`."""
    skip, without = guidance.skip, frozenset[int]()
    if branch == SKIPPING:
        return frozenset(skip.blocks)
    if branch == "negative" and skip.blocks and skip.scale is None:
        return frozenset(skip.blocks) if Curve((1.0,), skip.start, skip.end, 0.0).at(index, total) else without
    return without


class BlockRunner(Protocol):
    """Takes token states through the blocks of a model; step caches are built on this seam.

    `keys` are those of the states, one each; whatever a runner remembers is stored by key. Of its `count` blocks those
    in `blocks` run, or all if None. Blocks that are skipped do not run later.
    """

    @property
    def count(self) -> int: ...

    def __call__(
        self, states: Sequence[TokenState], keys: Sequence[Key], info: StepInfo, blocks: range | None = None
    ) -> None: ...


def joined_branches(names: Iterable[str]) -> str:
    """The name of a batch that holds these branches, one after the other and of equal size."""
    return "+".join(names)


def branches_of(name: str) -> list[str]:
    """The branches that a batch of this name holds."""
    return name.split("+")


class AllBlocks:
    """The plain block runner; checks for cancellation before every block, where no other rank waits for it."""

    def __init__(self, dit: WanDiT, runtime: Runtime) -> None:
        self._dit, self._runtime = dit, runtime
        self.count = len(dit.blocks)

    def __call__(
        self, states: Sequence[TokenState], keys: Sequence[Key], info: StepInfo, blocks: range | None = None
    ) -> None:
        alone = self._runtime.ranks is None
        self._dit.run_blocks(states, (lambda _: self._runtime.check_cancelled()) if alone else None, blocks)


class TimeTable:
    """The time embeddings of all evaluations of a run, computed at once: they depend on nothing else."""

    def __init__(self, dit: WanDiT, evaluations: Sequence[Sequence[float]], cond: Conditioning) -> None:
        """`evaluations` are the timesteps of each step, as `Solver.evaluations` has them. The videos of a batch have
        the same factors on them.
        """
        self._first = [0, *accumulate(len(step) for step in evaluations)]
        timesteps = torch.tensor([timestep for step in evaluations for timestep in step])
        factors = cond.timestep_factors
        if factors is not None:
            timesteps = timesteps.to(factors.device)[:, None] * factors[0]
        self._embedded = dit.embed_time(timesteps)

    def __getitem__(self, info: StepInfo) -> TimeEmbedding:
        row = self._first[info.index] + info.evaluation
        return self._embedded[row : row + 1]

    @property
    def modulations(self) -> Tensor:
        """What the blocks get for noisy tokens at the first evaluation of each step, (N, 6, D)."""
        # The last factor on the timestep is the largest.
        return self._embedded.blocks[self._first[:-1], -1]


class ModelPredictor:
    """Runs a DiT for one sampling run, and keeps what does not change between its steps.

    Text, image tokens, camera, reference and VACE inputs are projected once per (branch, window) and kept until the
    window changes, so that memory does not grow with the number of windows. They stay valid because a run has one
    conditioning.

    Velocities are checked in the first step that is computed only, because reading a value waits for the device.
    """

    def __init__(
        self,
        dit: WanDiT,
        time: TimeTable,
        run_blocks: BlockRunner,
        motion_controller: MotionController | None = None,
        *,
        guidance: GuidanceSettings | None = None,
        keep: bool = False,
        mesh: Mesh | None = None,
    ) -> None:
        """With `keep`, the keys and values of cross-attention are kept between steps too. Of `guidance`, what happens
        inside of a branch is done here: attention guidance, and the blocks that a branch leaves out. On a `mesh` the
        rank that leads checks the velocities.
        """
        self._dit, self._keep, self._mesh = dit, keep, mesh
        self._guidance = guidance or GuidanceSettings()
        self._time = time
        self._run_blocks = run_blocks
        self._motion_controller = motion_controller
        self._checked: int | None = None
        self._window = 0
        self._prepared: dict[str, Prepared] = {}
        self._rotations: dict[tuple[int, int, int], RotaryTable] = {}
        self._rows: dict[int, tuple[TokenRows, TokenRows]] = {}

    def __call__(self, x: Tensor, t: float, branches: Mapping[str, Conditioning], info: StepInfo) -> list[Tensor]:
        """Raises:
        ValueError: a tensor does not match the model, or a velocity of the first step is not finite; the message then
            names the block.
        """
        if self._checked is None:
            self._checked = info.index
        states = self._embedded(x, branches, info)
        self._run_blocks(states, [(name, info.window) for name in branches], info)
        velocities = [self._dit.unembed(state) for state in states]
        if info.index == self._checked and not info.evaluation and self._mesh is None:
            for (name, cond), velocity in zip(branches.items(), velocities, strict=True):
                if not is_finite(velocity):
                    # The blocks overwrote the tokens, so they are embedded again.
                    raise locate(self._dit, x, cond, self._embedded(x, {name: cond}, info), info)
        return velocities

    def _embedded(self, x: Tensor, branches: Mapping[str, Conditioning], info: StepInfo) -> list[TokenState]:
        if info.window != self._window:
            self._prepared.clear()
            self._window = info.window
        states = []
        for name, cond in branches.items():
            prepared = self._prepare(name, cond, x, info.window)
            if not Curve((1.0,), 0.0, self._guidance.nag.end, 0.0).at(info.index, info.total):
                prepared = dataclasses.replace(prepared, context=dataclasses.replace(prepared.context, negative=None))
            state = self._dit.embed(x, self._time[info], prepared, vace_strengths(cond, info.index, info.total))
            state.skipped = skipped_blocks(self._guidance, name, info.index, info.total)
            states.append(state)
        return states

    def _prepare(self, branch: str, cond: Conditioning, x: Tensor, window: int) -> Prepared:
        if branch not in self._prepared:
            check_shapes(self._dit.config, x, cond)
            frames, height, width = x.shape[2:]
            size = (frames, height, width)  # of the window, R reference frames included
            motion = motion_offset(self._motion_controller, cond)
            motion = None if motion is None else motion.to(x.device)
            known = self._rotations.get(size), self._rows.get(window)
            nag = self._guidance.nag if self._guidance.nag.is_on else None
            prepared = self._dit.prepare(cond, size, motion, *known, keep=self._keep, nag=nag, mesh=self._mesh)
            self._prepared[branch] = prepared
            if prepared.context.rows is not None and prepared.rows is not None:
                self._rows[window] = prepared.context.rows, prepared.rows
            self._rotations[size] = prepared.context.rope
        return self._prepared[branch]


def motion_offset(controller: MotionController | None, cond: Conditioning) -> Tensor | None:
    """The offset of speed control on the time modulation, (B, 6, D), or None without it."""
    if controller is None or cond.motion_bucket is None:
        return None
    return controller(cond.motion_bucket)
