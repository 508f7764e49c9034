"""A group of processes that makes films for this one: one on each card, at work until they are idle for a while.

This process only sends requests and follows: what happens to a card or a process there cannot take it along. Rank 0 of
the group reads requests from its standard input and answers on its standard output; the others follow rank 0.
"""

import atexit
import contextlib
import logging
import os
import pickle
import queue
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..runtime import Cancelled, Runtime, log
from ..sampling.checkpoint import Checkpoint, RunState
from ..sampling.experts import RunInputs
from ..settings import MemorySettings, SamplerSettings
from .mesh import RankLostError, Ranks
from .processes import GRACE, POLL, Processes, end_with_parent
from .tasks import Desk, FollowFilm, exit_code_of, serve

PATIENCE = 60.0
"""Seconds that a group has to stop at the end of a step; then it is ended."""
IDLE = 600.0
"""Seconds without a request after which a group ends."""

PROGRAM = "import sys; sys.path.append(sys.argv[1]); from wan_core.parallel.cards import main; sys.exit(main())"

Request = Callable[[Desk], Iterator[Any]]


class CardsError(RuntimeError):
    """A process of the group ended or failed; the text says which and what to do."""


@dataclass(frozen=True)
class Cards:
    """The devices that make a film together, such as `cuda:0` and `cuda:1`.

    Raises:
        ValueError: there are fewer than two, or one twice.
    """

    devices: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.devices) < 2:
            raise ValueError(f"A film on several cards needs at least two devices; got {list(self.devices)}.")
        cards = [device for device in self.devices if device != "cpu"]
        if len(set(cards)) < len(cards):
            raise ValueError(f"Each card can be named once; got {list(self.devices)}.")

    def sample(self, request: "FilmRequest", runtime: Runtime, checkpoint: Checkpoint | None) -> RunState:
        """The state at the end of a run."""
        [(state, resumed)] = _group(self).ask(request.portable(checkpoint), runtime)
        if checkpoint is not None:
            checkpoint.resumed |= resumed
        return state

    def pieces(self, request: Request, runtime: Runtime) -> Iterator[Tensor]:
        """What the group yields for a request, piece by piece."""
        yield from _group(self).ask(request, runtime)

    def end(self) -> None:
        """End the group, if it is at work; the next request starts another one."""
        with _starting:
            group = _groups.pop(self, None)
        if group is not None:
            group.end()


@dataclass(frozen=True, eq=False)
class FilmRequest:
    """A run of `VideoModel.sample`; `checkpoint` is the folder of its checkpoints and how often it is saved."""

    task: FollowFilm
    inputs: RunInputs
    settings: SamplerSettings
    memory: MemorySettings
    earlier: RunState | None
    checkpoint: tuple[Path, int] | None = None

    def portable(self, checkpoint: Checkpoint | None) -> "FilmRequest":
        """The same for another process."""
        cpu, start = torch.device("cpu"), self.inputs.start
        inputs = replace(self.inputs.to(cpu), start=None if start is None else start.to(cpu))
        kept = None if checkpoint is None else (checkpoint.folder.absolute(), checkpoint.every)
        return replace(self, inputs=inputs, checkpoint=kept)

    def __call__(self, desk: Desk) -> Iterator[tuple[RunState, bool]]:
        checkpoint = None if self.checkpoint is None else Checkpoint(*self.checkpoint)
        runtime, model = replace(desk.runtime, dtype=self.task.dtype), self.task.model(desk)
        state = model.sample(
            self.inputs, self.settings, self.memory, runtime, checkpoint=checkpoint, earlier=self.earlier,
            keep=self.task.keep,
        )  # fmt: skip
        yield state, checkpoint is not None and checkpoint.resumed


_groups: "dict[Cards, _Group]" = {}
_starting = threading.Lock()


def _group(cards: Cards) -> "_Group":
    """The group of these cards, which is started if none is at work."""
    with _starting:
        found = _groups.get(cards)
        if found is None or not found.processes.alive:
            for other in [each for each in _groups if set(each.devices) & set(cards.devices)]:
                _groups.pop(other).end()  # two groups would share a card's memory
            found = _groups[cards] = _Group(cards)
        return found


@atexit.register
def _end_all() -> None:
    for cards in list(_groups):
        cards.end()


