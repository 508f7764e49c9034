"""Commands of the pack as attacks start them, and what they leave."""

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import fork_server
from tests.trainer.runs import environment

ROOT = fork_server.ROOT
LIMIT = 300
"""Seconds after which a process counts as hanging."""


@dataclass
class Process:
    """A command at work; its output goes to `log`."""

    log: Path
    process: fork_server.Process

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit code, or the negative number of the signal that ended it.

        Raises:
            TimeoutError: it hung, and was killed.
        """
        try:
            return self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise TimeoutError(f"no end in {LIMIT} seconds") from None

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def start(module: str, words: Sequence[object], log: Path, *, room: int | None = None, errors: str = "") -> Process:
    """Start the command `wancore.<module>`.

    Args:
        log: the file of its output.
        room: bytes that a file of it may have, as on a disk that is nearly full.
        errors: where its standard error goes instead.
    """
    with log.open("wb") as out, Path(errors or os.devnull).open("wb", buffering=0) as other:
        process = fork_server.Process(
            [ROOT / "pack.py", module, *words], env=environment(), stdout=out,
            stderr=other if errors else subprocess.STDOUT, file_limit=room,
        )  # fmt: skip
    return Process(log, process)


def run(module: str, words: Sequence[object], log: Path, **options: object) -> tuple[int, str]:
    """Start a command and wait for it; its exit code and what it said."""
    process = start(module, words, log, **options)
    return process.wait(), process.output


def files(folder: Path) -> dict[str, bytes]:
    """The content of every file below `folder`, by name."""
    found = (path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else ()
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def partial_files(folder: Path) -> list[str]:
    """What is still being written, or was left."""
    return sorted(name for name in files(folder) if ".wancore-part" in name or ".draft/" in name)


@contextlib.contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """A folder for a trial, gone afterwards."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix=f"wancore_{prefix}_") as folder:
        yield Path(folder)
