"""What each step cache saves and what it changes: runs of the bundled model with it beside the same runs without.

The work that is left out is counted in blocks, and the time of the steps is measured. PSNR and SSIM (Wang et al. 2004)
compare the decoded frames. Runs with fewer steps stand beside them: a cache should be nearer to the full run.
"""

import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from wan_core import ModelConfig, WanVideoPipeline, bundled, catalog
from wan_core.atomic import replacing
from wan_core.cache_settings import (
    CACHE_PRESETS,
    CacheSettings,
    EasyCacheSettings,
    FirstBlockSettings,
    MagCacheSettings,
    TeaCacheSettings,
)

PROMPTS = (
    "the green circle gets bigger over the sky",
    "over the sand a red ball shrinks quickly",
    "a purple ball moves to the right fast on the sky",
)
"""Captions of the world that the bundled model was trained on."""
STEPS, SHAPE = 50, {"width": 96, "height": 64, "num_frames": 17}
QUICK_STEPS, QUICK_SHAPE = 12, {"width": 32, "height": 32, "num_frames": 5}
CFG, SHIFT = 4.0, 5.0
FILES = (catalog.DIT_FILE, catalog.TEXT_ENCODER_PATTERN, catalog.VAE_PATTERN)
FEWER = (0.8, 0.65, 0.5, 0.4)
"""Shares of the steps, for the runs with fewer."""
TEMPLATE = "Wan2.1-T2V-1.3B"

CANDIDATES: dict[str, tuple[CacheSettings, ...]] = {
    "TeaCache": tuple(
        TeaCacheSettings(threshold=None, speedup=speedup, template=TEMPLATE) for speedup in (1.3, 1.6, 2.0, 2.6)
    ),
    "EasyCache": tuple(EasyCacheSettings(threshold=threshold) for threshold in (0.02, 0.05, 0.1, 0.2)),
    "MagCache": tuple(
        MagCacheSettings(threshold=threshold, max_skips=most)
        for threshold, most in ((0.03, 1), (0.06, 2), (0.12, 2), (0.12, 4), (0.24, 6))
    ),
    "first block": tuple(
        FirstBlockSettings(threshold=threshold, max_skips=most)
        for threshold, most in ((0.05, 2), (0.08, 2), (0.12, 3), (0.2, 4))
    ),
}
SHOWN = ("threshold", "speedup", "max_skips", "start_step")


@dataclass(frozen=True)
class Row:
    """A cache with its settings, the mean over the prompts.

    Attributes:
        counted: how many times as many blocks the full run computes.
        measured: how many times as long its steps take.
        psnr, ssim: of the frames, against those of the full run; dB and at most 1.
        preset: that has these settings, or nothing.
    """

    HEADER: ClassVar[tuple[str, ...]] = ("cache", "settings", "speed-up, counted", "measured", "PSNR", "SSIM", "preset")

    cache: str
    settings: str
    counted: float
    measured: float
    psnr: float
    ssim: float
    preset: str = ""

    def cells(self) -> tuple[str, ...]:
        numbers = f"{self.counted:.2f}", f"{self.measured:.2f}", f"{self.psnr:.1f}", f"{self.ssim:.3f}"
        return self.cache, self.settings, *numbers, self.preset

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of values from 0 to 1; infinite where both are equal."""
    error = float(np.mean((one - other) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity of frames (T, H, W, 3) of values from 0 to 1: the mean over frames, pixels and channels,
    with the Gaussian window of 11 x 11 and the constants of Wang et al. 2004.
    """

    def mean(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, (0, 1.5, 1.5, 0), truncate=3.34)

    one, other = one.astype(np.float64), other.astype(np.float64)
    mean_one, mean_other = mean(one), mean(other)
    both = mean(one * other) - mean_one * mean_other
    variances = mean(one**2) - mean_one**2 + mean(other**2) - mean_other**2
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_one * mean_other + c1) * (2 * both + c2)
    return float(np.mean(top / ((mean_one**2 + mean_other**2 + c1) * (variances + c2))))


@dataclass(frozen=True)
class Made:
    """A video, and what its steps took."""

    frames: np.ndarray
    blocks: int
    seconds: float


