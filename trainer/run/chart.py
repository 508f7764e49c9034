"""The loss of a run as one picture: over steps, raw and smoothed, with held-out points; and by timestep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from wan_core.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE, DPI = (960, 640), 100
"""Pixels, and how many of them are an inch."""

MARGINS = {"left": 0.07, "right": 0.98, "top": 0.95, "bottom": 0.08, "hspace": 0.3}
"""Shares of the picture, and the gap between the plots as a share of their height."""

RAW, SMOOTH, HELD_OUT, BAR = "#c8c8c8", "black", "#1f5fd0", "#8fb08c"
BINS = 10
LAST_STEP = 1000
"""The timestep of pure noise."""
MEMORY = 0.95
"""Weight of what was before in the smoothed line."""


def draw_chart(steps: Sequence[Mapping[str, Any]], held_out: Sequence[tuple[int, float]] = ()) -> Image.Image:
    """The chart of `step` events (see `run.events`) and of (step, loss) points on held-out clips."""
    # Imported where a chart is drawn, because it takes half a second; without pyplot, whose figures are global.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((SIZE[0] / DPI, SIZE[1] / DPI), DPI)
    canvas = FigureCanvasAgg(figure)
    raw = [(event["step"], event["loss"]) for event in steps if event.get("loss") is not None]
    if raw:
        upper, lower = figure.subplots(2, height_ratios=(3, 2), gridspec_kw=MARGINS)
        _draw_losses(upper, raw, held_out)
        _draw_bins(lower, by_timestep(steps))
    else:
        figure.text(0.5, 0.5, "no steps yet", ha="center", va="center")
    canvas.draw()
    return Image.frombuffer("RGBA", SIZE, canvas.buffer_rgba()).convert("RGB")


def save_chart(file: Path, steps: Sequence[Mapping[str, Any]], held_out: Sequence[tuple[int, float]] = ()) -> Path:
    """Write the chart to `file` as PNG; it is there whole or as before."""
    with replacing(file) as partial:
        draw_chart(steps, held_out).save(partial, "PNG")
    return file


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The running mean of `points`, in which a step counts less the longer ago it was, without a bias at the start."""
    mean = weight = 0.0
    line = []
    for x, y in points:
        mean, weight = MEMORY * mean + (1 - MEMORY) * y, MEMORY * weight + (1 - MEMORY)
        line.append((x, mean / weight))
    return line


def by_timestep(steps: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """The mean unweighted error of the samples whose timestep lies in each of `BINS` equal parts of 0 to 1000."""
    found: list[list[float]] = [[] for _ in range(BINS)]
    for event in steps:
        for timestep, error in zip(event.get("timesteps", ()), event.get("errors", ()), strict=False):
            if error is not None:
                found[min(int(timestep / LAST_STEP * BINS), BINS - 1)].append(error)
    return [sum(errors) / len(errors) if errors else None for errors in found]


def _draw_losses(axes: "Axes", raw: Sequence[tuple[float, float]], held_out: Sequence[tuple[int, float]]) -> None:
    # A line of one point is drawn as a dot: only markers show those.
    for points, colour, width, dotted in (
        (raw, RAW, 1, len(raw) == 1),
        (smooth(raw), SMOOTH, 2, len(raw) == 1),
        (held_out, HELD_OUT, 2, True),
    ):
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, marker="o" if dotted else "", markersize=4)
    axes.set_title("loss: grey each step, black smoothed, blue on held-out clips", fontsize="medium", loc="left")
    axes.set_xlabel("step")
    axes.set_ylim(bottom=min(0.0, *(loss for _, loss in (*raw, *held_out))))


def _draw_bins(axes: "Axes", means: Sequence[float | None]) -> None:
    width = LAST_STEP / BINS
    known = [((index + 0.5) * width, mean) for index, mean in enumerate(means) if mean is not None]
    axes.bar([x for x, _ in known], [mean for _, mean in known], 0.95 * width, color=BAR)
    axes.set_title("mean squared error of the velocity by timestep, without weights", fontsize="medium", loc="left")
    axes.set_xlabel("timestep")
    axes.set_xlim(0, LAST_STEP)
