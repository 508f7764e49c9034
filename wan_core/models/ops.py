"""The arithmetic that all models share: norms, elementwise steps that may write into their input, linear layers."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .kernels import Operation, up_to_power_of_two

NORM_TOKENS = {"cpu": 256}
"""Tokens per piece of a norm that has no fused kernel. On a CPU the float32 copies of a piece stay in its cache, which
is 2 to 12 times as fast as the whole at once; elsewhere pieces of `MOST_NORM_TOKENS` only bound the memory of the
copies.
"""

MOST_NORM_TOKENS = 4096


class _NoInitialValues(TorchFunctionMode):
    """Leaves out what fills a new module's weights."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def on_meta() -> Iterator[None]:
    """Within the block new modules and tensors are on the meta device, and initial values of weights are not drawn.

    PyTorch goes through the motions there in Python, most of the time of making a module; and the first table of
    embeddings of a process would import PyTorch's compiler for that, which takes as long as importing PyTorch.
    """
    with torch.device("meta"), _NoInitialValues():
        yield


def has_fused_rms_norm(x: Tensor) -> bool:
    """Whether PyTorch has one kernel for RMS norms on the device of `x`: newer versions have it for CUDA."""
    return x.is_cuda and hasattr(torch.ops.aten, "_fused_rms_norm")


def may_overwrite(*tensors: Tensor) -> bool:
    """Whether `tensors` may be written into: no gradient can need their old values."""
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def add_(x: Tensor, update: Tensor, factor: float = 1.0) -> Tensor:
    """`x + factor * update` in x's dtype, in the memory of `x` where that is allowed."""
    if may_overwrite(x, update):
        return x.add_(update, alpha=factor)
    return torch.add(x, update, alpha=factor).to(x.dtype)


def layer_norm(
    x: Tensor, eps: float, dtype: torch.dtype, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """LayerNorm over the last axis with float32 statistics, in `dtype`; the kernel itself accumulates in float32."""
    if weight is not None and weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    with _own_dtype(x):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis of x, computed in float32, in x's dtype.

    Fused kernels take one dtype, so a float32 weight that is trained on bfloat16 tokens is rounded, as inference will
    do with the saved weight.
    """
    with _own_dtype(x):
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


def _own_dtype(x: Tensor) -> AbstractContextManager[object]:
    """Keeps autocast from norms inside the block: it would give them, and have them keep for the way back, a float32
    copy of tokens, although their kernels accumulate in float32 anyway.
    """
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if autocast else nullcontext()


def rms_norm_(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` of x (B, S, D) in the memory of `x`.

    Without a fused kernel PyTorch makes several float32 tensors of the size of `x`, so it is done in pieces.
    """
    if not may_overwrite(x, weight) or has_fused_rms_norm(x):
        return rms_norm(x, weight, eps)
    for piece in x.split(NORM_TOKENS.get(x.device.type, MOST_NORM_TOKENS), 1):
        piece.copy_(F.rms_norm(piece, x.shape[-1:], weight, eps))
    return x


def gelu_tanh_(x: Tensor) -> Tensor:
    """GELU in its tanh form, that of the DiT's and the text encoder's feed-forward layers."""
    if may_overwrite(x):
        return torch.ops.aten.gelu_(x, approximate="tanh")
    return F.gelu(x, approximate="tanh")


MOST_TIMED_PRODUCTS, LEAST_TIMED_ROWS = 2**31, 64
"""The most multiplications of a product that kernels are timed on, and the fewest rows nevertheless."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` for x (..., in) and a weight (out, in), all of one dtype."""
    if not _suits_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    rows = x.numel() // max(1, x.shape[-1])
    return _LINEAR(x, weight, bias, sizes=(up_to_power_of_two(rows), x.shape[-1], weight.shape[0]))


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _some_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    rows = max(LEAST_TIMED_ROWS, MOST_TIMED_PRODUCTS // weight.numel())
    return x.reshape(-1, x.shape[-1])[:rows], weight, bias


_LINEAR = Operation("linear", {"oneDNN": _onednn, "PyTorch": F.linear}, _some_rows)


def _suits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN's layer computes the same and is fast: it supports neither gradients, mixed dtypes nor autocast,
    and is slow with weights that are not contiguous.
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        x.device.type == "cpu"
        and weight.is_contiguous()
        and all(tensor.dtype == x.dtype for tensor in tensors)
        and onednn_has(x.dtype)
        and may_overwrite(*tensors)
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def onednn_has(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this processor have oneDNN's linear layer in `dtype`; tried once."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        eye = torch.eye(16, dtype=dtype, device="cpu")
        return torch.equal(_onednn(eye, 2 * eye, None), 2 * eye)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


class Linear(nn.Linear):
    """`torch.nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
