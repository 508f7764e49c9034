"""Settings of the step caches, as frozen dataclasses, which check their values when they are made."""

import math
from dataclasses import dataclass, replace
from typing import TypeVar

from .checks import check_choice, check_number, check_whole
from .sampling.cache_tables import MAGNITUDE_RATIOS, TEACACHE_COEFFICIENTS

AUTO, MEASURE = "auto", "measure"
MAGCACHE_TEMPLATES = (AUTO, MEASURE, *MAGNITUDE_RATIOS)
MOST_RATIOS = 10000
Cache = TypeVar("Cache", bound="WithPresets")


class WithPresets:
    """Settings of a cache that `CACHE_PRESETS` has presets of."""

    @classmethod
    def preset(cls: type[Cache], name: str) -> Cache:
        """The settings called "careful", "balanced" or "fast".

        Raises:
            ValueError: there is no preset of that name.
        """
        check_choice("cache preset", name, CACHE_PRESETS)
        return next(settings for settings in CACHE_PRESETS[name] if isinstance(settings, cls))


@dataclass(frozen=True, kw_only=True)
class TeaCacheSettings(WithPresets):
    """Steps are skipped by a plan that is made before the first one (TeaCache, Liu et al. 2024).

    Attributes:
        threshold: the blocks run again when the estimated changes add up to it; no upper bound; 0 skips nothing.
        speedup: in place of a threshold, find the one that makes the run so many times faster.
        template: a key of `TEACACHE_COEFFICIENTS`, or `auto` for what the catalog recommends.
        start_step: so many first steps always run; the authors advise 5.
        residual_on_cpu: keep the residuals of steps in host memory.
    """

    threshold: float | None = 0.1
    speedup: float | None = None
    template: str = "auto"
    start_step: int = 0
    residual_on_cpu: bool = False

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.speedup is None):
            raise ValueError("TeaCache needs a threshold or a speed-up, and not both.")
        if self.threshold is not None:
            check_number("TeaCache threshold", self.threshold, low=0, high=math.inf)
        if self.speedup is not None:
            check_number("TeaCache speed-up", self.speedup, low=1, high=1000)
        check_choice("TeaCache template", self.template, ("auto", *TEACACHE_COEFFICIENTS))
        check_whole("TeaCache start_step", self.start_step, low=0, high=10000)

    def with_template(self, recommended: str | None) -> "TeaCacheSettings":
        """A copy in which `auto` is the template that the model's catalog row recommends.

        Raises:
            ValueError: the template is `auto` and none is recommended.
        """
        if self.template != "auto":
            return self
        if recommended is None:
            raise ValueError(
                "TeaCache has no coefficients for this model; choose the template of the most similar published one: "
                f"{', '.join(TEACACHE_COEFFICIENTS)}."
            )
        return replace(self, template=recommended)


@dataclass(frozen=True, kw_only=True)
class EasyCacheSettings(WithPresets):
    """Steps are skipped during the run, while the model's output changes at a steady rate (EasyCache, Zhou et al.
    2025). It needs no coefficients.

    Attributes:
        threshold: the blocks run again when the estimated changes, relative to the output, add up to it.
        start_step: so many first steps always run.
        residual_on_cpu: as for `TeaCacheSettings`.
    """

    threshold: float = 0.05
    start_step: int = 10
    residual_on_cpu: bool = False

    def __post_init__(self) -> None:
        check_number("EasyCache threshold", self.threshold, low=0, high=1000)
        check_whole("EasyCache start_step", self.start_step, low=0, high=10000)


