"""Files that appear under their name all at once, when they are whole, or not at all.

A file is written under a partial name beside its own, and its writer keeps the partial file locked. The operating
system ends the lock with the process, whatever ends it. So the next writer in a folder can tell what a killed process
left from what another is writing: it removes the one and leaves the other alone. Files have the umask's mode.
"""

import contextlib
import errno
import hashlib
import os
import re
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO

from .files import MAX_NAME_BYTES, is_special

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

WINDOWS = os.name == "nt"

MARK = ".wancore-part"
PARTIAL = re.compile(rf"\..*{re.escape(MARK)}\d*(\.[^.]*)?")
"""Names of files that are being written: `.video_00001_.wancore-part.mp4`."""

LOOKS, PAUSE = 10, 0.01
"""How often and after how many seconds a partial file is tried again: who cleans a folder locks it for a moment."""

SETTLED = 60.0 if WINDOWS else float("-inf")
"""Seconds after its last change from which on an unlocked partial file is taken for a dead one. Windows renames only
what is closed, so that there a file that is just becoming whole is unlocked for a moment.
"""

LOCK_PLACE = 2**40
"""The byte that is locked on Windows, beyond the end of any file here, so that others may still read and write it."""

HELD = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK}
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EINVAL, errno.EACCES}

_being_written: set[Path] = set()


@dataclass
class NewFile:
    """A new file: write to `partial`. `path` is its name, and after the block for certain."""

    partial: Path
    path: Path


@contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """A file to write to, of the same suffix as `path`. It becomes `path`, in place of what is there, when the block
    ends well; after an error nothing is left of it. Several may write one path at once: the last one stays.

    With `sync` its content is on the disk before it takes the name.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clean(path.parent)
    slots = (partial_path(path, slot) for slot in count(1))
    partial, lock = next((slot, lock) for slot in slots if (lock := _take(slot, looks=2)) is not None)
    with _held(partial, lock, path):
        yield partial
        if sync:
            sync_file(partial)
        if WINDOWS:
            lock.close()
        partial.replace(path)


@contextmanager
def creating(path: Path) -> Iterator[Path]:
    """A file to write to, of the same suffix as `path`, a name that must be free and is this writer's from the start.

    Raises:
        ValueError: the name is taken, another process writes it, or the folder cannot be written to.
    """
    with creating_first([path]) as file:
        yield file.partial


@contextmanager
def creating_first(paths: Iterable[Path]) -> Iterator[NewFile]:
    """The first of `paths` that nobody has or writes. It appears when the block ends well; after an error nothing is
    left of it. When a program that knows nothing of this takes the name meanwhile, the file gets the next of `paths`.

    Raises:
        ValueError: none of `paths` is free, or the folder cannot be written to.
    """
    names = iter(paths)
    path = Path()
    for path in names:
        if os.path.lexists(path):
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            clean(path.parent)
            lock = _take(partial_path(path))
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error}).") from error
        if lock is not None:
            break
    else:
        raise _taken(path)
    file = NewFile(partial_path(path), path)
    with _held(file.partial, lock, path):
        # Another writer may have become ready between the two looks above.
        while os.path.lexists(file.path):
            file.path = _next(names, file.path)
        yield file
        if WINDOWS:
            lock.close()
        while not _published(file.partial, file.path):
            file.path = _next(names, file.path)


def numbered_paths(folder: Path, stem: str, suffix: str, first: int = 1) -> Iterator[Path]:
    """`<stem>_00001<suffix>` in `folder` and what follows it."""
    return (folder / f"{stem}_{number:05}{suffix}" for number in count(first))


def partial_path(path: Path, slot: int = 1) -> Path:
    """What `path` is called while it is written; a writer that finds one slot held takes the next."""
    mark = f"{MARK}{slot if slot > 1 else ''}{path.suffix}"
    stem = path.stem
    if len(os.fsencode(f".{stem}{mark}")) > MAX_NAME_BYTES:
        stem = hashlib.sha256(os.fsencode(stem)).hexdigest()[:32]
    return path.with_name(f".{stem}{mark}")


def clean(folder: Path) -> None:
    """Remove what killed processes left of the files that they were writing in `folder`."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if PARTIAL.fullmatch(entry.name):
                _removed(Path(entry.path))


