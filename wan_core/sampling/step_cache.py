"""Step caches skip the blocks of a step, or all but the first ones, and add again what they changed in an earlier one;
`skip_rules` says in which steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..models.dit import TokenState
from ..models.ops import add_
from ..parallel.mesh import Mesh
from ..types import StepInfo
from .predictor import BlockRunner, Key, branches_of

SAMPLE = 4096
"""About so many tokens, evenly spread, stand for a sequence when its change is measured."""


class Lead:
    """The first branch of a step, about which a rule decides; a rule may run the first blocks to look at the result.

    Attributes:
        done: how many blocks have run, for all branches of the call.
    """

    def __init__(
        self, run: BlockRunner, states: Sequence[TokenState], keys: Sequence[Key], info: StepInfo, branches: int
    ) -> None:
        """`branches` are joined in the batch of the first state."""
        self._run, self._states, self._keys, self._info, self._branches = run, states, keys, info, branches
        self.done = 0

    def sample(self) -> Tensor:
        """A copy of some tokens (B, n, D) of the whole sequence, evenly spread, as they are now: enough to measure how
        the sequence changes.
        """
        tokens, part = self._states[0].tokens.chunk(self._branches)[0], self._states[0].prepared.context.part
        count = tokens.shape[1] if part is None else sum(part.sizes)
        stride = max(1, count // SAMPLE)
        return tokens[:, ::stride].clone() if part is None else part.every(tokens, stride)

    def run(self, count: int) -> None:
        """Run the first `count` blocks, but those that have run already."""
        if count > self.done:
            self._run(self._states, self._keys, self._info, range(self.done, count))
            self.done = count


class SkipRule(Protocol):
    """Decides which steps are skipped: once per step and window, by the first branch. The other branches and further
    evaluations of the step follow, so the result does not depend on the guidance mode.

    Attributes:
        memory: tensors that later decisions need, for a run that is continued elsewhere.
    """

    @property
    def memory(self) -> dict[str, Tensor]: ...

    def may_skip(self, index: int) -> bool:
        """Whether step `index` can be skipped at all; the residual of the step before is kept only then."""
        ...

    def skips(self, lead: Lead, info: StepInfo) -> bool:
        """Whether to skip the blocks of this step. To decide, the rule may run the first blocks of `lead`, in each step
        as many.
        """
        ...

    def computed(self, lead: Lead, info: StepInfo) -> None:
        """Called with the lead after the blocks of a step that is not skipped."""
        ...


@dataclass(frozen=True)
class _Decision:
    """Whether the blocks after the first `looked_at` are skipped in `step`."""

    step: int
    skips: bool
    looked_at: int


class CachedBlocks:
    """A block runner that, where `rule` skips a step, adds the residual of the last computed one.

    The residual of a step is what the blocks, after those that the rule ran, added to the tokens. It is kept per
    (branch, window) and evaluation in `dtype`, with `on_cpu` in host memory, and belongs to this object, that is to one
    run. VACE blocks run within the others and are skipped with them. On a mesh each rank keeps the residual of its own
    tokens, and a rule that looks at tokens decides in the first row, for all.
    """

    def __init__(
        self, run: BlockRunner, rule: SkipRule, dtype: torch.dtype, *, on_cpu: bool = False, mesh: Mesh | None = None
    ) -> None:
        self._run, self._rule, self._mesh = run, rule, None if isinstance(rule, SkipPlan) else mesh
        self._dtype, self._on_cpu = dtype, on_cpu
        self.count = run.count
        self._residuals: dict[str, Tensor] = {}
        self._decisions: dict[int, _Decision] = {}

    @property
    def memory(self) -> dict[str, Tensor]:
        """Everything that a continued run needs to give the same result."""
        residuals = {f"residual.{key}": value for key, value in self._residuals.items()}
        return residuals | {f"rule.{key}": value for key, value in self._rule.memory.items()}

    @memory.setter
    def memory(self, tensors: dict[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"residual": {}, "rule": {}}
        for name, value in tensors.items():
            part, key = name.split(".", 1)
            parts[part][key] = value
        self._residuals = {key: value.cpu() if self._on_cpu else value for key, value in parts["residual"].items()}
        self._rule.memory.clear()
        self._rule.memory.update(parts["rule"])

    def __call__(
        self, states: Sequence[TokenState], keys: Sequence[Key], info: StepInfo, blocks: range | None = None
    ) -> None:
        assert blocks is None, "a cache decides about all blocks"
        further = f".{info.evaluation}" if info.evaluation else ""
        names = [[f"{branch}.{window}{further}" for branch in branches_of(name)] for name, window in keys]
        lead = Lead(self._run, states, keys, info, len(names[0]) if names else 0)
        decision = self._decisions.get(info.window)
        # The first call of a step and window decides; calls for further branches and evaluations find the decision.
        is_lead = decision is None or decision.step != info.index
        if decision is None or is_lead:
            decision = self._decisions[info.window] = self._decided(lead, names, info)
        lead.run(decision.looked_at)
        if decision.skips and all(name in self._residuals for group in names for name in group):
            for state, group in zip(states, names, strict=True):
                found = [self._residuals[name].to(state.tokens.device) for name in group]
                state.tokens = add_(state.tokens, found[0] if len(found) == 1 else torch.cat(found))
            return
        for name in (name for group in names for name in group):
            # Stale from here on, and dropped now so that the blocks have its memory.
            self._residuals.pop(name, None)
        keep = info.index + 1 < info.total and self._rule.may_skip(info.index + 1)
        before = [state.tokens.clone() if keep else None for state in states]
        self._run(states, keys, info, range(lead.done, self.count))
        if is_lead and self._decides:
            self._rule.computed(lead, info)
        for state, group, old in zip(states, names, before, strict=True):
            if old is not None:
                residual = torch.sub(state.tokens, old, out=old)
                residual = residual.to("cpu" if self._on_cpu else residual.device, self._dtype)
                self._residuals.update(zip(group, residual.chunk(len(group)), strict=True))

    @property
    def _decides(self) -> bool:
        return self._mesh is None or self._mesh.row == 0

    def _decided(self, lead: Lead, names: Sequence[Sequence[str]], info: StepInfo) -> _Decision:
        skips = False
        if self._decides:
            known = all(name in self._residuals for group in names[:1] for name in group)
            skips = self._rule.skips(lead, info) and known
        if self._mesh is None:
            return _Decision(info.index, skips, lead.done)
        agreed, looked_at = self._mesh.agreed(skips, lead.done)
        return _Decision(info.index, bool(agreed), looked_at)


SKIPPED_STEP_COST = 0.01
"""What a step without blocks costs, as a fraction of one with them: embedding and head only."""


@dataclass(frozen=True)
class SkipPlan:
    """The steps to skip, decided before the first one: a `SkipRule` that looks at no tokens."""

    skipped: tuple[bool, ...]
    threshold: float
    memory: dict[str, Tensor] = field(default_factory=dict, compare=False)

    @property
    def computed_steps(self) -> int:
        return self.skipped.count(False)

    @property
    def speedup(self) -> float:
        """The time of a run without the cache over that with it, from `SKIPPED_STEP_COST`."""
        skipped = len(self.skipped) - self.computed_steps
        return len(self.skipped) / (self.computed_steps + SKIPPED_STEP_COST * skipped)

    def summary(self) -> str:
        """For the log: "computes 21 of 50 steps, about 2.3x faster"."""
        return f"computes {self.computed_steps} of {len(self.skipped)} steps, about {self.speedup:.1f}x faster"

    def may_skip(self, index: int) -> bool:
        return self.skipped[index]

    def skips(self, lead: Lead, info: StepInfo) -> bool:
        return self.skipped[info.index]

    def computed(self, lead: Lead, info: StepInfo) -> None:
        pass
