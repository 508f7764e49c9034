"""Scaled dot-product attention behind one function, with a choice of kernels, and the rotary embedding of its inputs.

`sdpa` is PyTorch's own and always available; `auto` is the fastest exact kernel of the device. The others are used only
when their package is installed and agrees with sdpa on random data, because some builds give noise on some cards.
"""

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .kernels import Operation
from .ops import linear, may_overwrite

THETA = 10000.0
ROTATION_TOKENS = 8192
"""Tokens rotated at a time, so that the float32 products are small beside the sequence."""
CPU_TOKENS = 256
"""The same on a CPU, where a piece of this size stays in its cache."""


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines (S, 1, head_dim / 2) in float32, one row per token."""

    cos: Tensor
    sin: Tensor


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """How many channels of a head the time, height and width axes rotate: 44, 42 and 42 of 128 (Wan-Video/Wan2.1)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotary_table(
    grid: tuple[int, int, int], head_dim: int, device: torch.device, *, theta: float = THETA
) -> RotaryTable:
    """The rotation of every token of a (frames, rows, columns) grid, tokens ordered with columns fastest.

    Pair j of an axis of width D turns by `position * theta ** (-2j / D)`. Angles, cosines and sines are computed in
    float64 on the CPU, one axis at a time (Wan-Video/Wan2.1 `rope_params`), and expanded to the grid on `device`.
    """
    cosines: list[Tensor] = []
    sines: list[Tensor] = []
    for axis, (length, width) in enumerate(zip(grid, axis_widths(head_dim), strict=True)):
        frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
        angle = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * frequency
        shape = [1, 1, 1, width // 2]
        shape[axis] = length
        for parts, values in ((cosines, angle.cos()), (sines, angle.sin())):
            parts.append(values.float().to(device).view(shape).expand(*grid, -1))
    return RotaryTable(*(torch.cat(parts, -1).reshape(-1, 1, head_dim // 2) for parts in (cosines, sines)))


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """`x` (B, S, heads, head_dim) rotated by `table` in float32, as a new tensor in x's dtype: the definition, and what
    compilers and devices other than a CPU use with gradients.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((even * table.cos - odd * table.sin, even * table.sin + odd * table.cos), -1)
    return turned.flatten(-2).to(x.dtype)


def rotate_(x: Tensor, table: RotaryTable) -> Tensor:
    """`rotate` in the memory of `x`; with gradients a new tensor."""
    on_cpu = x.device.type == "cpu"
    if not may_overwrite(x):
        return (_rotate_complex if on_cpu else rotate)(x, table)
    # Only a CPU has a choice: elsewhere the planned memory is that of the real form.
    return _ROTATE(x, table, sizes=tuple(x.shape)) if on_cpu else _rotate_real_(x, table)


def _rotate_real_(x: Tensor, table: RotaryTable) -> Tensor:
    for chunk, cos, sin in _pieces(x, table, CPU_TOKENS if x.device.type == "cpu" else ROTATION_TOKENS):
        even, odd = chunk[..., 0::2], chunk[..., 1::2]
        even_cos, even_sin = even * cos, even * sin
        torch.addcmul(even_cos, odd, sin, value=-1, out=even)
        torch.addcmul(even_sin, odd, cos, out=odd)
    return x


def _rotate_complex_(x: Tensor, table: RotaryTable) -> Tensor:
    for chunk, cos, sin in _pieces(x, table, CPU_TOKENS):
        chunk.copy_(_rotate_complex(chunk, RotaryTable(cos, sin)))
    return x


def _some_tokens(x: Tensor, table: RotaryTable) -> tuple[Tensor, RotaryTable]:
    """The first tokens, as a copy: the kernels overwrite what they are timed on."""
    return x[:, :ROTATION_TOKENS].clone(), RotaryTable(table.cos[:ROTATION_TOKENS], table.sin[:ROTATION_TOKENS])


_ROTATE = Operation("rotate", {"complex": _rotate_complex_, "real": _rotate_real_}, _some_tokens)


def _pieces(x: Tensor, table: RotaryTable, tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return zip(x.split(tokens, 1), table.cos.split(tokens), table.sin.split(tokens), strict=True)


def _rotate_complex(x: Tensor, table: RotaryTable) -> Tensor:
    """`rotate` as a product of complex numbers. On a CPU it is faster, because it reads each pair at once, where
    `rotate` reads even and odd channels with a stride. Compilers and some devices lack complex numbers.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(table.cos, table.sin)).flatten(-2).to(x.dtype)


log = logging.getLogger("wancore")

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]

MOST_LOGITS = 2**20
"""Logits that `by_heads` computes at a time: 4 MiB, which stay in a CPU's cache."""

LEAST_ROWS = 256
"""The fewest queries at a time: with fewer, rearranging keys and values would take most of the time."""

MOST_TIMED_LOGITS, LEAST_TIMED_ROWS = 2**25, 512
"""The part of a long sequence that kernels are timed on, on a CPU."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """PyTorch's attention on (B, S, heads, width); `mask` is added to the logits, (B, heads, Sq, Sk) or broadcast to
    it.
    """
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2)


def by_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`sdpa` as matrix products of one head after another, with float32 logits; without gradients.

    Logits in bfloat16 would be faster, but their error grows with the sharpness of the softmax, which differs from
    block to block (0.005 to 0.045 instead of 0.002), so a test on the first tensors would say nothing about later ones.
    """
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
        # Some versions of FlashAttention 3 also return the logsumexp.
        return out[0] if isinstance(out, tuple) else out

    return attend


_LOADERS: dict[str, Callable[[], AttentionFn]] = {
    "flash": _flash,
    "sage": lambda: partial(importlib.import_module("sageattention").sageattn, tensor_layout="NHD", is_causal=False),
    "xformers": lambda: importlib.import_module("xformers.ops").memory_efficient_attention,
}
AUTO = "auto"
BACKENDS: tuple[str, ...] = (AUTO, "sdpa", *_LOADERS)

_SDPA_KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}

MAX_SELF_TEST_ERROR = 0.05
"""Largest relative error against sdpa. 8-bit SageAttention has about 0.02, a broken kernel 1 and more."""


def load_backend(name: str, device: torch.device, dtype: torch.dtype) -> AttentionFn:
    """The attention function called `name`, tested once on `device` in `dtype`.

    Returned functions take q (B, Sq, heads, 128), k and v (B, Sk, heads, 128) and return (B, Sq, heads, 128).

    Raises:
        ValueError: unknown name, package not installed, or a result that differs from sdpa.
    """
    if name == "sdpa":
        return sdpa
    if name == AUTO:
        return FastestAttention(_exact_kernels(device, dtype), device)
    if name not in _LOADERS:
        raise ValueError(f"Unknown attention backend {name!r}; choose one of {', '.join(BACKENDS)}.")
    try:
        candidate = _LOADERS[name]()
    except ImportError as error:
        raise ValueError(
            f"Attention backend {name!r} is not installed ({error}). Install it or choose 'sdpa'."
        ) from error
    difference = _self_test(candidate, device, dtype)
    if not difference < MAX_SELF_TEST_ERROR:
        raise ValueError(
            f"Attention backend {name!r} gives wrong results on this machine: relative error {difference:.3g} against "
            f"sdpa, at most {MAX_SELF_TEST_ERROR} expected. Choose 'sdpa'."
        )
    log.info("attention: %s (relative error %.2g against sdpa)", name, difference)
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


class FastestAttention:
    """`sdpa`, or another kernel for shapes at which it is clearly faster, see `kernels`. With gradients it is sdpa.

    Attributes:
        operation: the kernels to choose from.
    """

    def __init__(self, kernels: Mapping[str, AttentionFn], device: torch.device) -> None:
        """`kernels` for `device` beside sdpa."""
        # Kernels of a card are documented as exact, and a reference in float32 would take memory there.
        exact = (lambda q, k, v: sdpa(q.float(), k.float(), v.float())) if device.type == "cpu" else None
        self.operation = Operation("attention", {"sdpa": sdpa, **kernels}, _some_rows, exact)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not may_overwrite(q, k, v):
            return sdpa(q, k, v)
        return self.operation(q, k, v, sizes=(*q.shape, k.shape[1]))


def _some_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first queries, as many as take a CPU a fraction of a second."""
    if q.device.type != "cpu":
        return q, k, v
    rows = max(LEAST_TIMED_ROWS, MOST_TIMED_LOGITS // (q.shape[0] * q.shape[2] * k.shape[1]))
    return q[:, :rows], k, v


def _exact_kernels(device: torch.device, dtype: torch.dtype) -> dict[str, AttentionFn]:
    """Kernels that compute the same as sdpa up to rounding: on a card PyTorch's own, and FlashAttention if installed;
    on a CPU `by_heads`.
    """
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16):
        return {"by heads": by_heads}
    if device.type != "cuda":
        return {}
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
