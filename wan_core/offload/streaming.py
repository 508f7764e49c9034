"""Blocks whose weights rest in host memory and pass through two slots on the device, copied one ahead of their turn."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from .blocks import Layout, Slab
from .placement import SLOTS


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
        """From here on, copies need not wait for work that is given to the device later."""
        ...

    def start(self, slot: int, target: Tensor, source: Tensor) -> None:
        """Begin to copy `source` over `target`, after all work that was given to the device before the mark."""
        ...

    def finish(self, slot: int) -> None:
        """Let the device wait, before whatever comes next, until the copy into `slot` is done."""
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


class StreamedBlock:
    """A block, the row that its weights make, and where they rest.

    Args:
        slab: the row in host memory, which the resting weights are views of; None when they are read from elsewhere
            (a mapped file, another dtype) each time.
    """

    def __init__(self, module: nn.Module, layout: Layout, weights: Mapping[str, Tensor], slab: Slab | None) -> None:
        self.module, self.layout, self._slab = module, layout, slab
        self._weights = {entry.name: weights[entry.name] for entry in layout.entries}
        self._resting = {name: weight.data for name, weight in self._weights.items()}

    @property
    def needs_staging(self) -> bool:
        return self._slab is None

    def source(self, staging: Slab | None) -> Tensor:
        """The row in host memory; read into `staging` if the block has no slab of its own."""
        if self._slab is not None:
            return self._slab.row
        assert staging is not None, "a block without a slab needs staging"
        row = staging.row[: self.layout.bytes]
        self.layout.fill(row, self._resting)
        return row

    def point_to(self, slot: Tensor) -> None:
        """Let the weights be views of `slot`."""
        for entry in self.layout.entries:
            self._weights[entry.name].data = entry.view(slot)

    def rest(self) -> None:
        """Let the weights be where they rest again."""
        for name, weight in self._weights.items():
            weight.data = self._resting[name]


class BlockStream:
    """Keeps the weights of the block that computes on `device`, and copies those of the next one meanwhile.

    It learns the order from what runs: after the first pass it knows what follows each pair of blocks, so that a
    backward pass, or a branch that is left out, is read ahead as well. When the first block of the next pass was copied
    at the end of a pass, it waits in its slot, however many steps are skipped in between.

    Attributes:
        copied: bytes brought to the device so far.
    """

    def __init__(self, blocks: Sequence[StreamedBlock], device: torch.device, copies: Copies) -> None:
        """`blocks` in the order in which a pass is expected to run them."""
        self._blocks, self._copies = blocks, copies
        self._index = {id(block.module): index for index, block in enumerate(blocks)}
        size = max(block.layout.bytes for block in blocks)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self._staging: list[Slab | None] = [None] * SLOTS
        if any(block.needs_staging for block in blocks):
            self._staging = [Slab(size, torch.device("cpu"), copies.reads_pinned) for _ in range(SLOTS)]
        self._content: list[int | None] = [None] * SLOTS
        self._after: dict[tuple[int | None, int], int] = {}
        self._before: int | None = None
        self._current: int | None = None
        self._hooks = ExitStack()
        self.copied = 0

    def __enter__(self) -> "BlockStream":
        for index, block in enumerate(self._blocks):
            # Before all other hooks of the block: those may change the weights that come here.
            before = block.module.register_forward_pre_hook(lambda *_, i=index: self._enter_block(i), prepend=True)
            after = block.module.register_forward_hook(lambda *_, i=index: self._read_ahead(i))
            self._hooks.callback(before.remove)
            self._hooks.callback(after.remove)
        self._copies.mark()
        self._fetch(0, 0)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        for index in self._content:
            if index is not None:
                self._blocks[index].rest()
        self._copies.close()
        self._slots.clear()

    @contextmanager
    def around(self, module: nn.Module) -> Iterator[None]:
        """Around a run of `module` that its hooks do not see, such as one for a backward pass; other modules pass."""
        index = self._index.get(id(module))
        if index is None:
            yield
            return
        self._enter_block(index)
        try:
            yield
        finally:
            self._read_ahead(index)

    def _enter_block(self, index: int) -> None:
        if index == self._current:
            return
        # All that reads the other slot has been given to the device; what this block adds reads its own.
        self._copies.mark()
        if self._current is not None:
            self._after[self._before, self._current] = index
        if index not in self._content:
            self._fetch(index, self._free_slot())
        slot = self._content.index(index)
        self._copies.finish(slot)
        self._blocks[index].point_to(self._slots[slot])
        self._before, self._current = self._current, index

    def _read_ahead(self, index: int) -> None:
        """Fetch the block that follows. The device has work by now, while the host may have to read a file."""
        following = self._after.get((self._before, index), (index + 1) % len(self._blocks))
        if following not in self._content:
            self._fetch(following, self._free_slot())

    def _free_slot(self) -> int:
        """The slot that the present block is not in."""
        return 1 - self._content.index(self._current) if self._current in self._content else 0

    def _fetch(self, index: int, slot: int) -> None:
        old = self._content[slot]
        if old is not None:
            self._blocks[old].rest()
        block, staging = self._blocks[index], self._staging[slot]
        if block.needs_staging:
            self._copies.source_is_free(slot)
        self._copies.start(slot, self._slots[slot][: block.layout.bytes], block.source(staging))
        self._content[slot] = index
        self.copied += block.layout.bytes
