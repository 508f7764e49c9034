"""The settings with which a run fits a device at the least cost, and the plan as text and as plain data."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..runtime import GIB, gigabytes
from ..settings import WindowSettings
from ..tiling import Tiles
from .encoders import VaePass
from .job import Job, Phase, WholePlan, plan_whole
from .run import RunPlan

WINDOW = WindowSettings()
SMALLER = (832, 480)
"""The smaller of the two sizes that the models were trained on."""


@dataclass(frozen=True)
class Variation:
    """A change to a run that takes less memory.

    Attributes:
        what: where the user makes it, in words.
        apply: gives the changed run, or None where it changes nothing.
    """

    what: str
    apply: Callable[[Job], Job | None]


def _cache_on_host(job: Job) -> Job | None:
    cache = job.settings.cache
    if cache is None or cache.residual_on_cpu:
        return None
    return _with(job, cache=replace(cache, residual_on_cpu=True))


def _sequential(job: Job) -> Job | None:
    guidance = job.settings.guidance
    if guidance.mode == "sequential" or guidance.branches == 1:
        return None
    return _with(job, guidance=replace(guidance, mode="sequential"))


def _model_quantised(job: Job) -> Job | None:
    experts = tuple(expert.quantised() or expert for expert in job.experts)
    return None if experts == job.experts else replace(job, experts=experts)


def _text_quantised(job: Job) -> Job | None:
    encoder = None if job.text_encoder is None else job.text_encoder.quantised()
    return None if encoder is None else replace(job, text_encoder=encoder)


def _tiles(job: Job) -> Job | None:
    automatic: dict[VaePass, Tiles] = {what: "auto" for what in job.tiles}
    return None if job.tiles == automatic else replace(job, tiles=automatic)


def _with(job: Job, **changes: Any) -> Job:
    return replace(job, settings=dataclasses.replace(job.settings, **changes))


VARIATIONS = (
    Variation("residual_on_cpu on the cache node: what a step changed waits in host memory", _cache_on_host),
    Variation("cfg_mode sequential: one branch of guidance after the other", _sequential),
    Variation("weights fp8 in Load Model: 8 bits for the big layers, slightly less exact", _model_quantised),
    Variation("weights fp8 in Load Text Encoder: 8 bits for the big layers, slightly less exact", _text_quantised),
    Variation("tiled off on the VAE nodes: tiles are then chosen to fit", _tiles),
)
"""Ways to take less memory, the one that costs least first."""


def _windowed(job: Job) -> Job | None:
    done = job.settings.windows is not None or job.size.latent.frames <= WINDOW.size
    return None if done else _with(job, windows=WINDOW)


def _shorter(job: Job) -> Job | None:
    latent = job.size.latent
    if latent.frames < 3:
        return None
    return replace(job, size=replace(latent, frames=(latent.frames + 1) // 2).video, cond=None)


def _smaller(job: Job) -> Job | None:
    width, height = sorted(SMALLER, reverse=job.size.width >= job.size.height)
    if width * height >= job.size.width * job.size.height:
        multiple = job.size.geometry.side_multiple
        width, height = (side // 2 // multiple * multiple for side in (job.size.width, job.size.height))
    return None if not width * height else replace(job, size=replace(job.size, width=width, height=height), cond=None)


SUGGESTIONS = (
    Variation(f"windows of {WINDOW.size} latent frames", _windowed),
    Variation("half as many frames", _shorter),
    Variation("a smaller picture", _smaller),
)
"""Changes of the video itself, suggested where no variation is enough."""


@dataclass(frozen=True)
class FittedPlan:
    """The plan with the settings that were found.

    Attributes:
        plan: of the run with them; when it does not fit, the one that is closest.
        changes: what was changed, in words.
        suggestions: changes of the video that would make it fit, in words; empty when it fits, or when none does alone.
    """

    plan: WholePlan
    changes: tuple[str, ...] = ()
    suggestions: tuple[str, ...] = ()


def fit_plan(job: Job, limit: float | None) -> FittedPlan:
    """`job` changed as little as it takes to run in `limit` bytes of the device."""
    changes: list[str] = []
    plan = plan_whole(job, limit)
    while not plan.fits:
        # The first variation that helps costs the least; others are tried only if it is not enough.
        found = next(_better(plan), None)
        if found is None:
            return FittedPlan(plan, tuple(changes), suggestions(plan))
        plan, what = found
        changes.append(what)
    return FittedPlan(plan, tuple(changes))


def _better(plan: WholePlan) -> Iterator[tuple[WholePlan, str]]:
    """Plans with one variation that lack less than `plan`, and what that changes."""
    for variation in VARIATIONS:
        changed = variation.apply(plan.job)
        other = changed and plan_whole(changed, plan.limit)
        if other and _short(other) < _short(plan):
            yield other, variation.what


def suggestions(plan: WholePlan) -> tuple[str, ...]:
    """Changes of the video, each of which alone makes a run fit that does not."""
    found = []
    for variation in SUGGESTIONS:
        changed = variation.apply(plan.job)
        if changed is None:
            continue
        other = plan_whole(changed, plan.limit)
        if other.fits:
            resized = "" if changed.size == plan.job.size else f" ({changed.size})"
            found.append(f"{variation.what}{resized}: {gigabytes(other.peak_bytes)}")
    return tuple(found)


def _short(plan: WholePlan) -> int:
    """Bytes that all phases together lack."""
    return sum(phase.missing for phase in plan.phases)


COLUMNS = ("phase", "peak", "weights stay", "streamed", "copied", "hidden", "")


def text_of(fit: FittedPlan) -> str:
    """The plan as a table with a verdict."""
    plan = fit.plan
    rows = [COLUMNS, *(_row(phase) for phase in plan.phases)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    takes = gigabytes(plan.peak_bytes)
    if plan.limit is None:
        verdict = f"takes {takes} of card memory."
    elif plan.fits:
        verdict = f"fits, {takes} of {gigabytes(plan.limit)} of card memory."
    else:
        verdict = f"does not fit, {gigabytes(plan.missing)} more than {gigabytes(plan.limit)} of card memory."
    memory = [f"Host memory: {gigabytes(plan.ram_bytes)} ({_listed(plan.ram)}), and about 1 GB for Python itself."]
    if plan.files:
        memory.append(
            f"Stays in files: {_listed(plan.files)}. A block is read when its turn comes; free memory serves as the "
            "system's cache of it."
        )
    memory += [_shared(run) for run in plan.sampling if run.layout.ranks > 1]
    title = f"{plan.job.name}, {plan.job.size}: {verdict}"
    return "\n".join([title, "", *table, "", *memory, *_settings(fit)])


def data_of(fit: FittedPlan) -> dict[str, Any]:
    """The plan as JSON holds it; sizes in bytes."""
    plan = fit.plan
    return {
        "model": plan.job.name,
        "width": plan.job.size.width,
        "height": plan.job.size.height,
        "num_frames": plan.job.size.num_frames,
        "limit": plan.limit,
        "fits": plan.fits,
        "missing": plan.missing,
        "peak_vram": plan.peak_bytes,
        "peak_ram": plan.ram_bytes,
        "ranks": plan.job.ranks,
        "layouts": [str(run.layout) for run in plan.sampling],
        "sent_per_step": [run.sent for run in plan.sampling],
        "phases": [vars(phase) for phase in plan.phases],
        "ram": dict(plan.ram),
        "files": dict(plan.files),
        "changes": list(fit.changes),
        "helps": list(fit.suggestions),
    }


LINKS = {"NVLink": 200e9, "PCIe 4": 25e9}
"""Bytes that a card sends in a second over each, as a rule."""


def _shared(run: RunPlan) -> str:
    """How ranks share the steps of a run, and what that costs."""
    times = [f"{run.sent / speed:.2g} s over {name}" for name, speed in LINKS.items()]
    return (
        f"Shared by {run.layout.ranks} cards, {run.layout}: each computes {1 / run.layout.ranks:.0%} of a step and "
        f"sends {gigabytes(run.sent)}, {', '.join(times)}. Sizes are those of the first card."
    )


def _row(phase: Phase) -> tuple[str, ...]:
    per = "per step" if phase.name.startswith("sampling") else "per pass"
    streams = bool(phase.streamed_bytes)
    short = f"{gigabytes(phase.missing)} too much" if phase.missing else ""
    return (
        phase.name,
        gigabytes(phase.peak_bytes),
        gigabytes(phase.resident_bytes),
        gigabytes(phase.streamed_bytes) if streams else "-",
        f"{gigabytes(phase.copied_bytes)} {per}" if streams else "-",
        f"{phase.hidden:.0%}" if streams else "-",
        "; ".join(filter(None, (short, phase.note))),
    )


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{what} {gigabytes(size)}" for what, size in sizes.items() if size >= 0.05 * GIB) or "little"


def _settings(fit: FittedPlan) -> list[str]:
    lines = ["Changed to fit:", *(f"  - {change}" for change in fit.changes)] if fit.changes else []
    if fit.plan.fits:
        return lines
    if fit.suggestions:
        return [*lines, "What would help, each by itself:", *(f"  - {help}" for help in fit.suggestions)]
    return [*lines, "No smaller picture, shorter video or windows helps by itself; combine them, or use another card."]
