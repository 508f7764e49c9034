"""Where a module's weights are while it works."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn


class Residency:
    """What is known of the weights of one module beyond the tensors themselves.

    Attributes:
        work_dtypes: by parameter name, the dtype that a weight works in; only those that rest in another one.
    """

    _known: ClassVar[WeakKeyDictionary[nn.Module, "Residency"]] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.work_dtypes: dict[str, torch.dtype] = {}

    @classmethod
    def of(cls, module: nn.Module) -> "Residency":
        """The one residency of `module`."""
        return cls._known.setdefault(module, cls())


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """`module` with its weights on `device` in their work dtypes inside the block, and back where they rest after it.

    Weights are copied in and dropped afterwards, never copied back: inference does not change them.
    """
    work = Residency.of(module).work_dtypes
    named = chain(module.named_parameters(), module.named_buffers())
    tensors = [(t, work.get(name, t.dtype)) for name, t in named if t.device != device or name in work]
    resting = [tensor.data for tensor, _ in tensors]
    try:
        for tensor, dtype in tensors:
            tensor.data = tensor.data.to(device, dtype, non_blocking=True)
        yield module
    finally:
        for (tensor, _), data in zip(tensors, resting, strict=True):
            tensor.data = data
