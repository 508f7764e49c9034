"""Files that appear under their name all at once, when they are whole, or not at all."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_numbers = itertools.count()


@contextmanager
def drafted(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """A name beside `path`, of the same suffix, to write a file to. It becomes `path`, in place of what is there, when
    the block ends well; after an error nothing is left of it. Processes and threads get names of their own.

    With `sync` its content is on the disk before it takes the name.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.{os.getpid()}-{next(_numbers)}.part{path.suffix}")
    try:
        yield draft
        if sync:
            sync_file(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def drafted_over_claim(path: Path) -> Iterator[Path]:
    """The same for a name that an empty file holds, so that nobody else takes it; after an error it is free again."""
    try:
        with drafted(path) as draft:
            yield draft
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextmanager
def drafted_anew(path: Path) -> Iterator[Path]:
    """The same for a name that must be free, which is claimed first.

    Raises:
        ValueError: the name is taken, or the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("x").close()
    except OSError as error:
        if path.exists():
            raise ValueError(
                f"{path} exists already; nothing is overwritten. Choose another name or move it away."
            ) from None
        raise ValueError(f"{path} cannot be written ({error}).") from error
    with drafted_over_claim(path) as draft:
        yield draft


def forget_drafts(path: Path) -> None:
    """Remove what processes that were killed left of `path`."""
    for draft in path.parent.glob(f".{path.stem}.*.part{path.suffix}"):
        draft.unlink(missing_ok=True)


def sync_file(file: Path) -> None:
    """Wait until the content of `file` is on the disk."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())
