"""Atomic writes: a file appears under its name when it is whole, or not at all.

A file is written under a partial name beside its own, and its writer keeps the partial file locked. The operating
system ends the lock with the process, whatever ends that. So the next writer in a folder removes what killed processes
left, whose files are not locked, and leaves those that are being written. Files have the umask's mode.
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
"""How often a partial file is tried, and the seconds between: whoever cleans the folder locks it for a moment."""

SETTLED = 60.0 if WINDOWS else float("-inf")
"""Seconds after its last change after which an unlocked partial file is one of a dead process. Windows renames closed
files only, so that a file is unlocked there for a moment before it gets its name.
"""

LOCK_PLACE = 2**40
"""The byte that is locked on Windows, beyond the end of any file here, so that others may still read and write it."""

HELD = {errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK}
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EINVAL, errno.EACCES}

_being_written: set[Path] = set()


@dataclass
class NewFile:
    """A new file, to be written at `partial`. Its name is `path`, which may still change until the block ends."""

    partial: Path
    path: Path


@contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """A file to write to, of the same suffix as `path`, which replaces `path` when the block ends without an error;
    after an error nothing is left of it. Several may write one path at once: the last one stays.

    With `sync` its content is on the disk before it gets the name.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clean(path.parent)
    slots = (partial_path(path, slot) for slot in count(1))
    partial, lock = next((slot, lock) for slot in slots if (lock := _take(slot, looks=2)) is not None)
    with _writing(partial, lock, path):
        yield partial
        if sync:
            sync_file(partial)
        if WINDOWS:
            lock.close()
        partial.replace(path)


@contextmanager
def creating(path: Path) -> Iterator[Path]:
    """A file to write to, of the same suffix as `path`. The name must be free, and is claimed for the whole block.

    Raises:
        ValueError: the name is taken, another process writes it, or the folder cannot be written to.
    """
    with creating_first([path]) as file:
        yield file.partial


@contextmanager
def creating_first(paths: Iterable[Path]) -> Iterator[NewFile]:
    """The first of `paths` that does not exist and is not being written. It appears when the block ends without an
    error; after an error nothing is left of it. If another program creates the path meanwhile, the next one is taken.

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
        raise _name_taken(path)
    file = NewFile(partial_path(path), path)
    with _writing(file.partial, lock, path):
        # Another writer may have finished after the test above and before the lock.
        while os.path.lexists(file.path):
            file.path = _next(names, file.path)
        yield file
        if WINDOWS:
            lock.close()
        while not _publish(file.partial, file.path):
            file.path = _next(names, file.path)


def numbered_paths(folder: Path, stem: str, suffix: str, first: int = 1) -> Iterator[Path]:
    """`<stem>_00001<suffix>` in `folder` and the numbers after it."""
    return (folder / f"{stem}_{number:05}{suffix}" for number in count(first))


def partial_path(path: Path, slot: int = 1) -> Path:
    """The name of `path` while it is written; a writer that finds one slot locked takes the next."""
    mark = f"{MARK}{slot if slot > 1 else ''}{path.suffix}"
    stem = path.stem
    if len(os.fsencode(f".{stem}{mark}")) > MAX_NAME_BYTES:
        stem = hashlib.sha256(os.fsencode(stem)).hexdigest()[:32]
    return path.with_name(f".{stem}{mark}")


def clean(folder: Path) -> None:
    """Remove the unfinished files of killed processes in `folder`."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if PARTIAL.fullmatch(entry.name):
                _remove_if_dead(Path(entry.path))


def abandon() -> None:
    """Remove the unfinished files of this process, before it ends without leaving its `with` blocks."""
    for partial in tuple(_being_written):
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Lock the file at `path`, which is created if it is missing, until the block or the process ends. Yields whether
    it is locked: False where another process or thread has it. Reading and writing it need no lock.

    Raises:
        OSError: it cannot be opened for writing, or is not a regular file: opening a pipe waits without end.
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
            # Never truncated: after `hardlink_to` and before `unlink` it is the finished file under a second name.
            if not _remove_if_dead(partial):
                time.sleep(PAUSE)
            continue
        # Before it was locked it looked dead, and another process may have removed it.
        if try_lock(lock) is not False and _is_at(lock, partial):
            return lock
        lock.close()
    return None


def _remove_if_dead(partial: Path) -> bool:
    """Remove `partial` if its writer is dead; whether it is gone."""
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
def _writing(partial: Path, lock: IO[bytes], path: Path) -> Iterator[None]:
    """Around the writing of `partial`: after an error the file is removed, and that of a full disk names `path`."""
    _being_written.add(partial)
    with lock:
        try:
            yield
        except BaseException as error:
            if isinstance(error, OSError) and error.errno and error.filename is None:
                error.filename = str(path)
            # Once the file has its name, the partial name may be another writer's already.
            ours = lock.closed or _is_at(lock, partial)
            if WINDOWS:
                lock.close()
            if ours:
                partial.unlink(missing_ok=True)
            raise
        finally:
            _being_written.discard(partial)


def _publish(partial: Path, path: Path) -> bool:
    """Rename `partial` to `path` unless that exists; whether it was done."""
    try:
        if WINDOWS:
            partial.rename(path)
        else:
            # `rename` would replace an existing file; a link fails instead.
            path.hardlink_to(partial)
            partial.unlink()
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            # No links on this file system: an empty file claims the name, and is replaced.
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        partial.replace(path)
    return True


def _next(names: Iterator[Path], path: Path) -> Path:
    """The name after `path`, which exists.

    Raises:
        ValueError: there is none.
    """
    for path in names:
        return path
    raise _name_taken(path)


def _name_taken(path: Path) -> ValueError:
    if os.path.lexists(path):
        return ValueError(f"{path} exists already; nothing is overwritten. Choose another name or move it away.")
    return ValueError(f"{path} is being written by another process; nothing is overwritten. Choose another name.")
