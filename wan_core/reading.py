"""Files that others made: whatever is wrong with one becomes a single error that names it, before memory is taken."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEXT_BYTES = 16 * 2**20
"""How long a text file may be: a pose for each of 10,000 frames has 2 MB."""

JSON_BYTES = 4 * 2**20
"""How long a JSON file may be that a stranger may have made. Parsed, the worst kind takes thirty times its length."""


@contextmanager
def blamed_on(
    source: Path | str, problem: str, advice: str = "", error: type[ValueError] = ValueError
) -> Iterator[None]:
    """Read the content of `source` inside the block. What goes wrong there is the fault of that content.

    Libraries raise errors of many kinds over damaged input (SafetensorError, KeyError, RecursionError, the
    PanicException of Rust, which is a BaseException); all of them become `error`, with what was raised as its cause.

    Raises:
        error: "<source> <problem>: <reason>. <advice>". One that the block raises itself passes unchanged.
    """
    try:
        yield
    except BaseException as raised:
        is_panic = type(raised).__name__ == "PanicException"
        if (isinstance(raised, error) and error is not ValueError) or not (isinstance(raised, Exception) or is_panic):
            raise
        raise error(f"{source} {problem}: {_reason(raised)}. {advice}".rstrip()) from raised


def parse_json(text: str | bytes, source: Path | str, problem: str = "holds no JSON", **blame: Any) -> Any:
    """What the JSON `text` of `source` says.

    Args:
        blame: `advice` and `error` of `blamed_on`.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    with blamed_on(source, problem, **blame):
        return json.loads(text)


def read_json(path: Path, problem: str = "holds no JSON", *, limit: int = JSON_BYTES, **blame: Any) -> Any:
    """What the JSON file at `path` says.

    Args:
        limit: its longest length, in bytes.
        blame: `advice` and `error` of `blamed_on`.

    Raises:
        ValueError: there is no regular file, it is longer than `limit`, no UTF-8, no JSON, or nested too deeply.
    """
    with blamed_on(path, problem, **blame):
        return json.loads(_text(path, limit))


def read_text(path: Path, problem: str = "cannot be read as text", *, limit: int = TEXT_BYTES, **blame: Any) -> str:
    """The UTF-8 text of the file at `path`, without a byte order mark; arguments are those of `read_json`.

    Raises:
        ValueError: there is no regular file, it is longer than `limit`, or no UTF-8.
    """
    with blamed_on(path, problem, **blame):
        return _text(path, limit)


def _text(path: Path, limit: int) -> str:
    if not path.is_file():
        raise ValueError("it does not exist or is no file")
    if path.stat().st_size > limit:
        raise ValueError(f"it has {path.stat().st_size} bytes, and at most {limit} are read")
    return path.read_text(encoding="utf-8-sig")


def _reason(error: BaseException) -> str:
    """The first line of what `error` says."""
    line = (str(error).strip().splitlines() or [""])[0][:400].rstrip(".")
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, KeyError):
        return f"{line} is missing"
    return line or type(error).__name__
