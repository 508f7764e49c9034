"""Scaled dot-product attention behind one function, with a choice of kernels.

`sdpa` is PyTorch's own and always there. The others are used only when their package is installed and agrees with sdpa
on random data: some builds of them produce noise on some cards, and a video full of noise is a slow way to find out.
"""

import importlib
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger("wancore")

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """PyTorch's attention on (B, S, heads, width); `mask`, added to the logits, spreads to (B, heads, Sq, Sk)."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2)


def _flash() -> AttentionFn:
    try:
        flash = importlib.import_module("flash_attn_interface").flash_attn_func  # FlashAttention 3
    except ImportError:
        flash = importlib.import_module("flash_attn").flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return attend


def _sage() -> AttentionFn:
    sage = importlib.import_module("sageattention").sageattn
    return lambda q, k, v: sage(q, k, v, tensor_layout="NHD", is_causal=False)


def _xformers() -> AttentionFn:
    return importlib.import_module("xformers.ops").memory_efficient_attention


_LOADERS: dict[str, Callable[[], AttentionFn]] = {"flash": _flash, "sage": _sage, "xformers": _xformers}
BACKENDS: tuple[str, ...] = ("sdpa", *_LOADERS)

MAX_SELF_TEST_ERROR = 0.05
"""Largest relative error against sdpa. 8-bit SageAttention stays near 0.02; a broken kernel is off by 1 and more."""


def load_backend(name: str, device: torch.device, dtype: torch.dtype) -> AttentionFn:
    """The attention function called `name`, tested once on `device` in `dtype`.

    Returned functions take q (B, Sq, heads, 128), k and v (B, Sk, heads, 128) and return (B, Sq, heads, 128).

    Raises:
        ValueError: unknown name, package not installed, or a result that differs from sdpa.
    """
    if name == "sdpa":
        return sdpa
    if name not in _LOADERS:
        raise ValueError(f"Unknown attention backend {name!r}; choose one of {', '.join(BACKENDS)}.")
    try:
        candidate = _LOADERS[name]()
    except ImportError as error:
        raise ValueError(
            f"Attention backend {name!r} is not installed ({error}). Install it or choose 'sdpa'."
        ) from error
    error = _self_test(candidate, device, dtype)
    if not error < MAX_SELF_TEST_ERROR:
        raise ValueError(
            f"Attention backend {name!r} gives wrong results on this machine: relative error {error:.3g} against sdpa, "
            f"at most {MAX_SELF_TEST_ERROR} expected. Choose 'sdpa'."
        )
    log.info("attention: %s (relative error %.2g against sdpa)", name, error)
    return candidate


def _self_test(candidate: AttentionFn, device: torch.device, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 128, generator=generator).to(device, dtype) for n in (192, 320, 320))
    expected = sdpa(q, k, v).float()
    try:
        got = candidate(q, k, v).float()
    except Exception as error:
        log.warning("attention backend failed its self-test: %s", error)
        return float("inf")
    return ((got - expected).norm() / expected.norm()).item()
