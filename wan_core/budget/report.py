"""A plan in words, and as plain data."""

from collections.abc import Mapping
from typing import Any

from ..memory.device import GIB
from .fit import Fit
from .whole import Phase, WholePlan

COLUMNS = ("phase", "peak", "weights stay", "streamed", "copied", "hidden", "")


def text_of(fit: Fit) -> str:
    """The plan as a table with a verdict."""
    plan = fit.plan
    rows = [COLUMNS, *(_row(phase) for phase in plan.phases)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    verdict = f"{plan.job.name}, {plan.job.size}: {_verdict(plan)}"
    return "\n".join([verdict, "", *table, "", *_memory(plan), *_settings(fit)])


def data_of(fit: Fit) -> dict[str, Any]:
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
        "phases": [vars(phase) for phase in plan.phases],
        "ram": dict(plan.ram),
        "files": dict(plan.files),
        "changes": list(fit.changes),
        "helps": list(fit.helps),
    }


def gigabytes(size: float) -> str:
    return f"{size / GIB:.1f} GB"


def _row(phase: Phase) -> tuple[str, ...]:
    per = "per step" if phase.name == "sampling" else "per pass"
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


def _verdict(plan: WholePlan) -> str:
    if plan.limit is None:
        return f"takes {gigabytes(plan.peak_bytes)} of card memory."
    if plan.fits:
        return f"fits, {gigabytes(plan.peak_bytes)} of {gigabytes(plan.limit)} of card memory."
    return f"does not fit, {gigabytes(plan.missing)} more than {gigabytes(plan.limit)} of card memory."


def _memory(plan: WholePlan) -> list[str]:
    lines = [f"Host memory: {gigabytes(plan.ram_bytes)} ({_listed(plan.ram)}), and about 1 GB for Python itself."]
    if plan.files:
        lines.append(
            f"Stays in files: {_listed(plan.files)}. A block is read when its turn comes; memory that is free serves "
            "as the system's cache of it."
        )
    return lines


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{what} {gigabytes(size)}" for what, size in sizes.items() if size >= 0.05 * GIB) or "little"


def _settings(fit: Fit) -> list[str]:
    lines = ["Changed to fit:", *(f"  - {change}" for change in fit.changes)] if fit.changes else []
    if fit.plan.fits:
        return lines
    if fit.helps:
        return [*lines, "What would help, each by itself:", *(f"  - {help}" for help in fit.helps)]
    return [*lines, "No smaller picture, shorter video or windows helps by itself; combine them, or use another card."]
