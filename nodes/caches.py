"""The step caches, each a frozen value for the sampler's socket `cache`."""

from dataclasses import replace
from typing import Any

from wan_core.cache_settings import (
    CACHE_PRESETS,
    MAGCACHE_TEMPLATES,
    CacheSettings,
    EasyCacheSettings,
    FirstBlockSettings,
    MagCacheSettings,
    TeaCacheSettings,
)
from wan_core.sampling.cache_tables import TEACACHE_COEFFICIENTS

from . import sockets
from .options import Options

CUSTOM = "custom"
_ON_CPU = sockets.flag(False, "Keep the cached residual in RAM: saves memory on the card.")


def _preset(default: str) -> Any:
    return sockets.choice(
        [CUSTOM, *CACHE_PRESETS],
        default,
        "How much to skip: careful stays nearest to the full run, fast skips most. custom uses the numbers of this "
        "node, any other choice replaces them.",
    )


class TeaCache(Options):
    """Steps skipped by a plan."""

    CATEGORY = "WanCore/speed and memory"
    DESCRIPTION = "Skip steps that change little, by a plan made before the first step (TeaCache). About 2x faster."
    RETURN_TYPES = (sockets.CACHE,)
    RETURN_NAMES = ("cache",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "threshold": sockets.number(
                    0.1, 0.0, 10.0, "Higher skips more steps. 1.3B: 0.05 to 0.1; 14B: 0.1 to 0.3. 0 is off.", step=0.01
                ),
            },
            "optional": {
                "speedup": sockets.number(
                    0.0,
                    0.0,
                    100.0,
                    "Above 1: the threshold that gives this speed-up is computed and used in place of threshold.",
                ),
                "template": sockets.choice(
                    ["auto", *TEACACHE_COEFFICIENTS],
                    "auto",
                    "The model whose coefficients are used; auto: those recommended for this model.",
                ),
                "start_step": sockets.whole(0, 0, 1000, "First steps that are never skipped; 5 is safer."),
                "residual_on_cpu": _ON_CPU,
                "preset": _preset("custom"),
            },
        }

    def build(
        self,
        threshold: float,
        speedup: float = 0.0,
        template: str = "auto",
        start_step: int = 0,
        residual_on_cpu: bool = False,
        preset: str = CUSTOM,
    ) -> tuple[CacheSettings]:
        if preset != CUSTOM:
            return (replace(TeaCacheSettings.preset(preset), template=template, residual_on_cpu=residual_on_cpu),)
        wanted = {"threshold": None, "speedup": speedup} if speedup else {"threshold": threshold}
        return (TeaCacheSettings(**wanted, template=template, start_step=start_step, residual_on_cpu=residual_on_cpu),)


class EasyCache(Options):
    """Steps skipped by a measure during the run."""

    CATEGORY = "WanCore/speed and memory"
    DESCRIPTION = "Skip steps that change little, as measured during the run (EasyCache). Works with any model."
    RETURN_TYPES = (sockets.CACHE,)
    RETURN_NAMES = ("cache",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "threshold": sockets.number(0.05, 0.0, 10.0, "Higher skips more steps; 0 is off.", step=0.01),
                "start_step": sockets.whole(10, 0, 1000, "First steps that are never skipped."),
            },
            "optional": {
                "residual_on_cpu": _ON_CPU,
                "preset": _preset("custom"),
            },
        }

    def build(
        self, threshold: float, start_step: int, residual_on_cpu: bool = False, preset: str = CUSTOM
    ) -> tuple[CacheSettings]:
        if preset != CUSTOM:
            return (replace(EasyCacheSettings.preset(preset), residual_on_cpu=residual_on_cpu),)
        return (EasyCacheSettings(threshold=threshold, start_step=start_step, residual_on_cpu=residual_on_cpu),)


class MagCache(Options):
    """Steps skipped by a plan from measured magnitudes."""

    CATEGORY = "WanCore/speed and memory"
    DESCRIPTION = (
        "Skip steps by a plan made before the first one, from how the changes shrink over the steps (MagCache). For "
        "models without published numbers, measure them once: choose the template measure for one run."
    )
    RETURN_TYPES = (sockets.CACHE,)
    RETURN_NAMES = ("cache",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"preset": _preset("balanced")},
            "optional": {
                "threshold": sockets.number(
                    0.12, 0.0, 10.0, "Higher skips more steps; 0 is off. Used with the preset custom.", step=0.01
                ),
                "max_skips": sockets.whole(2, 1, 1000, "The most steps skipped in a row. Used with the preset custom."),
                "retention": sockets.number(
                    0.2,
                    0.0,
                    1.0,
                    "First part of the run, never skipped. Used with the preset custom.",
                    step=0.05,
                ),
                "template": sockets.choice(
                    list(MAGCACHE_TEMPLATES),
                    "auto",
                    "The model whose magnitudes are used; auto: those measured of this model, else the published ones; "
                    "measure: skip nothing, and keep the magnitudes beside the model's file for later runs.",
                ),
                "residual_on_cpu": _ON_CPU,
            },
        }

    def build(
        self,
        preset: str,
        threshold: float = 0.12,
        max_skips: int = 2,
        retention: float = 0.2,
        template: str = "auto",
        residual_on_cpu: bool = False,
    ) -> tuple[CacheSettings]:
        settings = MagCacheSettings(threshold=threshold, max_skips=max_skips, retention=retention)
        chosen = settings if preset == CUSTOM else MagCacheSettings.preset(preset)
        return (replace(chosen, template=template, residual_on_cpu=residual_on_cpu),)


class FirstBlockCache(Options):
    """Blocks skipped by what the first ones do."""

    CATEGORY = "WanCore/speed and memory"
    DESCRIPTION = (
        "Run the first block in every step, and skip the others while it changes little (first-block cache, DBCache). "
        "Works with any model."
    )
    RETURN_TYPES = (sockets.CACHE,)
    RETURN_NAMES = ("cache",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"preset": _preset("balanced")},
            "optional": {
                "threshold": sockets.number(
                    0.08, 0.0, 10.0, "Higher skips more steps; 0 is off. Used with the preset custom.", step=0.01
                ),
                "first_blocks": sockets.whole(
                    1, 1, 1000, "How many blocks run in every step. Used with the preset custom."
                ),
                "start_step": sockets.whole(
                    8, 0, 1000, "First steps that are never skipped. Used with the preset custom."
                ),
                "max_skips": sockets.whole(
                    0, 0, 1000, "The most steps skipped in a row; 0: no limit. Used with the preset custom."
                ),
                "residual_on_cpu": _ON_CPU,
            },
        }

    def build(
        self,
        preset: str,
        threshold: float = 0.08,
        first_blocks: int = 1,
        start_step: int = 8,
        max_skips: int = 0,
        residual_on_cpu: bool = False,
    ) -> tuple[CacheSettings]:
        settings = FirstBlockSettings(
            threshold=threshold, blocks=first_blocks, start_step=start_step, max_skips=max_skips
        )
        chosen = settings if preset == CUSTOM else FirstBlockSettings.preset(preset)
        return (replace(chosen, residual_on_cpu=residual_on_cpu),)
