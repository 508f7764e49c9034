"""The folders of a run: where it finds input files and writes output files, under ComfyUI's names."""

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from wan_core.atomic import NewFile, creating_first, numbered_paths
from wan_core.files import check_name, check_writable, is_there

from ..nodes import host
from ..nodes.places import ASSETS, inside

ANNOTATED = re.compile(r"(?P<name>.*?) ?\[(?P<kind>input|output|temp)\]")
"""ComfyUI's way to name a file that is not in the input folder: `name.png [output]`."""

SHOWN, SPARE_DIGITS = 60, 4
"""Characters of a long name that a message shows, and digits that a number may have beyond five."""


def workflow_file(text: str) -> Path:
    """The file of a workflow that was typed: its path, or a name in the pack's `workflows/api` such as `t2v`.

    Of a file of the editor that the pack shipped under such a name, as `workflows/t2v.json`, it is the one in `api`.
    """
    file = Path(text)
    shipped = host.PACK_FOLDER / "workflows" / "api" / f"{file.name.removesuffix('.json')}.json"
    is_name = file.name == text or file.parent.name == shipped.parents[1].name
    return shipped if is_name and not is_there(file) and shipped.is_file() else file


@dataclass(frozen=True)
class OutputFile:
    """A new output file. Write to `partial` inside the block that creates it; `path` is final after the block."""

    file: NewFile
    subfolder: str
    kind: str

    @property
    def partial(self) -> Path:
        return self.file.partial

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def reported(self) -> dict[str, str]:
        """As a node reports it to the interface."""
        return {"filename": self.path.name, "subfolder": self.subfolder, "type": self.kind}


