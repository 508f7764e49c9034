"""Rows that compare a figure of ours with a peer's or with a limit, and the document that keeps them."""

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

RESULTS = Path(__file__).with_name("RESULTS.md")
TITLE = "# Results of `python -m tests.benchmarks`\n\nEach section is written by the command in it, with `--write`.\n"


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: what was measured, at which shape and in which dtype.
        ours: the median of our repetitions, or a count; NaN where it could not be measured.
        peer: the same of a peer, or a limit measured in the same run; None for a figure that stands alone.
        peer_name: who or what that is.
        unit: of `ours` and `peer`.
        goal: the largest ratio wanted, or the largest `ours` without a peer; None when nothing is promised.
        at_least: the goal is the smallest wanted instead.
        absolute: the goal is for `ours` although there is a peer.
    """

    HEADER: ClassVar[tuple[str, ...]] = ("what", "ours", "against", "theirs", "ratio", "goal", "")

    name: str
    ours: float
    peer: float | None = None
    peer_name: str = ""
    unit: str = "s"
    goal: float | None = None
    at_least: bool = False
    absolute: bool = False

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's; None without one."""
        return self.ours / self.peer if self.peer and not math.isnan(self.ours) else None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one, or when the figure is not a number."""
        value = self.ours if self.peer is None or self.absolute else self.ratio
        if self.goal is None or value is None or math.isnan(value):
            return None
        return value >= self.goal if self.at_least else value <= self.goal

    def as_dict(self) -> dict[str, Any]:
        """The fields with `ratio` and `met`, for JSON, which has no NaN."""
        ours = None if math.isnan(self.ours) else self.ours
        return {**asdict(self), "ours": ours, "ratio": self.ratio, "met": self.met}

    def cells(self) -> tuple[str, ...]:
        peer = "" if self.peer is None else f"{_number(self.peer)} {self.unit}"
        ratio = "" if self.ratio is None else f"{self.ratio:.3f}"
        sign = "≥" if self.at_least else "≤"
        unit = f" {self.unit}" if self.absolute and self.unit else ""
        goal = "" if self.goal is None else f"{sign} {self.goal:g}{unit}"
        word = {True: "met", False: "**missed**", None: ""}[self.met]
        ours = "-" if math.isnan(self.ours) else f"{_number(self.ours)} {self.unit}"
        return self.name, ours.strip(), self.peer_name, peer.strip(), ratio, goal, word


class AnyRow(Protocol):
    """A line of a table of results; all lines of a table have the same header."""

    HEADER: ClassVar[tuple[str, ...]]

    def cells(self) -> tuple[str, ...]: ...

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        ...


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def replaced(document: str, begin: str, end: str, text: str) -> str:
    """`document` with `text` between the marks `begin` and `end`."""
    before, _, rest = document.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{text}\n{end}{after}"


def print_or_write(doc: str, document: Path, table: Callable[[], str], filled: Callable[[str], str]) -> None:
    """The command line of a script, documented by `doc`, that prints its table or, with `--write`, fills `document`."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"fill the marked part of {document.name}")
    if parser.parse_args().write:
        document.write_text(filled(document.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        sys.stdout.write(table() + "\n")


def table(rows: Sequence[AnyRow]) -> str:
    """The rows, of one kind, in Markdown."""
    header = rows[0].HEADER
    return "\n".join([line(header), line(("-",) * len(header)), *(line(row.cells()) for row in rows)])


def machine(device: str = "cpu") -> str:
    """The device and the software, as one line."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    elif device == "meta":
        name = "no device: counted on the meta device"
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for text in info.read_text(encoding="utf-8").splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def section(mode: str, command: str, device: str, rows: Sequence[AnyRow], notes: Sequence[str] = ()) -> str:
    """What `RESULTS.md` says of one mode."""
    when = datetime.now(timezone.utc).date().isoformat()
    parts = [f"## {mode}", f"{when} · `{command}` · {machine(device)}", table(rows), *notes]
    return "\n\n".join(parts) + "\n"


def with_section(document: str, mode: str, text: str) -> str:
    """`document` with the section of `mode` replaced by `text`, or with it at the end."""
    parts = (document or TITLE).split("\n## ")
    head, found = parts[0].rstrip("\n"), {part.splitlines()[0]: f"## {part}".rstrip("\n") for part in parts[1:]}
    found[mode] = text.rstrip("\n")
    return "\n\n".join([head, *found.values()]) + "\n"


def write(mode: str, text: str, path: Path = RESULTS) -> None:
    """Put a section into the document of results."""
    document = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(with_section(document, mode, text), encoding="utf-8")


def as_json(mode: str, device: str, rows: Sequence[AnyRow]) -> str:
    """The rows for programs: one object with the machine and a list of figures."""
    figures = [row.as_dict() for row in rows]
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return json.dumps({"mode": mode, "date": when, "machine": machine(device), "rows": figures}, indent=1)
