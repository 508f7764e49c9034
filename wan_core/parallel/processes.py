"""The processes of a group of ranks, started and ended as one."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

POLL = 0.05
"""Seconds between two looks at the processes."""
GRACE = 5.0
"""Seconds that a process has to end by itself, or after SIGTERM, before SIGKILL."""

OWN_GROUP: dict[str, Any] = {"start_new_session": True}
if sys.platform == "win32":
    OWN_GROUP = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
"""Settings of `subprocess.Popen` for a process that Ctrl-C in this one's terminal does not reach."""

LOST = 4
"""The exit code of a rank that ends because another one has."""

MEETING, DEVICE = "WANCORE_MEETING", "WANCORE_DEVICE"
"""Variables of a rank: the file where the ranks meet, and the device where this one computes."""


class Processes:
    """Ranks 0, 1, ... of one group; their log is `rank_<number>.txt` in a folder of their own.

    They end when this process does: each reads its standard input, whose other end is here.
    """

    def __init__(self, command: Sequence[str], devices: Sequence[str], *, piped: bool = False) -> None:
        """`command` is started for each of `devices`. With `piped`, rank 0 answers on its standard output; otherwise it
        has that of this process, and its standard error too.
        """
        self.devices = tuple(devices)
        self._folder = tempfile.TemporaryDirectory(prefix="wancore_ranks_", ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name)
        self.all: list[subprocess.Popen[bytes]] = []
        try:
            for rank, device in enumerate(self.devices):
                self.all.append(self._start(command, rank, device, piped))
        except BaseException:
            self.end()
            raise

    def _start(self, command: Sequence[str], rank: int, device: str, piped: bool) -> subprocess.Popen[bytes]:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(self.devices)}
        environment: Mapping[str, str] = {
            **os.environ, **{name: str(number) for name, number in numbers.items()},
            MEETING: str(self.folder / "meeting"), DEVICE: device, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1",
        }  # fmt: skip
        inherited = rank == 0 and not piped
        with self.log(rank).open("wb") as log:
            out: Any = subprocess.PIPE if piped and rank == 0 else None if inherited else log
            errors = None if inherited else log
            # Ctrl-C reaches this process, which tells rank 0.
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=out, stderr=errors, **OWN_GROUP
            )

    def log(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.txt"

    def failure(self) -> str | None:
        """What happened to the rank that failed, if one did by itself; of its own errors rank 0 tells."""
        for rank, process in enumerate(self.all):
            code = process.poll()
            if code is not None and code not in (0, LOST) and (rank or code < 0):
                return f"Rank {rank} ({self.devices[rank]}) {self._reason(rank, code)}"
        return None

    def _reason(self, rank: int, code: int) -> str:
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"was ended by {signal.Signals(-code).name}."
        lines = self.log(rank).read_text("utf-8", "replace").strip().splitlines()
        return f"failed: {lines[-1].rstrip('.')}." if lines else f"ended with code {code}."

    @property
    def alive(self) -> bool:
        """Whether every rank is at work."""
        return bool(self.all) and all(process.poll() is None for process in self.all)

    def wait(self, rank: int, seconds: float) -> int | None:
        """The exit code of a rank, which has so many seconds to end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.all[rank].wait(seconds)
        return None

    def end(self) -> None:
        """End what still runs: by SIGTERM, and after `GRACE` seconds by SIGKILL."""
        for process in self.all:
            _signal(process, signal.SIGTERM)
        limit = time.monotonic() + GRACE
        for process in self.all:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, limit - time.monotonic()))
            # Windows has no SIGKILL; its SIGTERM ends a process at once.
            _signal(process, getattr(signal, "SIGKILL", signal.SIGTERM))
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        self._folder.cleanup()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


def end_with_parent() -> None:
    """End this process when its standard input is closed, as it is when the process that started it ends."""

    def watch() -> None:
        with contextlib.suppress(OSError, ValueError):
            while os.read(0, 4096):
                pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
