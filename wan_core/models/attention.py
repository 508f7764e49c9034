"""Scaled dot-product attention behind one function, with a choice of kernels.

`sdpa` is PyTorch's own and always there, and `auto` the fastest exact kernel of a CUDA device. The others are used only
when their package is installed and agrees with sdpa on random data: some builds of them produce noise on some cards,
and a video full of noise is a slow way to find out.
"""

import importlib
import logging
from collections.abc import Callable, Mapping
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .elementwise import may_overwrite
from .linear import linear, onednn_has

log = logging.getLogger("wancore")

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]

LEAST_LOGITS = 2**18
"""Logits that a head must have for `by_heads` to be worth its loop."""

MOST_LOGITS = 2**20
"""Logits that `by_heads` holds at a time: a few megabytes, which stay in a CPU's cache."""

LEAST_ROWS = 256
"""Queries that it takes at a time nevertheless: fewer would spend their time on rearranging keys and values."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """PyTorch's attention on (B, S, heads, width); `mask`, added to the logits, spreads to (B, heads, Sq, Sk)."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2)


def by_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`sdpa` as matrix products of one head after another, with float32 logits; oneDNN makes that the fastest way on a
    CPU. Short sequences and what requires gradients take `sdpa`.
    """
    if q.shape[1] * k.shape[1] < LEAST_LOGITS or not may_overwrite(q, k, v):
        return sdpa(q, k, v)
    out, scale = torch.empty_like(q), q.shape[-1] ** -0.5
    rows = max(LEAST_ROWS, MOST_LOGITS // k.shape[1])
    for sample, head in product(range(q.shape[0]), range(q.shape[2])):
        queries, keys, values, target = (x[sample, :, head] for x in (q, k, v, out))
        keys, values = keys.float().contiguous(), values.t().contiguous()
        for part, result in zip((queries.float() * scale).split(rows), target.split(rows), strict=True):
            weights = linear(part, keys).softmax(-1).to(v.dtype)
            result.copy_(linear(weights, values))
    return out


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
AUTO = "auto"
BACKENDS: tuple[str, ...] = (AUTO, "sdpa", *_LOADERS)

_SDPA_KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}

CLEARLY_FASTER = 0.95
"""Share of sdpa's time below which another kernel takes its place: less could be chance, and would change from run to
run.
"""

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
    if name == AUTO and device.type != "cuda":
        return by_heads if device.type == "cpu" and onednn_has(torch.float32) and onednn_has(dtype) else sdpa
    if name == AUTO:
        return Fastest(_exact_kernels(device, dtype), _seconds)
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


class Fastest:
    """The fastest of several kernels for each shape, found by running them on the first tensors of that shape.

    Only that first call waits for the device. What requires gradients takes sdpa.

    Attributes:
        kernels: those to choose from, by name.
    """

    def __init__(self, kernels: Mapping[str, AttentionFn], seconds: Callable[[Callable[[], Tensor]], float]) -> None:
        """`kernels` beside sdpa; `seconds` is the time of a call, and raises RuntimeError where a kernel cannot run."""
        self.kernels, self._seconds = {"sdpa": sdpa, **kernels}, seconds
        self._chosen: dict[tuple[object, ...], AttentionFn] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return sdpa(q, k, v)
        key = (q.shape, k.shape, q.dtype, q.device)
        if key not in self._chosen:
            self._chosen[key] = self.kernels[self._fastest(q, k, v)]
        return self._chosen[key](q, k, v)

    def _fastest(self, q: Tensor, k: Tensor, v: Tensor) -> str:
        times: dict[str, float] = {}
        for name, kernel in self.kernels.items():
            try:
                times[name] = self._seconds(lambda kernel=kernel: kernel(q, k, v))
            except RuntimeError as error:
                log.debug("attention: %s does not run here: %s", name, error)
        best = min(times, key=times.__getitem__, default="sdpa")
        if best != "sdpa" and times[best] >= CLEARLY_FASTER * times.get("sdpa", float("inf")):
            best = "sdpa"
        shown = ", ".join(f"{name} {1000 * time:.2f} ms" for name, time in times.items())
        log.info("attention of %d to %d tokens: %s (%s)", q.shape[1], k.shape[1], best, shown)
        return best


def _exact_kernels(device: torch.device, dtype: torch.dtype) -> dict[str, AttentionFn]:
    """What computes the same as sdpa up to rounding: its own kernels, and FlashAttention where it is installed."""
    found = {name: _only(backend) for name, backend in _SDPA_KERNELS.items()}
    try:
        found["FlashAttention"] = load_backend("flash", device, dtype)
    except ValueError as error:
        log.debug("attention: %s", error)
    return found


def _only(backend: SDPBackend) -> AttentionFn:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v)

    return attend


def _seconds(run: Callable[[], Tensor]) -> float:
    """The time of a call on the present CUDA device: the better of two, after one that may have to be prepared."""
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    for event in events:
        event.record()
        if event is not events[-1]:
            run()
    events[-1].synchronize()
    return min(first.elapsed_time(second) for first, second in pairwise(events)) / 1000
