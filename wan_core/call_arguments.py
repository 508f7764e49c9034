"""The reference pipeline's call parameters as settings. Messages use the parameters' own names."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .cache_settings import CacheSettings, TeaCacheSettings
from .checks import check_choice, check_number, check_whole
from .runtime import usable_device
from .sampling.cache_tables import TEACACHE_COEFFICIENTS
from .sampling.solvers import SOLVERS
from .settings import MAX_SEED, GuidanceSettings, MemorySettings, SamplerSettings, WindowSettings
from .tiling import TileSettings
from .types import Curve

NUMBERS: Mapping[str, tuple[float, float]] = {
    "denoising_strength": (0, 1),
    "sigma_shift": (0.01, 1000),
    "tea_cache_l1_thresh": (0, math.inf),
    "motion_bucket_id": (0, 100),
    "vram_limit": (0, 100000),
    "vram_buffer": (0, 100000),
}
"""The range of each parameter that is a number."""

WHOLE: Mapping[str, tuple[int, int]] = {
    "seed": (0, MAX_SEED),
    "num_inference_steps": (1, 10000),
    "height": (1, 16384),
    "width": (1, 16384),
    "num_frames": (1, 100000),
    "sliding_window_size": (1, 100000),
    "sliding_window_stride": (1, 100000),
    "num_persistent_param_in_dit": (0, 10**15),
}
"""The range of each parameter that is a whole number."""

CFG_SCALE = (0, 100)
STRENGTH = (-1000, 1000)


def check_parameters(**values: Any) -> dict[str, Any]:
    """Parameters of `NUMBERS` and `WHOLE` as Python's own numbers; None stays None.

    Raises:
        ValueError: one is not a number, or out of range.
    """
    plain = {name: plain_number(value) for name, value in values.items()}
    for name, value in plain.items():
        if value is not None and name in NUMBERS:
            low, high = NUMBERS[name]
            check_number(name, value, low=low, high=high)
        elif value is not None:
            low, high = WHOLE[name]
            plain[name] = int(value) if isinstance(value, float) and value.is_integer() else value
            check_whole(name, plain[name], low=low, high=high)
    return plain


def truth(name: str, value: Any) -> bool:
    """`value`, which must be True or False, or 1 or 0; Python would take a text such as "no" for true.

    Raises:
        ValueError: it is none of these.
    """
    value = plain_number(value)
    if not isinstance(value, int) or value not in (0, 1):
        raise ValueError(f"{name} must be True or False; got {value!r}.")
    return bool(value)


def plain_number(value: Any) -> Any:
    """A NumPy scalar as a Python number; anything else as it is."""
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and np.ndim(value) == 0 else value


def curve(name: str, value: Any, limits: tuple[float, float]) -> float | tuple[float, ...]:
    """`value`, a number or several that are spread over the steps, as a number or a tuple.

    Raises:
        ValueError: it is neither, or a number is out of range.
    """
    value = plain_number(value)
    listed = _members(value)
    found = (value,) if listed is None else tuple(map(plain_number, listed))
    if not found:
        raise ValueError(f"{name} needs at least one number; got {value!r}.")
    for number in found:
        check_number(name, number, low=limits[0], high=limits[1])
    return value if listed is None else found


def _members(value: Any) -> list[Any] | None:
    """The elements of a list, a tuple or an array of one axis; None for anything else."""
    if isinstance(value, np.ndarray):
        return list(value) if value.ndim == 1 else None
    return list(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else None


def strength(name: str, value: Any) -> Curve:
    """`vace_scale`, or a LoRA's `alpha`, as a curve.

    Raises:
        ValueError: as of `curve`.
    """
    return value if isinstance(value, Curve) else Curve.of(curve(name, value, STRENGTH))


def settings_of_call(
    *,
    seed: int | None,
    rand_device: str,
    num_inference_steps: int,
    sigma_shift: float,
    denoising_strength: float,
    starts_from_video: bool,
    cfg_scale: float | Sequence[float],
    cfg_scale_low: float | Sequence[float] | None = None,
    cfg_merge: bool,
    solver: str,
    cache: CacheSettings | None,
    windows: WindowSettings | None,
) -> SamplerSettings:
    """The sampler's settings. `denoising_strength` is used only with a video to start from.

    Raises:
        ValueError: an argument is out of range.
    """
    check_choice("solver", solver, SOLVERS)
    values = check_parameters(
        seed=random.getrandbits(32) if seed is None else seed,
        num_inference_steps=_needed("num_inference_steps", num_inference_steps),
        sigma_shift=_needed("sigma_shift", sigma_shift),
        denoising_strength=_needed("denoising_strength", denoising_strength),
    )
    return SamplerSettings(
        seed=values["seed"],
        steps=values["num_inference_steps"],
        shift=values["sigma_shift"],
        denoise=values["denoising_strength"] if starts_from_video else 1.0,
        solver=solver,
        rand_device=str(usable_device("rand_device", rand_device)),
        guidance=GuidanceSettings(
            scale=curve("cfg_scale", cfg_scale, CFG_SCALE),
            scale_low=None if cfg_scale_low is None else curve("cfg_scale_low", cfg_scale_low, CFG_SCALE),
            mode="batched" if truth("cfg_merge", cfg_merge) else "sequential",
        ),
        cache=cache,
        windows=windows,
    )


def with_own(
    settings: SamplerSettings, guidance: GuidanceSettings | None, sigmas: Sequence[float] | None
) -> SamplerSettings:
    """`settings` with this guidance and these noise levels in place of their own, where they are given.

    Raises:
        ValueError: one of them is something else, or out of range.
    """
    if guidance is not None and not isinstance(guidance, GuidanceSettings):
        raise ValueError(f"guidance must be a GuidanceSettings (wan_core.settings); got {guidance!r:.100}.")
    if sigmas is not None:
        levels = _members(sigmas)
        if levels is None:
            raise ValueError(f"sigmas must be a list of numbers; got {sigmas!r:.100}.")
        settings = replace(settings, sigmas=tuple(plain_number(level) for level in levels))
    if guidance is None:
        return settings
    batched = settings.guidance.mode == "batched"
    return replace(settings, guidance=replace(guidance, mode="batched") if batched else guidance)


def _needed(name: str, value: Any) -> Any:
    if value is None:
        raise ValueError(f"{name} must be a number; got None.")
    return value


def cache_of_call(
    tea_cache_l1_thresh: float | None, tea_cache_model_id: str, cache: CacheSettings | None = None
) -> CacheSettings | None:
    """TeaCache if it has a threshold, or `cache`. With an empty `tea_cache_model_id` the model decides on the template.

    Raises:
        ValueError: the threshold is out of range, there is no such template, both caches are given, or `cache` is not
            settings of one.
    """
    threshold = check_parameters(tea_cache_l1_thresh=tea_cache_l1_thresh)["tea_cache_l1_thresh"]
    if tea_cache_model_id not in (None, ""):
        check_choice("tea_cache_model_id", tea_cache_model_id, TEACACHE_COEFFICIENTS)
    if cache is not None and not isinstance(cache, CacheSettings):
        raise ValueError(f"cache takes settings of wan_core.cache_settings, such as MagCacheSettings(); got {cache!r}.")
    if threshold is None:
        return cache
    if cache is not None:
        raise ValueError("A run has one step cache; give tea_cache_l1_thresh or cache.")
    return TeaCacheSettings(threshold=threshold, template=tea_cache_model_id or "auto")


def windows_of_call(sliding_window_size: int | None, sliding_window_stride: int | None) -> WindowSettings | None:
    """Blended windows of `sliding_window_size` latent frames; None when both arguments are None.

    Raises:
        ValueError: only one of them is None, or one is out of range.
    """
    size, stride = check_parameters(
        sliding_window_size=sliding_window_size, sliding_window_stride=sliding_window_stride
    ).values()
    if size is None and stride is None:
        return None
    if size is None or stride is None:
        raise ValueError(f"sliding_window_size and sliding_window_stride belong together; got {size!r} and {stride!r}.")
    return WindowSettings(size=size, stride=stride)


def tiles_of_call(tile_size: Sequence[int], tile_stride: Sequence[int]) -> TileSettings:
    """Tiles in latent cells, each argument as (height, width).

    Raises:
        ValueError: an argument is not two whole numbers of at least 1, or a stride is larger than its size.
    """
    pairs: dict[str, tuple[int, int]] = {}
    for name, value in (("tile_size", tile_size), ("tile_stride", tile_stride)):
        pair = tuple(map(plain_number, _members(value) or ()))
        if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in pair):
            raise ValueError(f"{name} must be two whole numbers of latent cells, (height, width); got {value!r}.")
        pairs[name] = pair
    if any(stride > size for size, stride in zip(pairs["tile_size"], pairs["tile_stride"], strict=True)):
        raise ValueError(f"tile_stride must not be above tile_size; got {tile_stride!r} and {tile_size!r}.")
    return TileSettings(size=pairs["tile_size"], stride=pairs["tile_stride"])


def memory_of_call(
    num_persistent_param_in_dit: int | None = None, vram_limit: float | None = None, vram_buffer: float | None = None
) -> MemorySettings:
    """What a call may use of the device, in GiB, and how many parameters stay there.

    Raises:
        ValueError: a number is out of range.
    """
    numbers = check_parameters(
        num_persistent_param_in_dit=num_persistent_param_in_dit, vram_limit=vram_limit, vram_buffer=vram_buffer
    )
    return MemorySettings(
        vram_limit=numbers["vram_limit"],
        vram_buffer=numbers["vram_buffer"],
        persistent_params=numbers["num_persistent_param_in_dit"],
    )
