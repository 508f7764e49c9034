"""Which steps each cache skips: TeaCache (Liu et al. 2024) and MagCache (Ma et al. 2025) by a plan, EasyCache (Zhou et
al. 2025) and the first-block cache (DBCache of vipshop/cache-dit) by what they see during the run.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from math import ceil

import torch
from torch import Tensor

from ..cache_settings import EasyCacheSettings, FirstBlockSettings, MagCacheSettings, TeaCacheSettings
from ..checks import check_choice
from ..models.dit import TokenState
from ..types import StepInfo
from .cache_tables import MAGNITUDE_RATIOS, TEACACHE_COEFFICIENTS, WHOLE_FIRST_EXPERT
from .predictor import BlockRunner, Key, branches_of
from .step_cache import SAMPLE, Lead, SkipPlan


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


def teacache_plan(modulations: Tensor, settings: TeaCacheSettings, forced: Container[int] = ()) -> SkipPlan:
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
    # The smallest one skips where estimates are negative, as coefficients of another model can make them; 0 is off.
    sums = {0.0, 1e-9}
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


def spread_over(ratios: Sequence[float], steps: int) -> list[float]:
    """The magnitude ratio of each of `steps` steps, from `ratios`, which begin with the second step of any number of
    steps: the nearest one, as the authors of MagCache take it. That of the first step is 1.
    """
    known = (1.0, *ratios)
    if steps == 1:
        return [known[-1]]
    scale = (len(known) - 1) / (steps - 1)
    return [known[round(index * scale)] for index in range(steps)]


def magcache_plan(settings: MagCacheSettings, shares: Sequence[range], forced: Container[int] = ()) -> SkipPlan:
    """The steps to skip in a run whose experts take the steps of `shares`, one after the other.

    A step is skipped while the product of the ratios since the last computed step, the expected magnitude of what is
    added again, differs from 1 by errors that add up to less than the threshold. The first `retention` of each expert's
    steps are computed, and of a second expert one more; templates of `WHOLE_FIRST_EXPERT` have their own rule.

    Args:
        forced: steps that are always computed besides.

    Raises:
        ValueError: the settings neither name a template nor hold ratios.
    """
    ratios = settings.ratios
    if ratios is None:
        check_choice("MagCache template", settings.template, MAGNITUDE_RATIOS)
        ratios = MAGNITUDE_RATIOS[settings.template]
    steps = shares[-1].stop
    always: set[int] = set()
    for number, share in enumerate(shares):
        # The authors count calls, of which guidance makes two a step.
        kept = ceil(int(2 * len(share) * settings.retention) / 2)
        if len(shares) > 1 and settings.template in WHOLE_FIRST_EXPERT:
            kept = kept if number else len(share)
        elif number:
            kept = int(len(share) * settings.retention) + 1
        always.update(share[: max(1, kept)])
    skipped, product, error, count = [], 1.0, 0.0, 0
    for index, ratio in enumerate(spread_over(ratios, steps)):
        if index in always:
            # The authors leave the sums as they are here, so those of a first expert are not forgotten by the second.
            skipped.append(False)
            continue
        product *= ratio
        error += abs(1 - product)
        count += 1
        skipped.append(error < settings.threshold and count <= settings.max_skips and index not in forced)
        if not skipped[-1]:
            product, error, count = 1.0, 0.0, 0
    return SkipPlan(tuple(skipped), settings.threshold)


@dataclass
class Magnitudes:
    """What `MeasuredBlocks` measures in a run, whose experts may change.

    Attributes:
        memory: `norms` (B, S), of what the last step added to each token; `ratios` (N,), NaN where not measured.
    """

    memory: dict[str, Tensor] = field(default_factory=dict)


class MeasuredBlocks:
    """A block runner that measures MagCache's ratios: of each step how large what the blocks add to the tokens is, over
    that of the step before; the mean over the tokens of the first branch, in the first window.
    """

    def __init__(self, run: BlockRunner, magnitudes: Magnitudes) -> None:
        self._run, self._magnitudes = run, magnitudes
        self.count = run.count
        self._measured = -1

    def __call__(
        self, states: Sequence[TokenState], keys: Sequence[Key], info: StepInfo, blocks: range | None = None
    ) -> None:
        if not states or info.window or info.evaluation or self._measured == info.index:
            self._run(states, keys, info, blocks)
            return
        self._measured = info.index
        branches = len(branches_of(keys[0][0]))
        before = states[0].tokens.chunk(branches)[0].clone()
        self._run(states, keys, info, blocks)
        pieces = zip(states[0].tokens.chunk(branches)[0].split(SAMPLE, 1), before.split(SAMPLE, 1), strict=True)
        memory = self._magnitudes.memory
        norms = torch.cat([(after.float() - old.float()).norm(dim=-1) for after, old in pieces], 1)
        part = states[0].prepared.context.part
        norms = norms if part is None else part.whole(norms, "samples")
        ratios = memory.setdefault("ratios", torch.full((info.total,), torch.nan, dtype=torch.float64))
        if info.index and "norms" in memory:
            ratios[info.index] = (norms / memory["norms"]).mean().cpu()
        memory["norms"] = norms


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
        sample, change, rate = lead.sample(), self._get("change", info), self._get("rate", info)
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

    def computed(self, lead: Lead, info: StepInfo) -> None:
        last_input, output = self._get("last_input", info), lead.sample()
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


class FirstBlock:
    """Skips the blocks after the first `blocks` ones while these change the tokens as they did in the last computed
    step: by less than the threshold, relative to the change then (mean magnitudes, as in DBCache).

    The first `start_step` steps are computed, and so are those in `forced`. Like EasyCache it waits for the device in
    every step.

    `memory`, per window: `change`, what the first blocks added in the last computed step; `skipped`, how many steps in
    a row were.
    """

    def __init__(self, settings: FirstBlockSettings, total: int, forced: Container[int] = ()) -> None:
        self._settings, self._total, self._forced = settings, total, forced
        self.memory: dict[str, Tensor] = {}

    def may_skip(self, index: int) -> bool:
        return max(1, self._settings.start_step) <= index < self._total and index not in self._forced

    def skips(self, lead: Lead, info: StepInfo) -> bool:
        before = lead.sample()
        lead.run(self._settings.blocks)
        change, most = lead.sample() - before, self._settings.max_skips
        last = self.memory.get(f"change.{info.window}")
        row = int(self.memory.get(f"skipped.{info.window}", 0))
        may = self.may_skip(info.index) and (most == 0 or row < most)
        skips = may and last is not None and bool(_size(last, change) < self._settings.threshold * _size(last))
        if not skips:
            self.memory[f"change.{info.window}"] = change
        self.memory[f"skipped.{info.window}"] = torch.tensor(row + 1 if skips else 0)
        return skips

    def computed(self, lead: Lead, info: StepInfo) -> None:
        pass


def _size(x: Tensor, other: Tensor | None = None) -> Tensor:
    """The mean magnitude of `x`, or of its difference from `other`, as a float64 number on the CPU."""
    difference = x.float() if other is None else x.float() - other.float()
    return difference.abs().mean().cpu().double()
