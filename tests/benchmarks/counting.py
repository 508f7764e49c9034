"""Work of a computation, counted on the meta device without doing it, in the same way for every implementation.

Attention and RMS norms count as the fused kernels that CUDA devices have for them: the meta device knows only forms
that spread them over many whole tensors.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from wan_core.models import ops, vae_blocks
from wan_core.planning.estimate import LiveBytes

aten = torch.ops.aten
FREE = {aten.detach, aten._unsafe_view, aten.lift_fresh, aten.set_, aten.alias, aten.empty, aten.empty_like}
FREE |= {aten.new_empty, aten.empty_strided, aten.new_empty_strided, aten.resize_}
OVERWRITTEN = {aten.copy_, aten.fill_, aten.zero_}
"""In-place operations that do not read what they write to."""


@dataclass
class Work:
    """What a computation took.

    Attributes:
        flops: of matrix products, convolutions and attention; a multiplication and an addition are two.
        bytes: read and written by everything else, each operation reading its inputs and writing its results once.
        peak: bytes that were alive at once, beside what was given.
    """

    flops: int = 0
    bytes: int = 0
    peak: int = 0


def held(tensor: Tensor) -> int:
    """Bytes of the values of `tensor` in memory; those of an expanded one count once."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return prod(length for length, stride in sides if stride) * tensor.itemsize


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class _Operations(TorchDispatchMode):
    """Adds up the operations on the meta device."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet, results = func.overloadpacket, tensors(out)
        if not any(result.is_meta for result in results) or func.is_view or packet in FREE:
            return out
        if packet in flop_registry:
            self._work.flops += flop_registry[packet](*args, **kwargs, out_val=out)
            return out
        given = {name: value for name, value in kwargs.items() if name != "out"}
        read = tensors((args[packet in OVERWRITTEN :], given))
        self._work.bytes += sum(map(held, read)) + sum(map(held, results))
        return out


class _FusedKernels(TorchFunctionMode):
    """Stands in for the kernels that the meta device lacks."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func in (F.rms_norm, torch.rms_norm):
            x = args[0]
            self._work.bytes += 2 * held(x)
            return torch.empty_like(x)
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Laid out as fused kernels do: heads beside each other for every token."""
        rows, width = query.shape[:-1].numel(), query.shape[-1] + value.shape[-1]
        self._work.flops += 2 * rows * key.shape[-2] * width
        batch, heads, length, _ = query.shape
        return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Let our norms take the way that they take on CUDA devices."""
    name = ops.has_fused_rms_norm.__name__
    with mock.patch.object(ops, name, lambda _: True), mock.patch.object(vae_blocks, name, lambda _: True):
        yield


def counted(run: Callable[[], object], given: Iterable[Tensor]) -> Work:
    """The work of `run` on the meta device, beside the tensors that are `given`."""
    work = Work()
    with torch.no_grad(), as_on_cuda(), LiveBytes(given=given) as live, _Operations(work), _FusedKernels(work):
        result = run()
    del result
    work.peak = live.peak
    return work