@dataclass(frozen=True, kw_only=True)
class MagCacheSettings(WithPresets):
    """Steps are skipped by a plan that is made before the first one, from how the magnitude of what the blocks change
    falls from step to step (MagCache, Ma et al. 2025).

    Attributes:
        threshold: the most that the errors of skipped steps in a row may add up to; 0 skips nothing. The authors take
            0.12 to 0.24 for Wan 2.1, 0.06 for Wan 2.2 and 0.02 for VACE.
        max_skips: the most steps that are skipped in a row; the authors' K, from 2 to 6.
        retention: so many first steps always run, as a fraction of the run, or of those of each expert.
        template: a key of `MAGNITUDE_RATIOS`; `auto` for what was measured of the model, else what its catalog row
            recommends; `measure` to run all steps and measure.
        ratios: magnitude ratios from the second step on, in place of a template's.
        residual_on_cpu: as for `TeaCacheSettings`.
    """

    threshold: float = 0.12
    max_skips: int = 2
    retention: float = 0.2
    template: str = AUTO
    ratios: tuple[float, ...] | None = None
    residual_on_cpu: bool = False

    def __post_init__(self) -> None:
        check_number("MagCache threshold", self.threshold, low=0, high=1000)
        check_whole("MagCache max_skips", self.max_skips, low=1, high=10000)
        check_number("MagCache retention", self.retention, low=0, high=1)
        check_choice("MagCache template", self.template, MAGCACHE_TEMPLATES)
        if self.ratios is not None and not 2 <= len(self.ratios) < MOST_RATIOS:
            raise ValueError(f"MagCache needs from 2 to {MOST_RATIOS} ratios, one a step; got {len(self.ratios)}.")
        for ratio in self.ratios or ():
            check_number("A magnitude ratio", ratio, low=0, high=1000)

    @property
    def measures(self) -> bool:
        """Whether the run measures the ratios of the model, and skips nothing."""
        return self.template == MEASURE

    def with_ratios(self, measured: tuple[float, ...] | None, recommended: str | None) -> "MagCacheSettings":
        """A copy in which `auto` is what was `measured` of the model, else the template of its catalog row.

        Raises:
            ValueError: the template is `auto`, nothing was measured, and none is recommended.
        """
        if self.template != AUTO or self.ratios is not None:
            return self
        if measured is None and recommended is None:
            raise ValueError(
                "MagCache has no ratios for this model; measure them once (template 'measure', or headless run with "
                f"--measure), or choose the template of the most similar model: {', '.join(MAGNITUDE_RATIOS)}."
            )
        return replace(self, template=recommended or AUTO, ratios=measured)


@dataclass(frozen=True, kw_only=True)
class FirstBlockSettings(WithPresets):
    """The blocks after the first ones are skipped during the run, while the first ones change the tokens as in the last
    step that ran all (DBCache of vipshop/cache-dit). It needs no numbers of the model.

    Attributes:
        threshold: the largest relative difference of that change; 0 skips nothing.
        blocks: how many first blocks run in every step.
        start_step: so many first steps always run.
        max_skips: the most steps that are skipped in a row; 0 sets no limit.
        residual_on_cpu: as for `TeaCacheSettings`.
    """

    threshold: float = 0.08
    blocks: int = 1
    start_step: int = 8
    max_skips: int = 0
    residual_on_cpu: bool = False

    def __post_init__(self) -> None:
        check_number("First-block threshold", self.threshold, low=0, high=1000)
        check_whole("First-block blocks", self.blocks, low=1, high=1000)
        check_whole("First-block start_step", self.start_step, low=0, high=10000)
        check_whole("First-block max_skips", self.max_skips, low=0, high=10000)


CacheSettings = TeaCacheSettings | EasyCacheSettings | MagCacheSettings | FirstBlockSettings

CACHE_PRESETS: dict[str, tuple[CacheSettings, ...]] = {
    "careful": (
        TeaCacheSettings(threshold=None, speedup=1.4),
        EasyCacheSettings(threshold=0.05),
        MagCacheSettings(threshold=0.03, max_skips=1),
        FirstBlockSettings(threshold=0.05, max_skips=2),
    ),
    "balanced": (
        TeaCacheSettings(threshold=None, speedup=1.8),
        EasyCacheSettings(threshold=0.1),
        MagCacheSettings(threshold=0.06, max_skips=2),
        FirstBlockSettings(threshold=0.08, max_skips=2),
    ),
    "fast": (
        TeaCacheSettings(threshold=None, speedup=2.3),
        EasyCacheSettings(threshold=0.2),
        MagCacheSettings(threshold=0.12, max_skips=3),
        FirstBlockSettings(threshold=0.12, max_skips=3),
    ),
}
"""Settings of each cache, from the nearest to the full run to the fastest: at about 1.5, 2 and 2.5 times
the speed by the table of `python -m tests.benchmarks cache`.
"""
