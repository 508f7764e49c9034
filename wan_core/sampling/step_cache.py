"""Step caches, which skip the blocks of a step whose effect is already known: TeaCache (Liu et al. 2024) and EasyCache
(Zhou et al. 2025)."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..models.dit import TokenState
from ..models.ops import add_
from ..settings import EasyCacheSettings, TeaCacheSettings
from ..types import StepInfo
from .predictor import BlockRunner, Key, branches_of


class Lead:
    """The leading branch before the blocks of a step, and the way through as many of them as a rule wants to see.

    Attributes:
        done: how many blocks have run, for all branches that came with it.
    """

    def __init__(
        self, run: BlockRunner, states: Sequence[TokenState], keys: Sequence[Key], info: StepInfo, branches: int
    ) -> None:
        """`branches` are joined in the batch of the first state."""
        self._run, self._states, self._keys, self._info, self._branches = run, states, keys, info, branches
        self.done = 0

    @property
    def tokens(self) -> Tensor:
        """(B, S, D), as they are now; blocks write into them, so clone what is to be compared."""
        return self._states[0].tokens.chunk(self._branches)[0]

    def run(self, count: int) -> None:
        """Let the first `count` blocks run, of which some may have run before."""
        if count > self.done:
            self._run(self._states, self._keys, self._info, range(self.done, count))
            self.done = count


class SkipRule(Protocol):
    """Decides which steps run. It is asked once per step and window, about the leading branch; the other branches, and
    further evaluations of the step, follow, so that the result does not depend on how branches are run.

    Attributes:
        memory: tensors that later decisions need, for a run that is continued elsewhere.
    """

    @property
    def memory(self) -> dict[str, Tensor]: ...

    def may_skip(self, index: int) -> bool:
        """Whether step `index` could be left out at all; what the step before changed is kept only then."""
        ...

    def skips(self, lead: Lead, info: StepInfo) -> bool:
        """Whether to leave out the blocks of this step; the first ones may be run to see, in each step as many."""
        ...

    def computed(self, tokens: Tensor, info: StepInfo) -> None:
        """Learn what the blocks made of them in a step that ran."""
        ...


@dataclass(frozen=True)
class _Decision:
    """Whether the blocks after the first `looked_at` are left out in `step`."""

    step: int
    skips: bool
    looked_at: int


class CachedBlocks:
    """A block runner that adds again what the last computed step changed, wherever `rule` leaves a step out.

    VACE blocks run inside of the others and are left out with them. What a step changed, after the blocks that the rule
    ran, is kept per (branch, window) and evaluation in `dtype`, on the CPU if asked; it belongs to this object, that is
    to one run.
    """

    def __init__(self, run: BlockRunner, rule: SkipRule, dtype: torch.dtype, *, on_cpu: bool = False) -> None:
        self._run, self._rule = run, rule
        self._dtype, self._on_cpu = dtype, on_cpu
        self.count = run.count
        self._residuals: dict[str, Tensor] = {}
        self._decisions: dict[int, _Decision] = {}

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

    def __call__(
        self, states: Sequence[TokenState], keys: Sequence[Key], info: StepInfo, blocks: range | None = None
    ) -> None:
        assert blocks is None, "a cache decides about all blocks"
        further = f".{info.evaluation}" if info.evaluation else ""
        names = [[f"{branch}.{window}{further}" for branch in branches_of(name)] for name, window in keys]
        lead = Lead(self._run, states, keys, info, len(names[0]))
        decision = self._decisions.get(info.window)
        is_lead = decision is None or decision.step != info.index
        if decision is None or is_lead:
            known = all(name in self._residuals for name in names[0])
            skips = self._rule.skips(lead, info) and known
            decision = self._decisions[info.window] = _Decision(info.index, skips, lead.done)
        lead.run(decision.looked_at)
        if decision.skips and all(name in self._residuals for group in names for name in group):
            for state, group in zip(states, names, strict=True):
                state.tokens = add_(state.tokens, self._recalled(group, state.tokens))
            return
        for name in (name for group in names for name in group):
            # Out of date from here on; dropped before the blocks need room.
            self._residuals.pop(name, None)
        keep = info.index + 1 < info.total and self._rule.may_skip(info.index + 1)
        before = [state.tokens.clone() if keep else None for state in states]
        self._run(states, keys, info, range(lead.done, self.count))
        if is_lead:
            self._rule.computed(lead.tokens, info)
        for state, group, old in zip(states, names, before, strict=True):
            self._keep(group, None if old is None else torch.sub(state.tokens, old, out=old))

    def _keep(self, names: Sequence[str], residual: Tensor | None) -> None:
        if residual is not None:
            residual = residual.to("cpu" if self._on_cpu else residual.device, self._dtype)
            self._residuals.update(zip(names, residual.chunk(len(names)), strict=True))

    def _recalled(self, names: Sequence[str], tokens: Tensor) -> Tensor:
        found = [self._residuals[name].to(tokens.device) for name in names]
        return found[0] if len(found) == 1 else torch.cat(found)


COEFFICIENTS: dict[str, tuple[float, ...]] = {
    "Wan2.1-T2V-1.3B": (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
    "Wan2.1-T2V-14B": (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
    "Wan2.1-I2V-14B-480P": (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
    "Wan2.1-I2V-14B-720P": (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02),
}
"""Polynomials, highest power first, from the change of the time embedding to that of the model's output, fitted by the
authors of TeaCache (ali-vilab/TeaCache TeaCache4Wan2.1)."""

SKIPPED_STEP_COST = 0.01
"""What a step without blocks costs, as a part of one with them: embedding and head only."""


def changes(modulations: Tensor) -> list[float]:
    """How much each of N time modulations (N, ...) differs from the one before it, relative to that one: N - 1 numbers.

    Waits for the device, once.
    """
    flat = modulations.float().flatten(1)
    return ((flat[1:] - flat[:-1]).abs().mean(1) / flat[:-1].abs().mean(1)).tolist()


@dataclass
class OnlineRule:
    """The published rule, one step after the other: a step is left out while the estimated change since the last
    computed one adds up to less than the threshold.

    Attributes:
        total: number of steps; the first and the last are always computed, and so are those in `forced`.
    """

    coefficients: Sequence[float]
    threshold: float
    total: int
    forced: Container[int] = ()
    accumulated: float = 0.0

    def skips(self, index: int, change: float) -> bool:
        """Whether to leave out step `index`, whose modulation differs by `change` from the one before."""
        if index in (0, self.total - 1) or index in self.forced or self.threshold == 0:
            self.accumulated = 0.0
            return False
        self.accumulated += _polynomial(self.coefficients, change)
        if self.accumulated < self.threshold:
            return True
        self.accumulated = 0.0
        return False


def _polynomial(coefficients: Sequence[float], x: float) -> float:
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


@dataclass(frozen=True)
class SkipPlan:
    """Which steps are left out, decided before the first; a `SkipRule` that learns nothing."""

    skipped: tuple[bool, ...]
    threshold: float
    memory: dict[str, Tensor] = field(default_factory=dict, compare=False)

    @property
    def computed_steps(self) -> int:
        return self.skipped.count(False)

    @property
    def speedup(self) -> float:
        """How many times fewer block passes a run takes, the cheap steps counted too."""
        skipped = len(self.skipped) - self.computed_steps
        return len(self.skipped) / (self.computed_steps + SKIPPED_STEP_COST * skipped)

    def summary(self) -> str:
        """As a user reads it: "computes 21 of 50 steps, about 2.3x faster"."""
        return f"computes {self.computed_steps} of {len(self.skipped)} steps, about {self.speedup:.1f}x faster"

    def may_skip(self, index: int) -> bool:
        return self.skipped[index]

    def skips(self, lead: Lead, info: StepInfo) -> bool:
        return self.skipped[info.index]

    def computed(self, tokens: Tensor, info: StepInfo) -> None:
        pass


def plan(modulations: Tensor, settings: TeaCacheSettings, forced: Container[int] = ()) -> SkipPlan:
    """The steps to leave out of a run whose blocks are given the time modulations (N, ...).

    Args:
        forced: steps to compute whatever the rule says, besides the first, the last and the `start_step` first ones.

    Raises:
        ValueError: the template is still `auto`, or no threshold reaches the speed-up that was asked for.
    """
    if settings.template not in COEFFICIENTS:
        raise ValueError(f"TeaCache template must be one of {', '.join(COEFFICIENTS)}; got {settings.template!r}.")
    coefficients, steps = COEFFICIENTS[settings.template], len(modulations)
    differences = [0.0, *changes(modulations)]
    always = {index for index in range(steps) if index < settings.start_step or index in forced}

    def planned(threshold: float) -> SkipPlan:
        rule = OnlineRule(coefficients, threshold, steps, always)
        return SkipPlan(tuple(rule.skips(index, change) for index, change in enumerate(differences)), threshold)

    if settings.threshold is not None:
        return planned(settings.threshold)
    assert settings.speedup is not None, "the settings hold a threshold or a speed-up"
    return _fastest_enough(planned, [_polynomial(coefficients, change) for change in differences], settings.speedup)


def _fastest_enough(planned: Callable[[float], SkipPlan], estimates: Sequence[float], speedup: float) -> SkipPlan:
    """The plan of the lowest threshold that is `speedup` times as fast.

    A plan changes only where the threshold passes a sum of neighbouring estimates; the search halves the sorted sums.
    """
    sums = {0.0}
    for start in range(1, len(estimates)):
        total = 0.0
        for estimate in estimates[start:]:
            total += estimate
            sums.add(max(0.0, total))
    thresholds = sorted(sums)
    thresholds = [threshold * (1 + 1e-9) for threshold in thresholds]
    fastest = planned(thresholds[-1])
    if fastest.speedup < speedup:
        raise ValueError(
            f"TeaCache cannot make this run {speedup:g}x faster; leaving out every step that it may, it "
            f"{fastest.summary()}. Ask for less, or lower start_step."
        )
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        if planned(thresholds[middle]).speedup < speedup:
            low = middle + 1
        else:
            high = middle
    return planned(thresholds[low])


SAMPLE = 4096
"""About this many tokens are looked at, evenly spread; they tell the change of a sequence well enough."""


class EasyCache:
    """Leaves a step out while the estimated change of the blocks' output adds up to less than the threshold.

    The change is estimated as that of the input times the rate at which the blocks turned one into the other when they
    last ran. The first and last step are computed, and so are `start_step` first ones and those in `forced`. What it
    sees decides, so unlike a plan it waits for the device in every step. `memory` holds, per window: seen, the last
    input; given and made, input and output of the last computed step; rate and change, as numbers.
    """

    def __init__(self, settings: EasyCacheSettings, total: int, forced: Container[int] = ()) -> None:
        self._settings, self._total, self._forced = settings, total, forced
        self.memory: dict[str, Tensor] = {}

    def may_skip(self, index: int) -> bool:
        return max(1, self._settings.start_step) <= index < self._total - 1 and index not in self._forced

    def skips(self, lead: Lead, info: StepInfo) -> bool:
        sample, change, rate = _sample(lead.tokens), self._get("change", info), self._get("rate", info)
        seen, made = self._get("seen", info), self._get("made", info)
        self._set("seen", info, sample)
        if rate is None or seen is None or made is None or not self.may_skip(info.index):
            self._set("change", info, torch.zeros((), dtype=torch.float64))
            return False
        estimate = rate * _size(sample, seen) / _size(made)
        change = estimate if change is None else change + estimate
        skips = change.item() < self._settings.threshold
        self._set("change", info, change if skips else torch.zeros((), dtype=torch.float64))
        return skips

    def computed(self, tokens: Tensor, info: StepInfo) -> None:
        sample, given = _sample(tokens), self._get("seen", info)
        last_given, last_made = self._get("given", info), self._get("made", info)
        if given is None:
            raise RuntimeError("`computed` was called before `skips`, which keeps the tokens of the step.")
        if last_given is not None and last_made is not None:
            self._set("rate", info, _size(sample, last_made) / _size(given, last_given))
        self._set("given", info, given)
        self._set("made", info, sample)

    def _get(self, name: str, info: StepInfo) -> Tensor | None:
        return self.memory.get(f"{name}.{info.window}")

    def _set(self, name: str, info: StepInfo, value: Tensor) -> None:
        self.memory[f"{name}.{info.window}"] = value


def _sample(tokens: Tensor) -> Tensor:
    return tokens[:, :: max(1, tokens.shape[1] // SAMPLE)].clone()


def _size(x: Tensor, other: Tensor | None = None) -> Tensor:
    """The mean magnitude of `x`, or of its difference from `other`, as a float64 number on the CPU."""
    difference = x.float() if other is None else x.float() - other.float()
    return difference.abs().mean().cpu().double()
