"""The order that streams and events give to copies and computation, on a simulated card.

A card runs what is given to a stream in order, and nothing else is in order but what events make so. The simulation
keeps, for each stream, which work is known to be done before what comes next (a vector clock), and checks that no copy
overwrites a slot that is still read and that no block reads a slot that is still written."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from wan_core.offload import blocks, streaming
from wan_core.offload.streaming import place
from wan_core.offload.weights import WeightProvider

CPU = torch.device("cpu")


class Stream:
    def __init__(self, card, device=None) -> None:
        self.card, self.done = card, {}
        card.streams.append(self)
        self.name = len(card.streams)

    def give(self, what: str) -> None:
        """Work that comes after all that this stream waited for."""
        self.done = {**self.done, self.name: self.done.get(self.name, 0) + 1}
        self.card.work.append((what, self.name, dict(self.done)))

    def wait_event(self, event) -> None:
        for name, count in event.done.items():
            self.done[name] = max(self.done.get(name, 0), count)

    def wait_stream(self, other) -> None:
        self.wait_event(other)


class Event:
    def __init__(self) -> None:
        self.done: dict[int, int] = {}

    def record(self, stream: Stream) -> None:
        self.done = dict(stream.done)

    def synchronize(self) -> None: ...


class Card:
    """What of `torch.cuda` the engine uses."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.work: list[tuple[str, int, dict[int, int]]] = []
        self.compute = Stream(self)
        self.active = self.compute
        self.Event = Event

    def Stream(self, device) -> Stream:
        return Stream(self)

    def current_stream(self, device) -> Stream:
        return self.active

    @contextmanager
    def stream(self, stream: Stream):
        before, self.active = self.active, stream
        yield
        self.active = before


class Simulated(streaming.ParallelCopies):
    """Tells the card of each copy."""

    def __init__(self, card: Card) -> None:
        super().__init__(CPU)
        self.card = card

    def start(self, slot, target, source) -> None:
        super().start(slot, target, source)
        stream = self._stream
        stream.give(f"write {slot}")
        self._done[slot].record(stream)


@pytest.fixture
def card(monkeypatch):
    card = Card()
    monkeypatch.setattr(streaming, "torch", SimpleNamespace(**{**vars(torch), "cuda": card}))
    monkeypatch.setattr(blocks.PINNED, "pin", lambda row: False)
    return card


def run(card: Card, order: list[int], passes: int = 3, count: int = 5) -> None:
    net = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(4, 4) for _ in range(count))}).requires_grad_(False)
    provider = WeightProvider.of(net)
    with provider.working(CPU, place(provider.inventory(), parameters=0), copies=Simulated(card)) as stream:
        slots = [row.data_ptr() for row in stream._slots]

        def reads(module, *_) -> None:
            card.compute.give(f"read {slots.index(module.weight.data_ptr())}")

        for block in net["blocks"]:
            block.register_forward_hook(reads, prepend=True)
        for _ in range(passes):
            for index in order:
                net["blocks"][index](torch.zeros(1, 4))


def before(first, second) -> bool:
    """Whether the card is sure to have done `first` when it begins `second`."""
    _, name, done = first
    return second[2].get(name, 0) >= done[name]


def races(work) -> list[tuple[str, str]]:
    found = []
    for index, later in enumerate(work):
        for earlier in work[:index]:
            same_slot = earlier[0][-1] == later[0][-1]
            if same_slot and "write" in earlier[0] + later[0] and not before(earlier, later):
                found.append((earlier[0], later[0]))
    return found


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4], [4, 2, 0, 2, 3], [3, 2, 1, 0]])
def test_no_slot_is_read_and_written_at_once(card, order):
    run(card, order)
    assert sum("read" in what for what, *_ in card.work) == 3 * len(order)
    assert not races(card.work)


def test_a_copy_runs_beside_the_block_before(card):
    """The copy of a block must not wait for the block that computes meanwhile: that is the whole point."""
    run(card, [0, 1, 2, 3, 4])
    reads = [entry for entry in card.work if "read" in entry[0]]
    writes = [entry for entry in card.work if "write" in entry[0]]
    beside = [not before(reads[number], writes[number + 1]) for number in range(len(writes) - 1)]
    assert all(beside) and len(beside) >= 14


@pytest.mark.parametrize("left_out", ["mark", "finish"])
def test_the_simulation_finds_races(card, monkeypatch, left_out):
    if left_out == "mark":
        # Copies that wait for nothing.
        monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    else:
        monkeypatch.setattr(streaming.ParallelCopies, "finish", lambda self, slot: None)
    run(card, [0, 1, 2, 3, 4])
    assert races(card.work)


def test_pinned_memory_is_capped_and_falls_back(monkeypatch):
    asked = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda pointer, size, flags: asked.append(size) or int(size == 300),
        cudaHostUnregister=lambda pointer: asked.append(-1),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(blocks, "available_ram", lambda: 2000)
    pinned = blocks.PinnedMemory(share=0.5)
    rows = {size: torch.empty(size, dtype=torch.uint8) for size in (600, 500, 300, 100)}
    assert pinned.pin(rows[600]) and pinned.bytes == 600
    assert not pinned.pin(rows[500]), "more than half of what was free"
    assert pinned.pin(rows[100])
    pinned.unpin(rows[600])
    assert pinned.bytes == 100 and asked == [600, 100, -1]
    assert not pinned.pin(rows[300]), "the system refused"
    assert not pinned.pin(rows[100]), "and is not asked again"
