"""What a run touches: files, processes and servers, seen through Python's audit events and the times of decoy files."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ADDED_OPEN = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
            "shutil.rmtree", "shutil.move", "shutil.copyfile")  # fmt: skip
LISTING = ("os.listdir", "os.scandir", "glob.glob")
STARTING = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn")
REACHING = ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request")
SYSTEM = ("/etc/passwd", "/etc/shadow", "/etc/hostname", "/dev/zero", "/dev/random", "/proc/self/environ")
PRIVATE = Path.home() / ".ssh"


class StartedError(BaseException):
    """A process of this pack would be started now: everything that leads to it has been seen."""


@dataclass
class Watch:
    """Where a run may read and write; what it did elsewhere stands in `seen`.

    Attributes:
        written: folders that may be written to.
        decoys: a folder that nothing may be read from.
        own_processes: the program and script of processes that may be started; they are not started while it watches.
    """

    written: tuple[Path, ...]
    decoys: Path
    own_processes: tuple[str, ...] = ()
    seen: list[str] = field(default_factory=list)
    active: bool = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """One audit event."""
        if event == "open":
            self._opened(*arguments)
        elif event in CHANGING:
            folders = [found for found in arguments if isinstance(found, int) and found >= 0][-1:]
            for place in arguments[:2]:
                # Python's own cleaning up names files from an open folder.
                inside = Path(f"/proc/self/fd/{folders[0]}") if folders and event != "os.mkdir" else Path()
                self._changed(event, inside / place if isinstance(place, str) else place)
        elif event in LISTING:
            self._read(event, arguments[0])
        elif event in REACHING:
            self.seen.append(f"{event} {arguments[1:]!r:.100}")
        elif event in STARTING:
            command = list(arguments[1]) if event == "subprocess.Popen" else []
            if self.own_processes and [str(word) for word in command[:2]] == list(self.own_processes):
                raise StartedError
            self.seen.append(f"{event} {arguments!r:.200}")

    def _opened(self, place: Any, mode: str | None, flags: int) -> None:
        writes = bool(flags & ADDED_OPEN) if isinstance(flags, int) else bool(set(mode or "") & set("wax+"))
        if writes:
            self._changed("open for writing", place)
        else:
            self._read("open", place)

    def _changed(self, event: str, place: Any) -> None:
        path = _absolute(place)
        if path is None or path == Path(os.devnull) or "__pycache__" in path.parts:
            return
        if not any(path.is_relative_to(folder) for folder in self.written):
            self.seen.append(f"{event} {path}")

    def _read(self, event: str, place: Any) -> None:
        path = _absolute(place)
        if path is None:
            return
        if path.is_relative_to(self.decoys) or path.is_relative_to(PRIVATE) or str(path).startswith(SYSTEM):
            self.seen.append(f"{event} {path}")

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[str]]:
        """What is seen inside the block. Times of the decoys tell of readers that raise no audit event."""
        self.seen = []
        before = aged(self.decoys)
        _hook.watch = self
        try:
            yield self.seen
        finally:
            _hook.watch = None
        after = {path: mark(path) for path in before}
        self.seen += [f"touched {path}" for path, mark in before.items() if after[path] != mark]


class _Hook:
    """The one audit hook of this process; hooks cannot be taken away again."""

    def __init__(self) -> None:
        self.watch: Watch | None = None
        self.is_busy = False
        sys.addaudithook(self.take)

    def take(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.watch is None or self.is_busy:
            return
        self.is_busy = True
        try:
            self.watch(event, arguments)
        finally:
            self.is_busy = False


_hook = _Hook()


def _absolute(place: Any) -> Path | None:
    if isinstance(place, bytes):
        place = os.fsdecode(place)
    return Path(os.path.realpath(place)) if isinstance(place, (str, Path)) and str(place) else None


def mark(path: Path) -> tuple[int, int, int]:
    with contextlib.suppress(OSError):
        stat = path.lstat()
        return stat.st_size, stat.st_mtime_ns, stat.st_atime_ns
    return (-1, -1, -1)


def aged(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """The files below `folder`, as if they had been read long before they were written: the next reader shows."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        os.utime(path, (1, path.stat().st_mtime))
    return {path: mark(path) for path in files}