class _Group:
    def __init__(self, cards: Cards) -> None:
        self._cards, self._lock = cards, threading.Lock()
        library = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-c", PROGRAM, str(library)]
        self.processes = Processes(command, cards.devices, piped=True)
        self._answers: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self._timer: threading.Timer | None = None

    def _read(self) -> None:
        stream = self.processes.all[0].stdout
        assert stream is not None, "its output is piped"
        with contextlib.suppress(OSError, ValueError, EOFError):
            while True:
                self._answers.put(receive(stream))

    def _send(self, kind: str, value: Any = None) -> None:
        stream = self.processes.all[0].stdin
        assert stream is not None, "its input is piped"
        with contextlib.suppress(OSError, ValueError):  # it has ended, as `ask` will see
            send(stream, kind, value)

    def ask(self, request: Request, runtime: Runtime) -> Iterator[Any]:
        """What the group yields for a request. An exception of the caller, of `check_cancelled` or of `on_progress`
        stops it at the end of its step.

        Raises:
            CardsError: an earlier request is still at work, or a rank has ended.
        """
        if not self._lock.acquire(blocking=False):
            raise CardsError("The cards are at work on an earlier film: take all of its frames first, or close it.")
        answered = False
        try:
            if self._timer is not None:
                self._timer.cancel()
            self._send("do", request)
            for kind, value in self._until_end(runtime):
                if kind == "piece":
                    yield value
                answered = kind in ("end", "error")
                if kind == "error":
                    error, ends = value
                    failure = self._failure(lost=isinstance(error, RankLostError))
                    if ends:
                        self._cards.end()  # it may look alive for a moment, and the next film would get it
                    raise failure or error
        except BaseException:
            if not answered and self.processes.alive:
                self._stop()
            raise
        finally:
            if self.processes.alive:
                self._timer = threading.Timer(IDLE, self._cards.end)
                self._timer.daemon = True
                self._timer.start()
            self._lock.release()

    def _until_end(self, runtime: Runtime) -> Iterator[tuple[str, Any]]:
        while True:
            runtime.check_cancelled()
            try:
                kind, value = self._answers.get(timeout=POLL)
            except queue.Empty:
                if not self.processes.alive:
                    raise self._failure() or CardsError("The group has ended; run again.") from None
                continue
            if kind == "progress":
                runtime.on_progress(*value)
            elif kind == "log":
                log.log(*value)
            else:
                yield kind, value
                if kind in ("end", "error"):
                    return

    def _failure(self, lost: bool = False) -> CardsError | None:
        """The error of a group that has ended, or is about to since a rank is `lost`."""
        limit = time.monotonic() + GRACE
        failure = self.processes.failure()
        while failure is None and (lost or not self.processes.alive) and time.monotonic() < limit:
            time.sleep(POLL)
            failure = self.processes.failure()
        if failure is None:
            return None
        self._cards.end()
        return CardsError(
            f"{failure} The group has ended; run again. A long run goes on from its last saved step."
        )

    def _stop(self) -> None:
        self._send("cancel")
        limit = time.monotonic() + PATIENCE
        while self.processes.alive and time.monotonic() < limit:
            with contextlib.suppress(queue.Empty):
                if self._answers.get(timeout=POLL)[0] in ("end", "error"):
                    return
        self._cards.end()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.processes.end()


def send(stream: BinaryIO | Any, kind: str, value: Any) -> None:
    """Write a message; the reader may be any process of this pack."""
    content = pickle.dumps((kind, value))
    stream.write(struct.pack("<Q", len(content)) + content)
    stream.flush()


def receive(stream: BinaryIO | Any) -> tuple[str, Any]:
    """The next message.

    Raises:
        EOFError: the writer has ended.
    """
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError
    kind, value = pickle.loads(stream.read(struct.unpack("<Q", header)[0]))
    return kind, value


@dataclass
class _Leader:
    """Rank 0 of a group: what it is asked, and how it answers."""

    answers: BinaryIO
    requests: "queue.SimpleQueue[Request]" = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    _lock: Any = field(default_factory=threading.Lock)

    def read(self) -> None:
        with contextlib.suppress(OSError, ValueError, EOFError):
            while True:
                kind, value = receive(sys.stdin.buffer)
                if kind == "cancel":
                    self.cancelled.set()
                else:
                    self.requests.put(value)
        os._exit(0)  # who asked is gone

    def answer(self, kind: str, value: Any = None) -> None:
        with self._lock:
            send(self.answers, kind, value)

    def progress(self, phase: str, done: int, total: int, latents: Tensor | None) -> None:
        self.answer("progress", (phase, done, total, None if latents is None else latents.cpu()))

    def check_cancelled(self) -> None:
        if self.cancelled.is_set():
            raise Cancelled

    def emit(self, record: logging.LogRecord) -> None:
        self.answer("log", (record.levelno, record.getMessage()))


def main() -> int:
    """A process of a group, until it has no more work."""
    leader = _Leader(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # what anything prints goes to the log
    ranks = Ranks.of_environment("cpu")
    assert ranks is not None, "a group has started it"
    runtime = Runtime(device=ranks.device, dtype=torch.bfloat16, ranks=ranks)
    if not ranks.leads:
        end_with_parent()
        try:
            serve(runtime)
        except Exception as error:
            return exit_code_of(error)
        return 0
    threading.Thread(target=leader.read, daemon=True).start()
    handler = logging.Handler()
    handler.emit = leader.emit  # type: ignore[method-assign]  # a handler is made of this one method
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    desk = Desk(replace(runtime, on_progress=leader.progress, check_cancelled=leader.check_cancelled))
    while True:
        request = leader.requests.get()
        leader.cancelled.clear()
        try:
            for piece in request(desk):
                leader.answer("piece", piece)
            leader.answer("end")
        except Exception as error:
            leader.answer("error", (portable(error), ranks.broken))
            if ranks.broken:
                return exit_code_of(error)


def portable(error: Exception) -> Exception:
    """`error`, or what it says where another process could not read it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