def abandon() -> None:
    """Remove what this process is writing, before it ends without leaving its blocks."""
    for partial in tuple(_being_written):
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the file at `path`, which is made if it is not there, for this block or until the process ends. Whether it
    is held: not where another process or thread holds it. Reading and writing it need no lock.

    Raises:
        OSError: it cannot be opened for writing, or is no file: a pipe would be waited for without end.
    """
    if is_special(path):
        raise OSError(errno.EINVAL, "is there and is no file", str(path))
    with path.open("ab") as file:
        yield try_lock(file) is not False


def try_lock(file: IO[bytes]) -> bool | None:
    """Lock an open file until it is closed; False where another process or thread has it locked, None where the file
    system has no locks.
    """
    handle = file.fileno()
    try:
        if sys.platform == "win32":
            os.lseek(handle, LOCK_PLACE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in HELD else None
    return True


def sync_file(file: Path) -> None:
    """Wait until the content of `file` is on the disk."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk, where the system can."""
    with contextlib.suppress(OSError, AttributeError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _take(partial: Path, looks: int = LOOKS) -> IO[bytes] | None:
    """A new, empty, locked file at `partial`, in place of a dead one; None while another process writes it."""
    for _ in range(looks):
        try:
            lock = partial.open("xb", buffering=0)
        except FileExistsError:
            # Never written into: its writer may have died between giving it its name and taking the partial one away.
            if not _removed(partial):
                time.sleep(PAUSE)
            continue
        # Until it is locked it looks dead, and may have been removed.
        if try_lock(lock) is not False and _is_at(lock, partial):
            return lock
        lock.close()
    return None


def _removed(partial: Path) -> bool:
    """Whether `partial` is gone: it was, or its writer is dead and it was removed."""
    try:
        state = partial.lstat()
        if not stat.S_ISREG(state.st_mode) or time.time() - state.st_mtime < SETTLED:
            return False
        with partial.open("rb+", buffering=0) as file:
            dead = try_lock(file) is True and _is_at(file, partial)
            if dead and not WINDOWS:
                partial.unlink()
        if dead and WINDOWS:
            partial.unlink(missing_ok=True)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return dead


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _held(partial: Path, lock: IO[bytes], path: Path) -> Iterator[None]:
    """Around the writing of `partial`; after an error nothing of it is left, and a full disk's names `path`."""
    _being_written.add(partial)
    with lock:
        try:
            yield
        except BaseException as error:
            if isinstance(error, OSError) and error.errno and error.filename is None:
                error.filename = str(path)
            # Once it has its name, the partial one may be somebody else's already.
            ours = lock.closed or _is_at(lock, partial)
            if WINDOWS:
                lock.close()
            if ours:
                partial.unlink(missing_ok=True)
            raise
        finally:
            _being_written.discard(partial)


def _published(partial: Path, path: Path) -> bool:
    """Give `partial` the name `path` unless there is something of that name; whether it has it."""
    try:
        if WINDOWS:
            partial.rename(path)
        else:
            path.hardlink_to(partial)
            partial.unlink()
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        partial.replace(path)
    return True


def _next(names: Iterator[Path], path: Path) -> Path:
    """The name after `path`, which is taken.

    Raises:
        ValueError: there is none.
    """
    for path in names:
        return path
    raise _taken(path)


def _taken(path: Path) -> ValueError:
    if os.path.lexists(path):
        return ValueError(f"{path} exists already; nothing is overwritten. Choose another name or move it away.")
    return ValueError(f"{path} is being written by another process; nothing is overwritten. Choose another name.")
