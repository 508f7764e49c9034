"""Training in a separate process, followed through the files that it writes. Knows no ComfyUI.

The process gets a process group of its own, an argument list and no shell. Its output goes into a log and its progress
into an event file, so that both outlive the program that started it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from wan_core.atomic import try_lock
from wan_core.files import is_special
from wan_core.parallel.processes import OWN_GROUP

POLL = 0.25
"""Seconds between two looks at the process."""
PATIENCE = 120.0
"""Seconds that a run has to finish its step and save after it is asked to stop."""
GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL."""
TAIL = 40
"""Lines of the log that an error shows."""

Event = Mapping[str, Any]


class ChildError(RuntimeError):
    """The process failed; the text is its own message, with the path of its log.

    Attributes:
        message: without the path.
    """

    def __init__(self, message: str, launch: "Launch", code: int) -> None:
        super().__init__(f"{message}\n(The process ended with code {code}; its log is {launch.log}.)")
        self.message = message


@dataclass(frozen=True)
class Launch:
    """A process to be started.

    Attributes:
        command: program and arguments.
        folder: its working directory, with its events in `events.jsonl` and its log in `log.txt`; a file `stop` in it
            asks the process to stop.
        environment: variables in addition to those of this process.
    """

    command: Sequence[str]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def events(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def stop(self) -> Path:
        return self.folder / "stop"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"


def pack_command(pack: Path, module: str, words: Sequence[str], processes: int = 1) -> list[str]:
    """The command that runs a module of the pack in `pack` with this Python; accelerate starts several processes."""
    begin = [sys.executable]
    if processes > 1:
        # Not by Python's own -m, which would import files from the folder of the run.
        begin += [str(pack / "pack.py"), "-m", "accelerate.commands.launch"]
        begin += ["--multi_gpu", "--num_processes", str(processes)]
        begin += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*begin, str(pack / "pack.py"), module, *words]


def supervise(
    launch: Launch,
    on_event: Callable[[Event], None],
    check_cancelled: Callable[[], None],
    patience: float = PATIENCE,
) -> list[Event]:
    """Start the process, call `on_event` with its events while it runs, and return all of them when it has succeeded.

    An exception of `check_cancelled` or `on_event` ends the process: by its stop file, after `patience` seconds by
    SIGTERM, then by SIGKILL. The exception propagates after that. An earlier process that still works in the folder is
    waited for.

    Raises:
        ChildError: the process failed.
        ValueError: its log or event file cannot be written, because a folder, pipe or device has their name.
    """
    launch.folder.mkdir(parents=True, exist_ok=True)
    for file in (launch.log, launch.events):
        if is_special(file):
            raise ValueError(f"{file} must be a file or not exist; it is a folder, pipe or device. Remove it.")
    with _locked_log(launch, on_event, check_cancelled) as log:
        launch.stop.unlink(missing_ok=True)
        tail, begin = _Tail(launch.events), launch.log.stat().st_size
        seen: list[Event] = []

        def forward_events() -> None:
            for event in tail.new():
                seen.append(event)
                on_event(event)

        child = _start(launch, log)
        try:
            while child.poll() is None:
                check_cancelled()
                forward_events()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(POLL)
            forward_events()
        except BaseException:
            with contextlib.suppress(Exception):
                on_event({"event": "stopping"})
            _end(child, launch, patience)
            raise
        finally:
            if child.stdin is not None:
                child.stdin.close()
    if child.returncode:
        raise ChildError(_error_message(launch, seen, begin), launch, child.returncode)
    return seen


class _Tail:
    """The events that are added to a file after this object is made."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._position = file.stat().st_size if file.exists() else 0
        self._incomplete = b""

    def new(self) -> Iterator[Event]:
        """Those since the last call. An incomplete line is kept for the next; one that is not an event is skipped."""
        with contextlib.suppress(OSError), self._file.open("rb") as stream:
            stream.seek(self._position)
            added = stream.read()
            self._position += len(added)
            *lines, self._incomplete = (self._incomplete + added).split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError, RecursionError):
                    event = json.loads(line.decode("utf-8", "replace"))
                    if isinstance(event, dict) and "event" in event:
                        yield event


def _start(launch: Launch, log: BinaryIO) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", **launch.environment}
    # An allocator that ComfyUI chose for itself can make training run out of memory sooner.
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    # Ctrl-C in ComfyUI's terminal must not kill it before it has saved. Nothing is written to the pipe: when this
    # process dies, it closes, and the trainer saves and ends.
    return subprocess.Popen(
        launch.command, cwd=launch.folder, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, **OWN_GROUP
    )


@contextlib.contextmanager
def _locked_log(
    launch: Launch, on_event: Callable[[Event], None], check_cancelled: Callable[[], None]
) -> Iterator[BinaryIO]:
    """The log, open for appending and locked.

    The child inherits the open file, and with it the lock: it stays locked if this program dies before the child.
    """
    with launch.log.open("ab") as log:
        while try_lock(log) is False:
            on_event({"event": "waiting"})
            check_cancelled()
            time.sleep(POLL)
        yield log


def _end(child: subprocess.Popen[bytes], launch: Launch, patience: float) -> None:
    """End the process: by its stop file, SIGTERM, SIGKILL. A second interruption goes straight to SIGKILL."""
    try:
        try:
            launch.stop.touch()
        except OSError:
            # The disk is full; the signal asks for the same.
            _signal(child, signal.SIGTERM)
        child.wait(patience)
    except subprocess.TimeoutExpired:
        _signal(child, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
    finally:
        # Windows has no SIGKILL; there `_signal` always ends the whole tree.
        _signal(child, getattr(signal, "SIGKILL", signal.SIGTERM))
        child.wait()


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    if os.name == "nt":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(child.pid)], capture_output=True, check=False)
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _error_message(launch: Launch, seen: Sequence[Event], begin: int) -> str:
    """The process's last error event, else the end of its output in the log."""
    errors = [str(event.get("message", "")) for event in seen if event["event"] == "error"]
    with launch.log.open("rb") as stream:
        stream.seek(begin)
        text = stream.read().decode("utf-8", "replace").strip()
    return errors[-1] if errors else "\n".join(text.splitlines()[-TAIL:]) or "It wrote no message."
