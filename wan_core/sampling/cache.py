"""Leaving out the blocks of a step whose effect is already known: the part that all step caches share."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..models.dit import TokenState
from ..models.elementwise import add_
from ..types import StepInfo
from .predictor import BlockRunner, branches_of


class SkipRule(Protocol):
    """Decides which steps run. It is asked once per step and window, with the tokens of the leading branch; the other
    branches follow, so that the result does not depend on how branches are run.

    Attributes:
        memory: tensors that later decisions need, for a run that is continued elsewhere.
    """

    @property
    def memory(self) -> dict[str, Tensor]: ...

    def may_skip(self, index: int) -> bool:
        """Whether step `index` could be left out at all; what the step before changed is kept only then."""
        ...

    def skips(self, tokens: Tensor, info: StepInfo) -> bool:
        """Whether to leave out this step, whose blocks would receive `tokens` (B, S, D)."""
        ...

    def computed(self, tokens: Tensor, info: StepInfo) -> None:
        """Learn what the blocks made of them in a step that ran."""
        ...


class CachedBlocks:
    """A block runner that adds again what the last computed step changed, wherever `rule` leaves a step out.

    VACE blocks run inside of the others and are left out with them. What a step changed is kept per (branch, window)
    in `dtype`, on the CPU if asked; it belongs to this object, that is to one run.
    """

    def __init__(self, run: BlockRunner, rule: SkipRule, dtype: torch.dtype, *, on_cpu: bool = False) -> None:
        self._run, self._rule = run, rule
        self._dtype, self._on_cpu = dtype, on_cpu
        self._residuals: dict[str, Tensor] = {}
        self._decisions: dict[int, tuple[int, bool]] = {}

    @property
    def memory(self) -> dict[str, Tensor]:
        """Everything that a continued run needs to go on as this one would."""
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

    def __call__(self, states: Sequence[TokenState], keys: Sequence[tuple[str, int]], info: StepInfo) -> None:
        names = [[f"{branch}.{window}" for branch in branches_of(name)] for name, window in keys]
        lead = states[0].tokens.chunk(len(names[0]))[0]
        is_lead = self._decisions.get(info.window, (-1, False))[0] != info.index
        if is_lead:
            known = all(name in self._residuals for name in names[0])
            self._decisions[info.window] = (info.index, self._rule.skips(lead, info) and known)
        if self._decisions[info.window][1] and all(name in self._residuals for group in names for name in group):
            for state, group in zip(states, names, strict=True):
                state.tokens = add_(state.tokens, self._recalled(group, state.tokens))
            return
        for name in (name for group in names for name in group):
            # Out of date from here on; dropped before the blocks need room.
            self._residuals.pop(name, None)
        keep = info.index + 1 < info.total and self._rule.may_skip(info.index + 1)
        before = [state.tokens.clone() if keep else None for state in states]
        self._run(states, keys, info)
        if is_lead:
            self._rule.computed(states[0].tokens.chunk(len(names[0]))[0], info)
        for state, group, old in zip(states, names, before, strict=True):
            self._keep(group, None if old is None else torch.sub(state.tokens, old, out=old))

    def _keep(self, names: Sequence[str], residual: Tensor | None) -> None:
        if residual is not None:
            residual = residual.to("cpu" if self._on_cpu else residual.device, self._dtype)
            self._residuals.update(zip(names, residual.chunk(len(names)), strict=True))

    def _recalled(self, names: Sequence[str], tokens: Tensor) -> Tensor:
        found = [self._residuals[name].to(tokens.device) for name in names]
        return found[0] if len(found) == 1 else torch.cat(found)
