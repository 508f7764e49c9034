"""Streamed blocks: which blocks of a module stay on the device, and how the others pass through two slots there, each
copied one block ahead.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..runtime import gigabytes
from .blocks import FlatBuffer, FlatLayout, Weight, blocks_of, tables_of, weights_of
from .quant import parameter_counts

SLOTS = 2
"""Places on the device for streamed blocks: one that computes, one that is filled meanwhile."""


@dataclass(frozen=True)
class WeightSizes:
    """Size of some weights."""

    bytes: int
    parameters: int


@dataclass(frozen=True)
class Inventory:
    """The weights of a module: `blocks` in the order in which a pass runs them, and those `outside` of them.

    Blocks that are `idle` in every pass, and tables, which are used where they are kept, are in neither.
    """

    outside: WeightSizes
    blocks: Mapping[str, WeightSizes]
    idle: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        module: nn.Module,
        dtypes: Mapping[str, torch.dtype],
        order: Sequence[str] | None = None,
        idle: Collection[str] = (),
    ) -> "Inventory":
        """The inventory of `module`, whose weights work in `dtypes` where these name one.

        Args:
            order: the blocks that can be streamed, as a pass runs them; all of them one after the other if None.
            idle: blocks that no pass will run.
        """
        paths = blocks_of(module) if order is None else order
        weights, counts = weights_of(module), parameter_counts(module)
        layouts = {path: FlatLayout.of(path, weights, dtypes) for path in paths if path not in idle}
        apart = tuple(f"{path}." for path in (*layouts, *idle))
        tables = tables_of(module)
        # What is trained counts as outside wherever it is: it is never streamed.
        outside = {
            name: weight
            for name, weight in weights.items()
            if weight.requires_grad or not (name.startswith(apart) or name in tables)
        }
        size = sum(weight.numel() * dtypes.get(name, weight.dtype).itemsize for name, weight in outside.items())
        return cls(
            WeightSizes(size, sum(counts[name] for name in outside)),
            {
                path: WeightSizes(layout.bytes, sum(counts[entry.name] for entry in layout.entries))
                for path, layout in layouts.items()
            },
            frozenset(idle),
        )

    @property
    def bytes(self) -> int:
        return self.outside.bytes + sum(block.bytes for block in self.blocks.values())


@dataclass(frozen=True)
class Placement:
    """Where the blocks of a module are while it works.

    Attributes:
        inventory: what is placed.
        streamed: the blocks that are copied to the device each time their turn comes, in the order of a pass.
    """

    inventory: Inventory
    streamed: tuple[str, ...] = ()

    @property
    def resident(self) -> tuple[str, ...]:
        """The blocks that are on the device for the whole run."""
        return tuple(name for name in self.inventory.blocks if name not in set(self.streamed))

    @property
    def resident_bytes(self) -> int:
        """Everything that stays on the device, what lies outside of blocks included."""
        return self.inventory.outside.bytes + sum(self.inventory.blocks[name].bytes for name in self.resident)

    @property
    def slot_bytes(self) -> int:
        """Both slots together."""
        return SLOTS * max((self.inventory.blocks[name].bytes for name in self.streamed), default=0)

    @property
    def device_bytes(self) -> int:
        """All that the weights take on the device."""
        return self.resident_bytes + self.slot_bytes

    @property
    def streamed_bytes(self) -> int:
        """What is copied to the device in each pass through the blocks."""
        return sum(self.inventory.blocks[name].bytes for name in self.streamed)

    def summary(self) -> str:
        """In words: "12 of 40 blocks stay on the device (9.1 GB), 28 are streamed (19.2 GB per pass)"."""
        total, streamed = len(self.inventory.blocks), len(self.streamed)
        if not streamed:
            return f"all weights stay on the device ({gigabytes(self.device_bytes)})"
        return (
            f"{total - streamed} of {total} blocks stay on the device ({gigabytes(self.device_bytes)} with what is "
            f"under way), {streamed} are streamed ({gigabytes(self.streamed_bytes)} per pass)"
        )


def place(inventory: Inventory, budget: float | None = None, parameters: int | None = None) -> Placement:
    """The placement with the fewest streamed blocks whose weights take at most `budget` bytes on the device, and which
    keeps at most `parameters` parameters there.

    When even full streaming takes more, everything is streamed: that is the least there is.
    """
    names = list(inventory.blocks)

    def fits(placement: Placement) -> bool:
        kept = inventory.outside.parameters + sum(inventory.blocks[name].parameters for name in placement.resident)
        within = parameters is None or kept <= parameters or not placement.resident
        return within and (budget is None or placement.device_bytes <= budget)

    placement = Placement(inventory)
    for count in range(len(names) + 1):
        # Evenly spaced, so that each copy has as many resident blocks as possible to run beside.
        spaced = (math.floor((index + 0.5) * len(names) / count) for index in range(count))
        placement = Placement(inventory, tuple(names[index] for index in spaced))
        if fits(placement):
            break
    return placement


class Copies(Protocol):
    """How weights get to a device, and how computation there waits for them.

    Attributes:
        reads_pinned: whether copies from pinned memory run beside the device's own work.
    """

    reads_pinned: bool

    def whole(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` on the device in `dtype`; itself if it is there already."""
        ...

    def mark(self) -> None:
        """Copies that start from here on wait for the device's work so far, and for none that is queued later."""
        ...

    def start(self, slot: int, target: Tensor, source: Tensor) -> None:
        """Begin to copy `source` over `target`, after all work that was queued before the mark."""
        ...

    def finish(self, slot: int) -> None:
        """Let the device's next work wait until the copy into `slot` is done; the host goes on."""
        ...

    def source_is_free(self, slot: int) -> None:
        """Return when the source of the last copy into `slot` may be overwritten."""
        ...

    def close(self) -> None:
        """Let the device wait for all copies, so that slots can be given back."""
        ...


