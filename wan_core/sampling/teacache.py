"""TeaCache: which steps to leave out, told from the time embedding alone (Liu et al. 2024).

Everything it looks at is known before the first step, so its decisions are a plan that can be shown.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..settings import TeaCacheSettings
from ..types import StepInfo

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

    def skips(self, tokens: Tensor, info: StepInfo) -> bool:
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
