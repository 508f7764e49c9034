"""Step caches, which skip the blocks of a step and add again what they changed in an earlier one: TeaCache (Liu et al.
2024) and EasyCache (Zhou et al. 2025).
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..cache_settings import EasyCacheSettings, TeaCacheSettings
from ..checks import check_choice
from ..models.dit import TokenState
from ..models.ops import add_
from ..types import StepInfo
from .cache_tables import TEACACHE_COEFFICIENTS
from .predictor import BlockRunner, Key, branches_of


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

    @property
    def tokens(self) -> Tensor:
        """(B, S, D), as they are now. Blocks write into them, so clone them to compare them later."""
        return self._states[0].tokens.chunk(self._branches)[0]

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

    def computed(self, tokens: Tensor, info: StepInfo) -> None:
        """Called with the lead's tokens after the blocks of a step that is not skipped."""
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
    run. VACE blocks run within the others and are skipped with them.
    """

    def __init__(self, run: BlockRunner, rule: SkipRule, dtype: torch.dtype, *, on_cpu: bool = False) -> None:
        self._run, self._rule = run, rule
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
        lead = Lead(self._run, states, keys, info, len(names[0]))
        decision = self._decisions.get(info.window)
        # The first call of a step and window decides; calls for further branches and evaluations find the decision.
        is_lead = decision is None or decision.step != info.index
        if decision is None or is_lead:
            known = all(name in self._residuals for name in names[0])
            skips = self._rule.skips(lead, info) and known
            decision = self._decisions[info.window] = _Decision(info.index, skips, lead.done)
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
        if is_lead:
            self._rule.computed(lead.tokens, info)
        for state, group, old in zip(states, names, before, strict=True):
            if old is not None:
                residual = torch.sub(state.tokens, old, out=old)
                residual = residual.to("cpu" if self._on_cpu else residual.device, self._dtype)
                self._residuals.update(zip(group, residual.chunk(len(group)), strict=True))


SKIPPED_STEP_COST = 0.01
"""What a step without blocks costs, as a fraction of one with them: embedding and head only."""


def changes(modulations: Tensor) -> list[float]:
    """The relative L1 distance of each of N time modulations (N, ...) from the one before it: N - 1 numbers.

    Waits for the device, once.
    """
    flat = modulations.float().flatten(1)
    return ((flat[1:] - flat[:-1]).abs().mean(1) / flat[:-1].abs().mean(1)).tolist()


@dataclass
class OnlineRule:
    """TeaCache's published rule: a step is skipped while the estimated changes since the last computed one add up to
    less than the threshold.

    Attributes:
        total: number of steps; the first and the last are always computed, and so are those in `forced`.
    """

    coefficients: Sequence[float]
    threshold: float
    total: int
    forced: Container[int] = ()
    accumulated: float = 0.0

    def skips(self, index: int, change: float) -> bool:
        """Whether to skip step `index`, whose modulation differs by `change` from the one before."""
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

    def computed(self, tokens: Tensor, info: StepInfo) -> None:
        pass


def plan(modulations: Tensor, settings: TeaCacheSettings, forced: Container[int] = ()) -> SkipPlan:
    """The steps to skip in a run of N steps, whose time modulations are (N, ...).

    Args:
        forced: steps that are always computed, besides the first, the last and the first `start_step` ones.

    Raises:
        ValueError: the template is still `auto`, or no threshold reaches the speed-up of the settings.
    """
    check_choice("TeaCache template", settings.template, TEACACHE_COEFFICIENTS)
    coefficients, steps = TEACACHE_COEFFICIENTS[settings.template], len(modulations)
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
    """The plan of the lowest threshold that is `speedup` times as fast, by bisection."""
    # A plan changes only where the threshold passes a sum of consecutive estimates, so these sums are all candidates.
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
            f"TeaCache cannot make this run {speedup:g}x faster; skipping every step that it may, it "
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
"""About so many tokens, evenly spread, stand for a sequence when its change is measured."""


class EasyCache:
    """Skips a step while the estimated relative changes of the blocks' output add up to less than the threshold.

    The change of the output is estimated as that of the input times the rate output / input of the last computed steps.
    The first and the last step, the first `start_step` ones and those in `forced` are always computed. It reads tokens
    in every step, and therefore waits for the device in every step.

    `memory`, per window: `last_input`, of the last step; `input` and `output`, of the last computed step; `rate` and
    `change`, as numbers.
    """

    def __init__(self, settings: EasyCacheSettings, total: int, forced: Container[int] = ()) -> None:
        self._settings, self._total, self._forced = settings, total, forced
        self.memory: dict[str, Tensor] = {}

    def may_skip(self, index: int) -> bool:
        return max(1, self._settings.start_step) <= index < self._total - 1 and index not in self._forced

    def skips(self, lead: Lead, info: StepInfo) -> bool:
        sample, change, rate = _sample(lead.tokens), self._get("change", info), self._get("rate", info)
        last_input, output = self._get("last_input", info), self._get("output", info)
        self._set("last_input", info, sample)
        if rate is None or last_input is None or output is None or not self.may_skip(info.index):
            self._set("change", info, torch.zeros((), dtype=torch.float64))
            return False
        estimate = rate * _size(sample, last_input) / _size(output)
        change = estimate if change is None else change + estimate
        skips = change.item() < self._settings.threshold
        self._set("change", info, change if skips else torch.zeros((), dtype=torch.float64))
        return skips

    def computed(self, tokens: Tensor, info: StepInfo) -> None:
        last_input, output = self._get("last_input", info), _sample(tokens)
        old_input, old_output = self._get("input", info), self._get("output", info)
        if last_input is None:
            raise RuntimeError("`computed` was called before `skips`, which keeps the tokens of the step.")
        if old_input is not None and old_output is not None:
            self._set("rate", info, _size(output, old_output) / _size(last_input, old_input))
        self._set("input", info, last_input)
        self._set("output", info, output)

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