class PlainCopies:
    """Copies in the order of the device's own work: for every device without a stream of copies beside it."""

    reads_pinned = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def whole(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(self._device, dtype)

    def mark(self) -> None: ...

    def start(self, slot: int, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def finish(self, slot: int) -> None: ...

    def source_is_free(self, slot: int) -> None: ...

    def close(self) -> None: ...


class ParallelCopies:
    """Copies on a CUDA (or ROCm) stream of their own; streams wait for each other by events, the host never does."""

    reads_pinned = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._done = [torch.cuda.Event() for _ in range(SLOTS)]
        self._mark = torch.cuda.Event()

    def whole(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(self._device, dtype, non_blocking=True)

    def mark(self) -> None:
        self._mark.record(torch.cuda.current_stream(self._device))

    def start(self, slot: int, target: Tensor, source: Tensor) -> None:
        self._stream.wait_event(self._mark)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            self._done[slot].record(self._stream)

    def finish(self, slot: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._done[slot])

    def source_is_free(self, slot: int) -> None:
        self._done[slot].synchronize()

    def close(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


def copies_for(device: torch.device) -> Copies:
    """The best way to copy to `device`."""
    return ParallelCopies(device) if device.type == "cuda" else PlainCopies(device)


@dataclass(frozen=True, eq=False)
class StreamedBlock:
    """A block whose weights are copied to the device each time its turn comes.

    Attributes:
        weights: those in `layout`, by name.
        buffer: the flat buffer that they are views of; None when they are read from elsewhere (a mapped file, another
            dtype) each time.
    """

    path: str
    module: nn.Module
    layout: FlatLayout
    weights: Mapping[str, Weight]
    buffer: FlatBuffer | None

    def source(self, staging: FlatBuffer | None) -> Tensor:
        """The bytes of the block in host memory; read into `staging` if it has no buffer of its own."""
        if self.buffer is not None:
            return self.buffer.bytes
        assert staging is not None, "a block without a buffer needs staging"
        flat = staging.bytes[: self.layout.bytes]
        self.layout.fill(flat, {name: weight.offloaded for name, weight in self.weights.items()})
        return flat

    def arrive(self, slot: Tensor) -> None:
        """Let the weights be views of `slot`."""
        for entry in self.layout.entries:
            self.weights[entry.name].arrive(entry.view(slot))

    def leave(self) -> None:
        """Let the weights be where they are offloaded again."""
        for weight in self.weights.values():
            weight.leave()


class BlockStream:
    """Has the weights of the block that computes on `device`, and copies those of the next one meanwhile.

    Hooks call `begin` and `end` around each block. From that it learns the order: after the first pass it knows what
    follows each pair of blocks, so that a backward pass, or a branch that is left out, is read ahead as well. The first
    block of the next pass is copied at the end of a pass and waits in its slot, however many steps are skipped.

    Attributes:
        copied: bytes brought to the device so far.
    """

    def __init__(self, blocks: Sequence[StreamedBlock], device: torch.device, copies: Copies) -> None:
        """`blocks` in the order in which a pass is expected to run them."""
        self._blocks, self._copies = blocks, copies
        self._index = {block.path: index for index, block in enumerate(blocks)}
        size = max(block.layout.bytes for block in blocks)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        # Blocks of a mapped file or another dtype are read into (pinned) host memory first, so that the copy to the
        # device runs beside the computation. One staging buffer per slot: a copy may still read the other one.
        self._staging: list[FlatBuffer | None] = [None] * SLOTS
        if any(block.buffer is None for block in blocks):
            self._staging = [FlatBuffer(size, torch.device("cpu"), copies.reads_pinned) for _ in range(SLOTS)]
        self._content: list[int | None] = [None] * SLOTS
        self._after: dict[tuple[int | None, int], int] = {}
        self._before: int | None = None
        self._current: int | None = None
        self.copied = 0

    def __enter__(self) -> "BlockStream":
        self._copies.mark()
        self._fetch(0, 0)
        return self

    def __exit__(self, *_: object) -> None:
        for index in self._content:
            if index is not None:
                self._blocks[index].leave()
        self._copies.close()
        self._slots.clear()

    @contextmanager
    def around(self, module: nn.Module) -> Iterator[None]:
        """`begin` and `end` around a run of the block `module` that calls no hooks, such as the second forward of
        activation checkpointing; nothing for other modules.
        """
        path = next((block.path for block in self._blocks if block.module is module), None)
        if path is None:
            yield
            return
        self.begin(path)
        try:
            yield
        finally:
            self.end(path)

    def begin(self, path: str) -> None:
        """Have the weights of the block at `path` on the device for what runs next; nothing for other blocks."""
        index = self._index.get(path)
        if index is None or index == self._current:
            return
        # Whatever reads the other slot is in the device's queue by now, so a copy into it has to wait for no more.
        self._copies.mark()
        if self._current is not None:
            self._after[self._before, self._current] = index
        if index not in self._content:
            self._fetch(index, self._free_slot())
        slot = self._content.index(index)
        self._copies.finish(slot)
        self._blocks[index].arrive(self._slots[slot])
        self._before, self._current = self._current, index

    def end(self, path: str) -> None:
        """Fetch the block that follows: the device has work now, while the host may have to read a file."""
        index = self._index.get(path)
        if index is None:
            return
        following = self._after.get((self._before, index), (index + 1) % len(self._blocks))
        if following not in self._content:
            self._fetch(following, self._free_slot())

    def _free_slot(self) -> int:
        """The slot that the current block is not in."""
        return 1 - self._content.index(self._current) if self._current in self._content else 0

    def _fetch(self, index: int, slot: int) -> None:
        old = self._content[slot]
        if old is not None:
            self._blocks[old].leave()
        block, staging = self._blocks[index], self._staging[slot]
        if block.buffer is None:
            # The last copy into this slot may still read its staging buffer. Only here does the host wait for a device.
            self._copies.source_is_free(slot)
        self._copies.start(slot, self._slots[slot][: block.layout.bytes], block.source(staging))
        self._content[slot] = index
        self.copied += block.layout.bytes
