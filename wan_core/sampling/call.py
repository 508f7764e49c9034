"""The reference pipeline's call parameters as sampler settings."""

from collections.abc import Sequence

from ..settings import CacheSettings, GuidanceSettings, SamplerSettings, TeaCacheSettings, WindowSettings


def settings_of_call(
    *,
    seed: int,
    num_inference_steps: int,
    sigma_shift: float,
    cfg_scale: float | Sequence[float],
    cfg_merge: bool,
    denoising_strength: float = 1.0,
    solver: str = "euler",
    rand_device: str = "cpu",
    tea_cache_l1_thresh: float | None = None,
    tea_cache_model_id: str = "",
    recommended_template: str | None = None,
    sliding_window_size: int | None = None,
    sliding_window_stride: int | None = None,
) -> SamplerSettings:
    """Settings that do what the reference does with these arguments.

    Args:
        cfg_scale: a number, or several that are spread over the steps.
        tea_cache_model_id: whose coefficients; "" takes `recommended_template`, that of the model's catalog row.

    Raises:
        ValueError: an argument is out of range, a threshold has no template, or only one of the two window arguments
            is given.
    """
    scale = cfg_scale if isinstance(cfg_scale, (int, float)) else tuple(cfg_scale)
    return SamplerSettings(
        seed=seed,
        steps=num_inference_steps,
        shift=sigma_shift,
        denoise=denoising_strength,
        solver=solver,
        rand_device=rand_device,
        guidance=GuidanceSettings(scale=scale, mode="batched" if cfg_merge else "sequential"),
        cache=_cache(tea_cache_l1_thresh, tea_cache_model_id, recommended_template),
        windows=_windows(sliding_window_size, sliding_window_stride),
    )


def _cache(threshold: float | None, template: str, recommended: str | None) -> CacheSettings | None:
    if threshold is None:
        return None
    return TeaCacheSettings(threshold=threshold, template=template or "auto").with_template(recommended)


def _windows(size: int | None, stride: int | None) -> WindowSettings | None:
    if size is None and stride is None:
        return None
    if size is None or stride is None:
        raise ValueError(f"sliding_window_size and sliding_window_stride belong together; got {size!r} and {stride!r}.")
    return WindowSettings(size=size, stride=stride)
