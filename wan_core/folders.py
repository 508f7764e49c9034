"""What lies in a folder of a user's, and which names a file system takes."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

MAX_NAME_BYTES = 255
"""Of one file name in UTF-8, on nearly every file system; letters beyond ASCII take two to four."""

MAX_PATH_BYTES = 4000
"""Of a whole path; Linux takes 4096, with what is added while a file is written."""

WINDOWS_RESERVED = '<>:"|?*'


def files_below(folder: Path, is_one: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """Every file below `folder`, by name, through linked folders too, as ComfyUI's own lists do. A link back to a
    folder that it lies in is not followed.

    A folder for which `is_one` holds is given itself, in place of what is in it; so is one that cannot be read.
    """

    def below(place: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
        try:
            found, inside = place.stat(), sorted(place.iterdir())
        except OSError:
            yield place
            return
        if (identity := (found.st_dev, found.st_ino)) in above:
            return
        for path in inside:
            if not path.is_dir() or is_one(path):
                yield path
            else:
                yield from below(path, above | {identity})

    yield from below(folder, frozenset())


def is_special(path: Path) -> bool:
    """Whether something other than a regular file stands at `path`: opening a named pipe waits without end."""
    return path.exists() and not path.is_file()


def is_nameable(path: str) -> bool:
    """Whether a file could be called that."""
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return False
    longest = max(map(len, encoded.replace(b"\\", b"/").split(b"/")))
    return "\0" not in path and longest <= MAX_NAME_BYTES and len(encoded) <= MAX_PATH_BYTES


def check_name(name: str, spare: int = 0) -> None:
    """Raise ValueError unless each part of the relative path `name` can be the name of a file, to which `spare` bytes
    are added. The message does not repeat the name.
    """
    if "\0" in name:
        raise ValueError("it holds the character NUL")
    if any(ord(letter) < 32 for letter in name):
        raise ValueError("it holds a control character, such as a line break")
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds half of a character, {name[error.start]!r}") from None
    if os.name == "nt" and (reserved := set(name) & set(WINDOWS_RESERVED)):
        raise ValueError(f"it holds {' '.join(sorted(reserved))}, which Windows does not take")
    for part in encoded.replace(b"\\", b"/" if os.name == "nt" else b"\\").split(b"/"):
        if len(part) + spare > MAX_NAME_BYTES:
            raise ValueError(
                f"a part of it has {len(part)} bytes in UTF-8; with the {spare} that are added, a name has at most "
                f"{MAX_NAME_BYTES}"
            )


def check_writable(folder: Path) -> None:
    """Raise ValueError unless files can be written to `folder`, or it can be made; nothing is left of the attempt."""
    place = folder.absolute()
    if len(os.fsencode(place)) > MAX_PATH_BYTES:
        raise ValueError(f"the path of {folder} is longer than {MAX_PATH_BYTES} bytes")
    try:
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            raise ValueError(f"{place} is a file, and no folder")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"{place} cannot be written to ({error.strerror or error})") from None
