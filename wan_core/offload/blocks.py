"""The blocks of a module, the stages of one weight, the flat buffer of a block's weights, and memory in use."""

import logging
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import psutil
import torch
from torch import Tensor, nn

from ..runtime import gigabytes


def used_bytes(device: torch.device) -> int:
    """Bytes in use on `device` by all programs, without what torch keeps for reuse; 0 where that is not known."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device) + torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return 0


def installed_ram() -> int:
    """Bytes of host memory of this machine, swap included."""
    return psutil.virtual_memory().total + psutil.swap_memory().total


def available_ram() -> int:
    """Bytes of host memory that programs could still take without swapping."""
    return psutil.virtual_memory().available


def contents_of(module: nn.Module) -> dict[str, object]:
    """The attributes that hold a module's parts and weights."""
    return {name: vars(module)[name] for name in ("_modules", "_parameters", "_buffers")}


def blocks_of(module: nn.Module) -> dict[str, nn.Module]:
    """The repeated parts of `module` by path: the outermost lists and sequences of several parts of one
    class that have weights."""
    return dict(_blocks_below(module, ""))


def _blocks_below(owner: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    # Not a function within `blocks_of`: one that calls itself is a cycle, which keeps all weights that it has found
    # until the garbage collector runs.
    for name, child in owner.named_children():
        inner = f"{path}{name}"
        if _repeats(child):
            yield from ((f"{inner}.{index}", block) for index, block in child.named_children())
        else:
            yield from _blocks_below(child, f"{inner}.")


def _repeats(module: nn.Module) -> bool:
    parts = list(module.children())
    one_class = len({type(part) for part in parts}) == 1
    has_weights = any(True for _ in module.parameters())
    return isinstance(module, (nn.ModuleList, nn.Sequential)) and one_class and len(parts) > 1 and has_weights


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers as they are kept between uses."""
    return sum(tensor.nbytes for tensor in weights_of(module).values())


def tables_of(module: nn.Module) -> set[str]:
    """Names of the embedding tables outside of blocks. A lookup needs a few rows, so a table stays where it is kept."""
    blocks = tuple(f"{path}." for path in blocks_of(module))
    return {
        f"{path}.weight"
        for path, part in module.named_modules()
        if isinstance(part, nn.Embedding) and not path.startswith(blocks)
    }


log = logging.getLogger("wancore")

ALIGNMENT = 256
"""Every weight starts at a multiple of this, as matrix kernels want it."""

PINNED_SHARE = 0.5
"""Of the host memory that is free before the first buffer is pinned: the rest is left to the system and other programs.
Windows starts to fail above it (Comfy-Org/ComfyUI#11531).
"""


@dataclass(frozen=True)
class Entry:
    """One weight in a flat buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    def view(self, flat: Tensor) -> Tensor:
        """The weight as a view of `flat` (bytes,)."""
        size = prod(self.shape) * self.dtype.itemsize
        return flat[self.offset : self.offset + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class FlatLayout:
    """Where each weight of a block lies in a flat buffer of `bytes`."""

    entries: tuple[Entry, ...]
    bytes: int

    @classmethod
    def of(cls, path: str, weights: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> "FlatLayout":
        """The layout of the weights below `path`, in `dtypes` where these name one, else in their own.

        Weights that are trained are in no buffer: they stay where the optimizer has them.
        """
        entries, offset = [], 0
        for name, weight in weights.items():
            if not name.startswith(f"{path}.") or weight.requires_grad:
                continue
            entry = Entry(name, tuple(weight.shape), dtypes.get(name, weight.dtype), offset)
            entries.append(entry)
            offset += -(-weight.numel() * entry.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return cls(tuple(entries), offset)

    def fill(self, flat: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Copy `weights` into `flat`, each in its dtype."""
        for entry in self.entries:
            entry.view(flat).copy_(weights[entry.name])


class PinnedMemory:
    """Page-locked host memory, which a card reads by itself while it computes, and how much of it there may be."""

    def __init__(self, share: float = PINNED_SHARE) -> None:
        self._share = share
        self._limit: float | None = None
        self.bytes = 0

    def pin(self, row: Tensor) -> bool:
        """Lock the pages under `row` until `unpin`; whether that was possible."""
        if self._limit is None:
            self._limit = self._share * available_ram()
        if self.bytes + row.nbytes > self._limit:
            return False
        # Registered in place, because torch's own pinned allocator rounds each request up to a power of two.
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(row.data_ptr(), row.nbytes, 0)) != 0:
            log.warning("The system refuses to pin %s of memory; copies to the card are slower.", gigabytes(row.nbytes))
            self._limit = 0.0
            return False
        self.bytes += row.nbytes
        return True

    def unpin(self, row: Tensor) -> None:
        torch.cuda.cudart().cudaHostUnregister(row.data_ptr())
        self.bytes -= row.nbytes


PINNED = PinnedMemory()
"""The pinned memory of this process."""


class FlatBuffer:
    """Bytes that hold the weights of one block, in host memory that is pinned if asked and if there is enough.

    One copy to the device then moves the whole block, at the full speed of the bus; a copy for each weight would wait
    for the host between them.
    """

    def __init__(self, size: int, device: torch.device, pin: bool, layout: FlatLayout | None = None) -> None:
        """`layout` is that of the weights that are views of it; None for a staging buffer."""
        self.layout = layout
        # Buffers outlive the run that makes them. Made in a host's inference mode, they could not be written outside of
        # it.
        with torch.inference_mode(False):
            self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.pinned = pin and device.type == "cpu" and PINNED.pin(self.bytes)
        if self.pinned:
            weakref.finalize(self, PINNED.unpin, self.bytes)


class Weight:
    """One parameter or buffer of a module at its stages, and the only code that sets its `.data`.

    It shows the last stage that there is: `changed` while its block runs, else `arrived`, else `offloaded`.

    Attributes:
        tensor: the parameter or buffer itself.
        offloaded: what it holds between uses.
        buffer: the flat buffer that `offloaded` is a view of; None where it has memory of its own.
        cached: a copy of `offloaded` on a device, which may be used again.
        arrived: what it holds on the device while the module works there; None otherwise.
        changed: what a LoRA made of it while its block runs; None otherwise.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.offloaded = tensor, tensor.data
        self.buffer: FlatBuffer | None = None
        self.cached: Tensor | None = None
        self.arrived: Tensor | None = None
        self.changed: Tensor | None = None

    def stands_for(self, tensor: Tensor) -> bool:
        """Whether `tensor` is this weight, and `Module.to` or the like has not moved or cast it since."""
        if tensor is not self.tensor:
            return False
        at_work = self.arrived is not None or self.changed is not None
        return at_work or (tensor.device, tensor.dtype) == (self.offloaded.device, self.offloaded.dtype)

    @property
    def current(self) -> Tensor:
        """The weight where it is now, before a change for the run of its block."""
        return self.offloaded if self.arrived is None else self.arrived

    def offload(self, data: Tensor, buffer: FlatBuffer | None = None) -> None:
        """Keep `data`, a view of `buffer` or memory of its own, between uses from now on. While the module works, what
        has arrived is replaced, too.
        """
        self.offloaded, self.buffer, self.cached = data, buffer, None
        if self.arrived is not None:
            self.arrived = data.to(self.arrived.device, self.arrived.dtype)
        self._show()

    def arrive(self, data: Tensor) -> None:
        """Hold `data` on the device until `leave`."""
        self.arrived = data
        self._show()

    def leave(self) -> None:
        """Show what is offloaded again. Nothing is copied back: weights at work do not change."""
        self.arrived = None
        self._show()

    def change(self, changed: Tensor | None) -> None:
        """Hold `changed` until this is called with None."""
        self.changed = changed
        self._show()

    def _show(self) -> None:
        self.tensor.data = self.current if self.changed is None else self.changed
