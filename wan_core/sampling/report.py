"""How a long video changes from window to window, so that drift is seen before it is watched."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from ..tiling import Span
from .preview import latents_to_rgb


@dataclass(frozen=True)
class WindowReport:
    """One window of latent frames `start` to `end` (exclusive): `mean` and `contrast` (standard deviation) of its
    brightness in [0, 1], and `sharpness`, the mean step of brightness between neighbouring cells."""

    start: int
    end: int
    mean: float
    contrast: float
    sharpness: float

    def __str__(self) -> str:
        return (
            f"frames {self.start}-{self.end - 1}: mean {self.mean:.3f}, contrast {self.contrast:.3f}, "
            f"sharpness {self.sharpness:.4f}"
        )


def window_reports(latents: Tensor, spans: Iterable[Span]) -> list[WindowReport]:
    """Brightness statistics of each window of normalised latents (B, 16, F, h, w), one window at a time."""
    found = []
    for span in spans:
        grey = latents_to_rgb(latents[:, :, span.start : span.end]).mean(-1)
        steps = [grey.diff(dim=axis).abs().mean() for axis in (2, 3)]
        mean, contrast, sharpness = (v.item() for v in (grey.mean(), grey.std(), (steps[0] + steps[1]) / 2))
        found.append(WindowReport(span.start, span.end, mean, contrast, sharpness))
    return found
