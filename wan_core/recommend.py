"""What is recommended for a run: the settings of a distilled LoRA or checkpoint, or those of the catalog's row."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from . import magnitudes
from .cache_settings import CacheSettings, FirstBlockSettings, MagCacheSettings, TeaCacheSettings
from .catalog import CatalogRow
from .distilled import FEW_STEPS, FewSteps, applied, named, recognise, with_motion
from .lora.apply import LoraUse
from .runtime import log
from .sampling.cache_tables import MAGNITUDE_RATIOS
from .sampling.experts import Expert
from .settings import SamplerSettings
from .types import Curve

OFF, AUTO = "off", "auto"
CHOICES = (OFF, AUTO, *(row.name for row in FEW_STEPS))


def few_steps_of(
    loras: Sequence[LoraUse], names: Sequence[str], metadata: Mapping[str, str] | None = None
) -> FewSteps | None:
    """The settings of the last distilled LoRA that is applied, else of a checkpoint of these `names` and `metadata`."""
    for use in reversed(loras):
        if use.bound.lora.few_steps is not None and any(use.strength.values):
            return use.bound.lora.few_steps
    return recognise(names, metadata)


def few_steps_for(choice: str, found: FewSteps | None) -> FewSteps | None:
    """The few-step settings that `choice` asks for, where those of the model are `found`.

    Raises:
        ValueError: there is no such choice.
    """
    return None if choice == OFF else found if choice == AUTO else named(choice)


def recommended_settings(
    choice: str,
    settings: SamplerSettings,
    few_steps: FewSteps | None,
    row: CatalogRow | None,
    name: str,
    more_motion: bool = False,
) -> SamplerSettings:
    """`settings` with the recommended steps, shift, cfg, solver and noise levels, as `VideoModel.recommended` says.

    Args:
        few_steps: what `few_steps_for` gives; it comes before `row`.
        name: of the model, for messages.

    Raises:
        ValueError: nothing is known to recommend, or `more_motion` has no few-step settings to change.
    """
    known = ", ".join(each.name for each in FEW_STEPS)
    if more_motion and few_steps is None:
        raise ValueError(
            f"more_motion changes the recommended settings of few-step weights, but none are chosen, or known for "
            f"{name}. Set recommended to auto with a distilled LoRA or checkpoint, or to one of {known}."
        )
    if few_steps is not None:
        settings = applied(few_steps, settings)
        settings = with_motion(settings) if more_motion else settings
        log.info("%s: %s%s.", name, few_steps.summary, ", changed for more motion" if more_motion else "")
        return settings
    if choice == OFF:
        return settings
    if row is None:
        raise ValueError(
            f"No settings are recommended for {name}, by its name or its LoRAs; set recommended to off and choose them "
            f"yourself, or to one of {known}."
        )
    preset = row.preset
    guidance = replace(settings.guidance, scale=preset.cfg, scale_low=preset.cfg_low, start=0.0, end=1.0)
    log.info("%s: recommended settings of %s.", name, row.model_id)
    return replace(
        settings, steps=preset.steps, shift=preset.shift, solver=preset.solver, guidance=guidance, sigmas=None
    )


def after_first_step(expert: Expert, total: int) -> Expert:
    """The expert of a run of `total` steps without its distilled LoRAs in the first, but for those whose strength
    changes over the steps already.
    """
    start = 0.5 / max(1, total - 1)
    loras = tuple(
        replace(use, strength=Curve(use.strength.values[:1], start, 1.0, 0.0))
        if use.bound.lora.few_steps is not None and use.constant
        else use
        for use in expert.loras
    )
    return replace(expert, loras=loras)


def resolved_cache(
    cache: CacheSettings | None, row: CatalogRow | None, files: Sequence[Path], name: str, layers: int
) -> CacheSettings | None:
    """`cache` with the numbers of a model where it says `auto`; arguments as `VideoModel` has them.

    Raises:
        ValueError: none are known of this model, it has too few blocks, or what is measured cannot be kept.
    """
    match cache:
        case TeaCacheSettings():
            return cache.with_template(row.preset.teacache if row else None)
        case MagCacheSettings(measures=True):
            magnitudes.place(files, name)
        case MagCacheSettings():
            names = ((row.base or row.model_id).partition("/")[2], row.size) if row else ()
            published = next((name for name in names if name in MAGNITUDE_RATIOS), None)
            return cache.with_ratios(magnitudes.measured(files), published)
        case FirstBlockSettings(blocks=blocks) if blocks >= layers:
            raise ValueError(
                f"The first-block cache must leave blocks to skip: {name} has {layers}, and {blocks} are to run in "
                "every step."
            )
    return cache
