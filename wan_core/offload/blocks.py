"""A module's blocks, its weights, a block's weights as one flat row of bytes, and the memory that is in use."""

import logging
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import psutil
import torch
from torch import Tensor, nn

GIB = 1024**3


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


def blocks_of(module: nn.Module) -> dict[str, nn.Module]:
    """The repeated parts of `module` by path: the outermost lists and sequences of several parts of one
    class that have weights."""
    found: dict[str, nn.Module] = {}

    def walk(owner: nn.Module, path: str) -> None:
        for name, child in owner.named_children():
            inner = f"{path}{name}"
            if _repeats(child):
                found.update({f"{inner}.{index}": block for index, block in child.named_children()})
            else:
                walk(child, f"{inner}.")

    walk(module, "")
    return found


def _repeats(module: nn.Module) -> bool:
    parts = list(module.children())
    one_class = len({type(part) for part in parts}) == 1
    has_weights = any(True for _ in module.parameters())
    return isinstance(module, (nn.ModuleList, nn.Sequential)) and one_class and len(parts) > 1 and has_weights


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers as they rest."""
    return sum(tensor.nbytes for tensor in weights_of(module).values())


def tables_of(module: nn.Module) -> set[str]:
    """Names of the embedding tables outside of blocks. A lookup needs a few rows, so a table is used where it rests."""
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
"""Of the host memory that is free before the first slab is pinned: the rest is left to the system and other programs.
Windows starts to fail above it (Comfy-Org/ComfyUI#11531).
"""


@dataclass(frozen=True)
class Entry:
    """One weight in a row of bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    def view(self, row: Tensor) -> Tensor:
        """The weight as a view of `row` (bytes,)."""
        size = prod(self.shape) * self.dtype.itemsize
        return row[self.offset : self.offset + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Layout:
    """Where each weight of a block lies in its row of `bytes`."""

    entries: tuple[Entry, ...]
    bytes: int

    @classmethod
    def of(cls, path: str, weights: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> "Layout":
        """The layout of the weights below `path`, in `dtypes` where these name one, else in their own.

        Weights that are trained belong to no row: they stay where the optimizer has them.
        """
        entries, offset = [], 0
        for name, weight in weights.items():
            if not name.startswith(f"{path}.") or weight.requires_grad:
                continue
            entry = Entry(name, tuple(weight.shape), dtypes.get(name, weight.dtype), offset)
            entries.append(entry)
            offset += -(-weight.numel() * entry.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        return cls(tuple(entries), offset)

    def fill(self, row: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Copy `weights` into `row`, each in its dtype."""
        for entry in self.entries:
            entry.view(row).copy_(weights[entry.name])


class PinnedMemory:
    """Page-locked host memory, from which a card copies without help, and how much of it there may be."""

    def __init__(self, share: float = PINNED_SHARE) -> None:
        self._share = share
        self._limit: float | None = None
        self.bytes = 0

    def pin(self, row: Tensor) -> bool:
        """Lock the pages under `row` as long as it lives; whether that was possible.

        The memory is registered in place: torch's own pinned allocator rounds each request up to a power of two.
        """
        if self._limit is None:
            self._limit = self._share * available_ram()
        if self.bytes + row.nbytes > self._limit:
            return False
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(row.data_ptr(), row.nbytes, 0)) != 0:
            log.warning("The system refuses to pin %.1f GB of memory; copies to the card are slower.", row.nbytes / GIB)
            self._limit = 0.0
            return False
        self.bytes += row.nbytes
        return True

    def unpin(self, row: Tensor) -> None:
        torch.cuda.cudart().cudaHostUnregister(row.data_ptr())
        self.bytes -= row.nbytes


PINNED = PinnedMemory()
"""Of this process."""


class Slab:
    """A row of bytes where a block rests, in host memory that is pinned if asked and if there is room."""

    def __init__(self, size: int, device: torch.device, pin: bool) -> None:
        # Slabs outlive the run that makes them, so they must not be tensors of a host's inference mode.
        with torch.inference_mode(False):
            self.row = torch.empty(size, dtype=torch.uint8, device=device)
        self.pinned = pin and device.type == "cpu" and PINNED.pin(self.row)
        if self.pinned:
            weakref.finalize(self, PINNED.unpin, self.row)
