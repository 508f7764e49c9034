"""Settings of the step caches, as frozen dataclasses, which check their values when they are made."""

import math
from dataclasses import dataclass, replace

from .checks import check_choice, check_number, check_whole
from .sampling.cache_tables import TEACACHE_COEFFICIENTS


@dataclass(frozen=True, kw_only=True)
class TeaCacheSettings:
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
class EasyCacheSettings:
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


CacheSettings = TeaCacheSettings | EasyCacheSettings