@dataclass(frozen=True)
class Folders:
    """The two folders of a run. Previews, ComfyUI's type "temp", go to `temp` inside the output folder.

    Names in `typed` come from the person who started the run and not from a workflow, so they may be any path.
    """

    input: Path = Path("input")
    output: Path = Path("output")
    typed: frozenset[str] = frozenset()

    def of_kind(self, kind: str) -> Path:
        return {"input": self.input, "output": self.output, "temp": self.output / "temp"}[kind]

    def find(self, name: str) -> Path | None:
        """The file that a load node names: in the input folder, among the shipped assets, or typed; else None."""
        if not isinstance(name, str):
            return None
        if match := ANNOTATED.fullmatch(name):
            places = [inside(self.of_kind(match["kind"]), match["name"])]
        else:
            places = [inside(root, name) for root in (self.input, ASSETS)]
            places += [Path(name).expanduser()] if name in self.typed else []
        return next((place for place in places if name and place and is_there(place, Path.is_file)), None)

    def without_folders(self, text: str) -> str:
        """`text` as it is written into saved files: of a path on this machine only the name of the file."""
        path = Path(text).expanduser() if text in self.typed else Path(text)
        roots = (self.input.absolute(), self.output.absolute())
        is_own = text in self.typed and is_there(path)
        is_own = is_own or any(path.is_relative_to(root) for root in roots)
        return path.name if path.is_absolute() and is_own else text

    def list_input(self, suffixes: frozenset[str]) -> list[str]:
        """Names of the files with these suffixes in the input folder and among the assets, sorted."""
        found = (path for place in (self.input, ASSETS) if place.is_dir() for path in place.iterdir())
        return sorted({path.name for path in found if path.suffix.lower() in suffixes})

    def reported_files(self, ui: Mapping[str, Mapping[str, Any]]) -> Iterator[Path]:
        """The files that output nodes reported, whatever key of their `ui` holds them."""
        for entry in file_entries(ui):
            if entry.get("type", "output") in ("output", "temp"):
                yield self.of_kind(entry.get("type", "output")) / entry.get("subfolder", "") / entry["filename"]

    @contextmanager
    def numbered_file(
        self, prefix: str, suffix: str, width: int = 0, height: int = 0, kind: str = "output"
    ) -> Iterator[OutputFile]:
        """A new file `<prefix>_00001_<suffix>` whose number follows the highest in its folder, as ComfyUI counts.

        The prefix may name subfolders and hold %width%, %height%, %year%, %month%, %day%, %hour%, %minute%, %second%.

        Raises:
            ValueError: as `place`.
        """
        subfolder, stem = self.place(_expand(prefix, width, height), kind)
        folder = self.of_kind(kind) / subfolder
        with _create(self._numbered(folder, stem, suffix), subfolder, kind) as file:
            yield file

    @contextmanager
    def named_file(self, filename: str, subfolder: str = "", kind: str = "output") -> Iterator[OutputFile]:
        """A new file of this name, or with the next free number when the name is taken.

        Raises:
            ValueError: as `place`.
        """
        subfolder, name = self.place(f"{subfolder}/{filename}".replace("\\", "/").lstrip("/"), kind)
        path = self.of_kind(kind) / subfolder / name
        counted = re.fullmatch(r"(.*)_\d+_", path.stem)
        others = self._numbered(path.parent, counted[1] if counted else path.stem, path.suffix)
        with _create(chain([path], others), subfolder, kind) as file:
            yield file

    @staticmethod
    def _numbered(folder: Path, stem: str, suffix: str) -> Iterator[Path]:
        """The names after the highest number in `folder`."""
        pattern = re.compile(rf"{re.escape(stem)}_(\d+)(?:_.*)?", re.IGNORECASE if os.name == "nt" else 0)
        there = folder.iterdir() if folder.is_dir() else ()
        taken = [int(match[1]) for path in there if (match := pattern.fullmatch(path.stem))]
        yield from numbered_paths(folder, stem, f"_{suffix}", max(taken, default=0) + 1)

    def check(self, prefix: str, suffix: str = ".mp4") -> None:
        """Raise ValueError unless `numbered_file` can create files of that prefix; nothing is created."""
        name = _expand(prefix, 0, 0)
        try:
            check_name(name, spare=len(f"_00001_{suffix}") + SPARE_DIGITS)
        except ValueError as error:
            shown = prefix if len(prefix) <= SHOWN else f"{prefix[:SHOWN]}..."
            raise ValueError(f"{shown!r} is not a file name: {error}.") from None
        subfolder, _ = self.place(name)
        try:
            check_writable(self.output / subfolder)
        except ValueError as error:
            raise ValueError(f"The output folder {self.output} cannot be used: {error}. Give another --out.") from None

    def place(self, name: str, kind: str = "output") -> tuple[str, str]:
        """(subfolder, file name) of a name below the output folder; nothing is created.

        Raises:
            ValueError: the name is empty or leads out of the folder.
        """
        subfolder, stem = os.path.split(os.path.normpath(name))
        root = self.of_kind(kind).resolve()
        if not (root / subfolder).resolve().is_relative_to(root):
            raise ValueError(f"{name!r} leads out of the output folder {root}; name a place inside it.")
        if not name.strip() or stem.strip() in ("", ".", ".."):
            raise ValueError(f"{name!r} names no file; write a name such as 'video/WanCore'.")
        return subfolder, stem


def file_entries(ui: Mapping[str, Mapping[str, Any]]) -> Iterator[Mapping[str, str]]:
    """Everything in the nodes' ui that names a file: `images`, `gifs`, `video`, `audio` and whatever packs add."""
    for panes in ui.values():
        for pane in panes.values():
            for entry in pane if isinstance(pane, (list, tuple)) else ():
                if isinstance(entry, Mapping) and isinstance(entry.get("filename"), str):
                    yield entry


def _expand(prefix: str, width: int, height: int) -> str:
    now = time.localtime()
    values = {"width": width, "height": height, "year": now.tm_year}
    clock = {"month": now.tm_mon, "day": now.tm_mday, "hour": now.tm_hour, "minute": now.tm_min, "second": now.tm_sec}
    for name, text in {**values, **{name: f"{value:02}" for name, value in clock.items()}}.items():
        prefix = prefix.replace(f"%{name}%", str(text))
    return prefix


@contextmanager
def _create(paths: Iterable[Path], subfolder: str, kind: str) -> Iterator[OutputFile]:
    with creating_first(paths) as file:
        yield OutputFile(file, subfolder.replace(os.sep, "/"), kind)