class Bench:
    """The model in `folder`, at work."""

    def __init__(self, folder: Path, steps: int, shape: dict[str, int]) -> None:
        configs = [ModelConfig(path=str(folder / name)) for name in FILES]
        self.pipe = WanVideoPipeline.from_pretrained(torch_dtype=torch.float32, device="cpu", model_configs=configs)
        self.steps, self.shape, self._ran = steps, shape, 0
        for block in self.pipe.dit.blocks:
            block.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._ran += 1

    def make(self, prompt: str, cache: CacheSettings | None = None, steps: int | None = None) -> Made:
        seconds = []

        def timed(items: Iterable[int]) -> Iterator[int]:
            # Of this process, so that others that keep the machine busy do not count.
            began = time.process_time()
            yield from items
            seconds.append(time.process_time() - began)

        self._ran = 0
        video = self.pipe(
            prompt=prompt, seed=1, cfg_scale=CFG, sigma_shift=SHIFT, num_inference_steps=steps or self.steps,
            cache=cache, output_type="tensor", progress_bar_cmd=timed, **self.shape,
        )  # fmt: skip
        frames = ((video[0].permute(1, 2, 3, 0).clamp(-1, 1) + 1) / 2).double().numpy()
        return Made(frames, self._ran, *seconds)


def rows_of(bench: Bench, candidates: dict[str, tuple[CacheSettings, ...]], prompts: Sequence[str]) -> Iterator[Row]:
    """The rows of all candidates, and of runs with fewer steps."""
    full = {prompt: bench.make(prompt) for prompt in prompts}

    def row(name: str, settings: str, made: dict[str, Made], preset: str = "") -> Row:
        def mean(values: Iterable[float]) -> float:
            return statistics.fmean(values)

        pairs = [(full[prompt], made[prompt]) for prompt in prompts]
        return Row(
            name, settings, mean(one.blocks / other.blocks for one, other in pairs),
            mean(one.seconds / max(other.seconds, 1e-9) for one, other in pairs),
            mean(psnr(one.frames, other.frames) for one, other in pairs),
            mean(ssim(one.frames, other.frames) for one, other in pairs), preset,
        )  # fmt: skip

    for share in FEWER:
        steps = max(2, round(share * bench.steps))
        yield row("fewer steps", f"{steps}", {prompt: bench.make(prompt, steps=steps) for prompt in prompts})
    for name, choices in candidates.items():
        for cache in choices:
            made = {prompt: bench.make(prompt, cache) for prompt in prompts}
            yield row(name, described(cache), made, preset_of(cache))


def described(cache: CacheSettings) -> str:
    """The numbers that tell the settings of one cache apart."""
    values = ((name, getattr(cache, name, None)) for name in SHOWN)
    return ", ".join(f"{name} {value:g}" for name, value in values if value is not None)


def preset_of(cache: CacheSettings) -> str:
    """The name of the preset with these settings; nothing if there is none."""
    if hasattr(cache, "template"):
        cache = replace(cache, template="auto")
    return next((name for name, settings in CACHE_PRESETS.items() if cache in settings), "")


def with_presets() -> dict[str, tuple[CacheSettings, ...]]:
    """The candidates, and the presets that are not among them."""
    found = {}
    for number, (name, choices) in enumerate(CANDIDATES.items()):
        presets = [settings[number] for settings in CACHE_PRESETS.values()]
        if name == "TeaCache":
            presets = [replace(settings, template=TEMPLATE) for settings in presets]
        found[name] = tuple(dict.fromkeys((*choices, *presets)))
    return found


def draw(rows: Sequence[Row], path: Path) -> None:
    """PSNR over the counted speed-up, one line for each cache, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((8, 5), 100, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    for name in dict.fromkeys(row.cache for row in rows):
        points = sorted((row.counted, row.psnr) for row in rows if row.cache == name and math.isfinite(row.psnr))
        axes.plot(*zip(*points, strict=True), marker="o", label=name, linestyle="--" if name == "fewer steps" else "-")
    axes.set_xlabel("speed-up, counted in blocks")
    axes.set_ylabel("PSNR to the full run, dB")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as partial:
        canvas.print_png(partial)


def main(quick: bool = False, model: Path | None = None, plot: Path | None = None) -> list[Row]:
    """Measure; `model` is a folder with the three files of a text-to-video model, by default the bundled one."""
    torch.set_num_threads(1)
    steps, shape = (QUICK_STEPS, QUICK_SHAPE) if quick else (STEPS, SHAPE)
    prompts, candidates = PROMPTS[:1] if quick else PROMPTS, with_presets()
    if quick:
        candidates = {name: choices[-1:] for name, choices in candidates.items()}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) if model else bundled.write_model(Path(folder), catalog.TINY)
        for name in FILES if model else ():
            shutil.copy(model / name, place)
        if model:
            shutil.copytree(model / catalog.TOKENIZER_PATTERN, place / catalog.TOKENIZER_PATTERN)
        bench = Bench(place, steps, shape)
        # MagCache finds what it measured beside the copy.
        bench.make(prompts[0], MagCacheSettings(template="measure"))
        rows = list(rows_of(bench, candidates, prompts))
    if plot is not None:
        draw(rows, plot)
    return rows
