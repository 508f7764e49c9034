"""Memory of a computation, counted without doing it: on the meta device tensors have sizes and no data."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are made on `device` while it is active and are alive, and their peak.

    Attributes:
        live: bytes alive now.
        peak: the most that were alive at once.
    """

    def __init__(self, device: torch.device | str = "meta", given: Iterable[Tensor] = ()) -> None:
        """`given` tensors are there anyway and do not count."""
        super().__init__()
        self.device = torch.device(device)
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary()
        for tensor in given:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.device == self.device:
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = True
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size
