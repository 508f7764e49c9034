"""What changes over a film that should not: colour, sharpness and motion of its frames and clips, as numbers and as one
picture.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE, DPI = (960, 720), 100
"""Pixels, and how many of them are an inch."""

MARGINS = {"left": 0.08, "right": 0.98, "top": 0.95, "bottom": 0.07, "hspace": 0.45}
COLOURS, GREY, JOINT = ("#c03030", "#2f8f3f", "#1f5fd0"), "#303030", "#a0a0a0"

NEAR = 8
"""A joint is compared with so many steps of time before it and after it."""


@dataclass(frozen=True)
class FrameDrift:
    """The numbers of one frame, of values in [0, 1].

    Attributes:
        colour: means of red, green and blue.
        contrast: the standard deviation of brightness.
        sharpness: the mean step of brightness between neighbouring pixels.
        motion: the mean absolute difference from the frame before; NaN of the first one.
    """

    colour: tuple[float, float, float]
    contrast: float
    sharpness: float
    motion: float

    @property
    def mean(self) -> float:
        """The mean brightness."""
        return sum(self.colour) / len(self.colour)


@dataclass(frozen=True)
class ClipDrift:
    """The mean numbers of the frames `start` to `end` (exclusive); `motion` does not count the step into them."""

    start: int
    end: int
    colour: tuple[float, float, float]
    contrast: float
    sharpness: float
    motion: float

    def __str__(self) -> str:
        red, green, blue = self.colour
        return (
            f"frames {self.start}-{self.end - 1}: colour {red:.3f} {green:.3f} {blue:.3f}, contrast "
            f"{self.contrast:.3f}, sharpness {self.sharpness:.4f}, motion {self.motion:.4f}"
        )


@dataclass(frozen=True)
class Joint:
    """Where a clip begins.

    Attributes:
        frame: its first frame.
        motion: how far the step into it is from the steps near it: their ratio, 1 where it is like them.
        colour: the same of the change of the mean colour.
    """

    frame: int
    motion: float
    colour: float

    def __str__(self) -> str:
        return f"joint at frame {self.frame}: motion x{self.motion:.2f}, colour x{self.colour:.2f} of the steps near it"


@dataclass(frozen=True)
class Drift:
    """The numbers of a film's frames, and where its clips begin, without the first one."""

    frames: tuple[FrameDrift, ...]
    starts: tuple[int, ...] = ()

    @property
    def clips(self) -> list[ClipDrift]:
        """The means of each clip."""
        edges = [0, *self.starts, len(self.frames)]
        return [self._clip(start, end) for start, end in pairwise(edges)]

    def _clip(self, start: int, end: int) -> ClipDrift:
        frames = self.frames[start:end]

        def mean(values: Iterable[float]) -> float:
            found = list(values)
            return math.fsum(found) / len(found) if found else 0.0

        red, green, blue = (mean(frame.colour[channel] for frame in frames) for channel in range(3))
        return ClipDrift(
            start, end, (red, green, blue), mean(f.contrast for f in frames), mean(f.sharpness for f in frames),
            mean(f.motion for f in frames[1:]),
        )  # fmt: skip

    @property
    def joints(self) -> list[Joint]:
        """How visible each joint is."""
        motion = [frame.motion for frame in self.frames]
        change = [
            math.nan,
            *(math.dist(a.colour, b.colour) for a, b in pairwise(self.frames)),
        ]
        return [Joint(start, _against_near(motion, start), _against_near(change, start)) for start in self.starts]

    @property
    def report(self) -> str:
        """One line for each clip and each joint."""
        return "\n".join(map(str, (*self.clips, *self.joints)))


SMALLEST = 1 / 255
"""A step of colour that 8 bits hold; smaller ones near a joint count as this."""


