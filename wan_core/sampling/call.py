"""The reference pipeline's call parameters as parts of the sampler's settings."""

from ..settings import CacheSettings, TeaCacheSettings, WindowSettings


def cache_of_call(
    tea_cache_l1_thresh: float | None, tea_cache_model_id: str, recommended: str | None
) -> CacheSettings | None:
    """TeaCache as the reference's arguments ask for it, or None without a threshold.

    An empty `tea_cache_model_id` takes the `recommended` template, that of the model's catalog row.

    Raises:
        ValueError: the threshold is out of range, or there is no such template, or none is recommended.
    """
    if tea_cache_l1_thresh is None:
        return None
    asked = TeaCacheSettings(threshold=tea_cache_l1_thresh, template=tea_cache_model_id or "auto")
    return asked.with_template(recommended)


def windows_of_call(sliding_window_size: int | None, sliding_window_stride: int | None) -> WindowSettings | None:
    """Blended windows of that many latent frames, or None when neither argument is given.

    Raises:
        ValueError: only one is given, or they are out of range.
    """
    size, stride = sliding_window_size, sliding_window_stride
    if size is None and stride is None:
        return None
    if size is None or stride is None:
        raise ValueError(f"sliding_window_size and sliding_window_stride belong together; got {size!r} and {stride!r}.")
    return WindowSettings(size=size, stride=stride)
