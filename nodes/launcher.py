"""Training as a process of its own, watched through the files that it writes. Knows no ComfyUI.

The process gets a group of its own, an argument list and no shell; its output goes into a log, what it says of itself
comes from its event file. Both survive whoever watches.
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

POLL = 0.25
"""Seconds between two looks at the process."""
PATIENCE = 120.0
"""Seconds that a run has for finishing its step and saving, once it is asked to stop."""
GRACE = 10.0
"""Seconds between asking a process to leave and ending it."""
TAIL = 40
"""Lines of the log that an error shows."""

Event = Mapping[str, Any]


class ChildError(RuntimeError):
    """The process failed; the message is its own, with the place of its log.

    Attributes:
        said: the message alone.
    """

    def __init__(self, said: str, launch: "Launch", code: int) -> None:
        super().__init__(f"{said}\n(The process ended with code {code}; its log is {launch.log}.)")
        self.said = said


@dataclass(frozen=True)
class Launch:
    """A process to be started.

    Attributes:
        command: program and arguments.
        folder: where it works: its events are `events.jsonl` there, a file `stop` ends it, its log is `log.txt`.
        environment: variables that it gets besides those of this process.
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
    """The command that runs a module of the pack in `pack` by this very Python; several processes by accelerate."""
    begin = [sys.executable]
    if processes > 1:
        # Not by Python's own -m, which would import what lies in the folder of the run.
        begin += [
            str(pack / "pack.py"),
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            str(processes),
        ]
        begin += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*begin, str(pack / "pack.py"), module, *words]


def attend(
    launch: Launch,
    on_event: Callable[[Event], None],
    check_cancelled: Callable[[], None],
    patience: float = PATIENCE,
) -> list[Event]:
    """Start the process, pass on its events while it works, and return them all when it has ended well.

    Whatever `check_cancelled` or `on_event` raises ends it: first by its stop file, after `patience` seconds by a
    signal, at last by force; only then does the exception go on. A process of the same folder that an earlier program
    left behind is waited for.

    Raises:
        ChildError: it ended otherwise.
        ValueError: its log or its events cannot be files, because something else has their name.
    """
    launch.folder.mkdir(parents=True, exist_ok=True)
    for file in (launch.log, launch.events):
        if is_special(file):
            raise ValueError(f"{file} must be a file or not exist; it is a folder, pipe or device. Remove it.")
    with _own_log(launch, on_event, check_cancelled) as log:
        launch.stop.unlink(missing_ok=True)
        tail, begin = _Tail(launch.events), launch.log.stat().st_size
        seen: list[Event] = []

        def pass_on() -> None:
            for event in tail.new():
                seen.append(event)
                on_event(event)

        child = _start(launch, log)
        try:
            while child.poll() is None:
                check_cancelled()
                pass_on()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(POLL)
            pass_on()
        except BaseException:
            with contextlib.suppress(Exception):
                on_event({"event": "stopping"})
            _end(child, launch, patience)
            raise
        finally:
            if child.stdin is not None:
                child.stdin.close()
    if child.returncode:
        raise ChildError(_said(launch, seen, begin), launch, child.returncode)
    return seen


class _Tail:
    """The events that are added to a file from now on."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._place = file.stat().st_size if file.exists() else 0
        self._rest = b""

    def new(self) -> Iterator[Event]:
        """Those since the last look; a line that is not whole yet waits, one that is no event is left out."""
        with contextlib.suppress(OSError), self._file.open("rb") as stream:
            stream.seek(self._place)
            added = stream.read()
            self._place += len(added)
            *lines, self._rest = (self._rest + added).split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError, RecursionError):
                    event = json.loads(line.decode("utf-8", "replace"))
                    if isinstance(event, dict) and "event" in event:
                        yield event


def _start(launch: Launch, log: BinaryIO) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", **launch.environment}
    # ComfyUI may have chosen an allocator for itself that makes training run out of memory sooner.
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    group: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return subprocess.Popen(
        launch.command, cwd=launch.folder, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, **group
    )


@contextlib.contextmanager
def _own_log(
    launch: Launch, on_event: Callable[[Event], None], check_cancelled: Callable[[], None]
) -> Iterator[BinaryIO]:
    """The log, open for appending and locked. A process keeps the lock with the log that it writes to, whatever becomes
    of the program that started it.
    """
    with launch.log.open("ab") as log:
        while try_lock(log) is False:
            on_event({"event": "waiting"})
            check_cancelled()
            time.sleep(POLL)
        yield log


def _end(child: subprocess.Popen[bytes], launch: Launch, patience: float) -> None:
    """End the process, gently first; a further interruption ends it at once."""
    try:
        try:
            launch.stop.touch()
        except OSError:
            # A full disk; the signal asks for the same.
            _signal(child, signal.SIGTERM)
        child.wait(patience)
    except subprocess.TimeoutExpired:
        _signal(child, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
    finally:
        _kill(child)


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    if os.name == "nt":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(child.pid)], capture_output=True, check=False)
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End what is left of the process and its group."""
    _signal(child, signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
    child.wait()


def _said(launch: Launch, seen: Sequence[Event], begin: int) -> str:
    """What the process said of its end: its last error event, else the end of what it wrote to the log."""
    told = [str(event.get("message", "")) for event in seen if event["event"] == "error"]
    with launch.log.open("rb") as stream:
        stream.seek(begin)
        text = stream.read().decode("utf-8", "replace").strip()
    return told[-1] if told else "\n".join(text.splitlines()[-TAIL:]) or "It said nothing."
