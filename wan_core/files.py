"""Reading files and folders that others made: bounds, allowed names, and one clear error for each fault."""

import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_NAME_BYTES = 255
"""The longest file name in UTF-8, on nearly every file system; a letter beyond ASCII takes two to four bytes."""

MAX_PATH_BYTES = 4000
"""The longest path. Linux takes 4096 bytes, and a file has a longer name while it is written."""

WINDOWS_RESERVED = '<>:"|?*'


def files_below(folder: Path, is_one: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """Every file below `folder`, by name, through linked folders too, as in ComfyUI's own lists. A link to a folder
    around it is not followed.

    A folder for which `is_one` holds counts as one file; so does one that cannot be read.
    """

    def below(place: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
        try:
            found, inside = place.stat(), sorted(place.iterdir())
        except OSError:
            yield place
            return
        # The same folder has the same device and inode through every link.
        if (identity := (found.st_dev, found.st_ino)) in above:
            return
        for path in inside:
            if not path.is_dir() or is_one(path):
                yield path
            else:
                yield from below(path, above | {identity})

    yield from below(folder, frozenset())


def names_below(roots: Iterable[Path], suffixes: Collection[str]) -> list[str]:
    """The names, relative to their root, of the files below `roots` that have one of `suffixes`, sorted."""
    found = ((root, file) for root in roots if root.is_dir() for file in files_below(root))
    return sorted({file.relative_to(root).as_posix() for root, file in found if file.suffix.lower() in suffixes})


def is_special(path: Path) -> bool:
    """Whether `path` exists and is not a regular file: opening a named pipe waits without end."""
    return path.exists() and not path.is_file()


def is_there(path: Path, is_kind: Callable[[Path], bool] = Path.exists) -> bool:
    """What `is_kind` (`Path.is_file`, `Path.is_dir`) says of `path`; False where pathlib raises OSError, as it does for
    names that are too long and in folders that may not be looked into.
    """
    try:
        return is_kind(path)
    except OSError:
        return False


def is_nameable(path: str) -> bool:
    """Whether a file could have this path."""
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return False
    longest = max(map(len, encoded.replace(b"\\", b"/").split(b"/")))
    return "\0" not in path and longest <= MAX_NAME_BYTES and len(encoded) <= MAX_PATH_BYTES


def check_name(name: str, spare: int = 0) -> None:
    """Raise ValueError unless each part of the relative path `name` can be a file name with `spare` bytes added.

    The message does not repeat the name.
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
    """Raise ValueError unless files can be written to `folder`, or it can be made; the test leaves nothing behind."""
    place = folder.absolute()
    if len(os.fsencode(place)) > MAX_PATH_BYTES:
        raise ValueError(f"the path of {folder} is longer than {MAX_PATH_BYTES} bytes")
    try:
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            raise ValueError(f"{place} is a file, and no folder")
        # Permissions do not show read-only mounts; only writing does.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"{place} cannot be written to ({error.strerror or error})") from None


TEXT_BYTES = 16 * 2**20
"""The longest text file that is read: one with a pose for each of 10,000 frames has 2 MB."""

JSON_BYTES = 4 * 2**20
"""The longest JSON file that is read. Parsed, the worst kind takes thirty times its length in memory."""


@contextmanager
def errors_from(
    source: Path | str, problem: str, advice: str = "", error: type[ValueError] = ValueError
) -> Iterator[None]:
    """Around code that reads `source`: whatever it raises becomes one clear error about that source.

    Libraries raise errors of many kinds over damaged input (SafetensorError, KeyError, RecursionError, the
    PanicException of Rust, which is a BaseException). What was raised is the cause of the new error.

    Raises:
        error: "<source> <problem>: <reason>. <advice>". One of that class passes unchanged, unless it is ValueError.
    """
    try:
        yield
    except BaseException as raised:
        is_panic = type(raised).__name__ == "PanicException"
        if (isinstance(raised, error) and error is not ValueError) or not (isinstance(raised, Exception) or is_panic):
            raise
        raise error(f"{source} {problem}: {_reason(raised)}. {advice}".rstrip()) from raised


def parse_json(text: str | bytes, source: Path | str, problem: str = "holds no JSON", **options: Any) -> Any:
    """The value of the JSON `text` of `source`.

    Args:
        options: `advice` and `error` of `errors_from`.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    with errors_from(source, problem, **options):
        return json.loads(text)


def read_json(path: Path, problem: str = "holds no JSON", *, limit: int = JSON_BYTES, **options: Any) -> Any:
    """The value of the JSON file at `path`.

    Args:
        limit: the most bytes that it may have.
        options: `advice` and `error` of `errors_from`.

    Raises:
        ValueError: there is no regular file, it is longer than `limit`, no UTF-8, no JSON, or nested too deeply.
    """
    with errors_from(path, problem, **options):
        return json.loads(_text(path, limit))


def read_text(path: Path, problem: str = "cannot be read as text", *, limit: int = TEXT_BYTES, **options: Any) -> str:
    """The UTF-8 text of the file at `path`, without a byte order mark; arguments are those of `read_json`.

    Raises:
        ValueError: there is no regular file, it is longer than `limit`, or no UTF-8.
    """
    with errors_from(path, problem, **options):
        return _text(path, limit)


def _text(path: Path, limit: int) -> str:
    if not path.is_file():
        raise ValueError("it does not exist or is no file")
    if path.stat().st_size > limit:
        raise ValueError(f"it has {path.stat().st_size} bytes, and at most {limit} are read")
    # Editors on Windows may put a byte order mark in front.
    return path.read_text(encoding="utf-8-sig")


def _reason(error: BaseException) -> str:
    """The first line of the message of `error`, without its full stop."""
    line = (str(error).strip().splitlines() or [""])[0][:400].rstrip(".")
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, KeyError):
        return f"{line} is missing"
    return line or type(error).__name__


_known: dict[tuple[tuple[Path, ...], tuple[str, ...]], tuple[dict[Path, float], list[str]]] = {}


def known_names_below(folders: tuple[Path, ...], suffixes: tuple[str, ...]) -> list[str]:
    """As `names_below`; the folders are walked again only when one of them, or of those below, has changed."""
    seen, names = _known.get((folders, suffixes), ({}, []))
    if not seen or any(_changed(place) != when for place, when in seen.items()):
        seen = {place: _changed(place) for folder in folders for place in (folder, *folder.rglob("*/"))}
        names = names_below(folders, suffixes)
        _known[folders, suffixes] = seen, names
    return names


def _changed(place: Path) -> float:
    """When the entries of a folder changed last; 0 where it is gone."""
    try:
        return place.stat().st_mtime
    except OSError:
        return 0.0
