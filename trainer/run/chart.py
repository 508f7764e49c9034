"""The loss of a run as one picture: over steps, raw and smoothed, with held-out points; and by timestep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from wan_core.atomic import replacing

SIZE = (960, 640)
MARGIN = (64, 28, 16, 36)
"""Pixels left, above, right and below each plot."""
SPLIT = 400
"""Height of the upper plot."""

BACKGROUND, AXIS, RAW, SMOOTH, HELD_OUT, BAR = "white", "#555555", "#c8c8c8", "black", "#1f5fd0", "#8fb08c"
BINS = 10
MEMORY = 0.95
"""Weight of what was before in the smoothed line."""


@dataclass(frozen=True)
class _Plot:
    """A rectangle of the picture that shows x and y in their ranges."""

    left: float
    top: float
    right: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def line(self, draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: str, width: int) -> None:
        if len(points) == 1:
            x, y = self.at(*points[0])
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
        draw.line([self.at(*point) for point in points], fill=colour, width=width)

    def axes(self, draw: ImageDraw.ImageDraw, title: str, x_label: str) -> None:
        font = ImageFont.load_default(12)
        draw.rectangle((self.left, self.top, self.right, self.bottom), outline=AXIS)
        draw.text((self.left, self.top - 18), title, fill=AXIS, font=font)
        for share in (0, 0.25, 0.5, 0.75, 1):
            y = self.y[0] + share * (self.y[1] - self.y[0])
            draw.text((self.left - 6, self.at(self.x[0], y)[1]), f"{y:.3g}", fill=AXIS, font=font, anchor="rm")
            x = self.x[0] + share * (self.x[1] - self.x[0])
            draw.text((self.at(x, self.y[0])[0], self.bottom + 12), f"{x:.0f}", fill=AXIS, font=font, anchor="mm")
        draw.text((self.right, self.bottom + 24), x_label, fill=AXIS, font=font, anchor="rm")


def draw_chart(steps: Sequence[Mapping[str, Any]], held_out: Sequence[tuple[int, float]] = ()) -> Image.Image:
    """The chart of `step` events (see `loop`) and of (step, loss) points on held-out clips."""
    image = Image.new("RGB", SIZE, BACKGROUND)
    draw = ImageDraw.Draw(image)
    raw = [(event["step"], event["loss"]) for event in steps if event.get("loss") is not None]
    if not raw:
        draw.text((SIZE[0] / 2, SIZE[1] / 2), "no steps yet", fill=AXIS, font=ImageFont.load_default(16), anchor="mm")
        return image
    left, above, right, below = MARGIN
    smooth = smoothed(raw)
    upper = _Plot(
        left, above, SIZE[0] - right, SPLIT - below,
        _span([x for x, _ in raw]), _span([0.0, *(y for _, y in (*raw, *held_out))]),
    )  # fmt: skip
    upper.axes(draw, "loss: grey each step, black smoothed, blue on held-out clips", "step")
    upper.line(draw, raw, RAW, 1)
    upper.line(draw, smooth, SMOOTH, 2)
    for point in held_out:
        upper.line(draw, [point], HELD_OUT, 2)
    upper.line(draw, held_out, HELD_OUT, 2)
    _draw_bins(draw, by_timestep(steps))
    return image


def save_chart(file: Path, steps: Sequence[Mapping[str, Any]], held_out: Sequence[tuple[int, float]] = ()) -> Path:
    """Write the chart to `file` as PNG; it is there whole or as before."""
    with replacing(file) as partial:
        draw_chart(steps, held_out).save(partial, "PNG")
    return file


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
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
                found[min(int(timestep / 1000 * BINS), BINS - 1)].append(error)
    return [sum(errors) / len(errors) if errors else None for errors in found]


def _draw_bins(draw: ImageDraw.ImageDraw, means: Sequence[float | None]) -> None:
    left, above, right, below = MARGIN
    known = [0.0, *(mean for mean in means if mean is not None)]
    plot = _Plot(left, SPLIT + above, SIZE[0] - right, SIZE[1] - below, (0, 1000), _span(known))
    for index, mean in enumerate(means):
        if mean is not None:
            start, top = plot.at(index * 1000 / BINS, mean)
            end, bottom = plot.at((index + 1) * 1000 / BINS, 0)
            draw.rectangle((start + 2, top, end - 2, bottom), fill=BAR)
    plot.axes(draw, "mean squared error of the velocity by timestep, without weights", "timestep")


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The range of `values`, widened when they are all the same."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low, low + 1)