def _against_near(steps: Sequence[float], place: int) -> float:
    """Step `place` of `steps` as a multiple of the median of those near it."""
    near = sorted([*steps[max(1, place - NEAR) : place], *steps[place + 1 : place + 1 + NEAR]])
    usual = near[len(near) // 2] if near else 0.0
    return max(steps[place], SMALLEST) / max(usual, SMALLEST)


def measure_drift(frames: Iterable[Tensor], starts: Sequence[int] = ()) -> Drift:
    """The drift of frames (H, W, 3) in [0, 1], which are read one by one, such as those of an IMAGE (T, H, W, 3).

    Args:
        starts: the first frame of every clip but the first one, rising.

    Raises:
        ValueError: there are no frames, or `starts` are not frames in rising order.
    """
    found = tuple(_measured(frames))
    starts = tuple(starts)
    if not found:
        raise ValueError("A film without frames has no drift.")
    if list(starts) != sorted({start for start in starts if 0 < start < len(found)}):
        raise ValueError(f"Clips begin at rising frames from 1 to {len(found) - 1}; got {', '.join(map(str, starts))}.")
    return Drift(found, starts)


def clip_starts(total: int, first: int, each: int) -> tuple[int, ...]:
    """Where clips begin in a film of `total` frames: after the `first` ones, and then every `each` frames."""
    return tuple(range(first, total, each)) if each > 0 and first > 0 else ()


@torch.no_grad()
def _measured(frames: Iterable[Tensor]) -> Iterator[FrameDrift]:
    before: Tensor | None = None
    for frame in frames:
        frame = frame[..., :3].float()
        grey = frame.mean(-1)
        steps = (grey.diff(dim=0).abs().mean() + grey.diff(dim=1).abs().mean()) / 2
        motion = math.nan if before is None else (frame - before).abs().mean().item()
        red, green, blue = frame.mean((0, 1)).tolist()
        yield FrameDrift((red, green, blue), grey.std().item(), steps.item(), motion)
        before = frame


def draw_drift(drift: Drift) -> Image.Image:
    """Colour, sharpness and motion over the frames, with the clips' means and a line at each joint."""
    # Imported where a chart is drawn, because it takes half a second; without pyplot, whose figures are global.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((SIZE[0] / DPI, SIZE[1] / DPI), DPI)
    canvas = FigureCanvasAgg(figure)
    colour, sharpness, motion = figure.subplots(3, gridspec_kw=MARGINS)
    worst = max((joint.motion for joint in drift.joints), default=None)
    for channel, line in enumerate(COLOURS):
        _draw(colour, drift, [f.colour[channel] for f in drift.frames], [c.colour[channel] for c in drift.clips], line)
    _draw(sharpness, drift, [f.sharpness for f in drift.frames], [c.sharpness for c in drift.clips], GREY)
    _draw(motion, drift, [f.motion for f in drift.frames], [c.motion for c in drift.clips], GREY)
    colour.set_title("mean colour: red, green, blue; dashed the mean of each clip", fontsize="medium", loc="left")
    sharpness.set_title("sharpness: step of brightness between neighbouring pixels", fontsize="medium", loc="left")
    against = "" if worst is None else f"; the largest step at a joint is {worst:.2f} times those near it"
    motion.set_title(f"motion: difference from the frame before{against}", fontsize="medium", loc="left")
    motion.set_xlabel("frame")
    canvas.draw()
    return Image.frombuffer("RGBA", SIZE, canvas.buffer_rgba()).convert("RGB")


def _draw(axes: "Axes", drift: Drift, values: Sequence[float], means: Sequence[float], colour: str) -> None:
    axes.plot(
        range(len(values)), values, color=colour, linewidth=1.2, marker="o" if len(values) < 3 else "", markersize=4
    )
    for clip, mean in zip(drift.clips, means, strict=True):
        axes.plot((clip.start, clip.end - 1), (mean, mean), color=colour, linewidth=1, linestyle="--")
    for start in drift.starts:
        axes.axvline(start - 0.5, color=JOINT, linewidth=0.8)
    axes.set_xlim(-0.5, len(values) - 0.5)
