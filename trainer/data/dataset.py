"""The rows of a data set, read and not yet opened: captions, files and values by column. Nothing of it is changed."""

import contextlib
import csv
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_core.files import files_below, is_nameable, read_text
from wan_core.media import CLIP_SUFFIXES, PICTURE_SUFFIXES, MediaError, frame_files, probe

from ..config import TrainConfig
from ..flags import ConfigError
from .clips import INPUTS

JSON_BYTES = 2**28
"""How long a table in one JSON value may be: it is in memory as a whole, in several times its length."""

CAPTION = "prompt"
TARGETS = ("video", "image")
"""Columns of the clip that is trained; the first that is not empty is used."""

METADATA_NAMES = ("metadata.csv", "metadata.json", "metadata.jsonl")
EXTRA_CELLS = "\0cells beyond the header"
BROKEN = "\0broken"

MOST_NAMED = 10
"""Files that are left out, in one message."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row.

    Attributes:
        position: its place among the rows, from 0.
        where: what to call the row in messages.
        captions: one of them is drawn in each epoch.
        target: the clip that is trained; None when the row names none.
        files: the files of each input's column.
        values: the cells of inputs that are no files.
        problems: what is wrong with the row itself.
    """

    position: int
    where: str
    captions: tuple[str, ...]
    target: Path | None
    files: Mapping[str, tuple[Path, ...]]
    values: Mapping[str, str]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """All rows of a data set.

    Attributes:
        samples: in the order of the metadata.
        source: the metadata file, or the folder.
        problems: what is wrong with the data set as a whole.
        left_out: the files of a folder that are no samples, each with the reason.
    """

    samples: tuple[Sample, ...]
    source: Path
    problems: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """A hash of captions, values, file names and file sizes; moving the folder does not change it."""
        rows = [
            [s.captions, _file_mark(s.target), {k: [*map(_file_mark, v)] for k, v in s.files.items()}, dict(s.values)]
            for s in self.samples
        ]
        return hashlib.sha256(json.dumps(rows, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def load(config: TrainConfig) -> Dataset:
    """The data set that `config` names.

    Raises:
        ConfigError: there is none, or its metadata cannot be read at all.
    """
    base = Path(config.dataset_base_path).expanduser()
    if not base.is_dir():
        raise ConfigError(f"--dataset_base_path {str(base)!r} is not a folder.")
    source = _metadata_file(config, base)
    left_out: list[str] = []
    rows = list(_folder_rows(base, left_out) if source == base else _metadata_rows(source))
    if not rows:
        reasons = f" Left out: {'; '.join(left_out[:MOST_NAMED])}." if left_out else ""
        raise ConfigError(f"{source} holds no samples.{reasons}")
    columns = {name for row in rows for name in row} - {EXTRA_CELLS, BROKEN}
    samples = [_sample(row, index, base, config) for index, row in enumerate(rows)]
    return Dataset(tuple(samples), source, tuple(_column_problems(config, columns)), tuple(left_out))


def _metadata_file(config: TrainConfig, base: Path) -> Path:
    """The metadata file; `base` itself when there is none."""
    if config.dataset_metadata_path is None:
        return next((base / name for name in METADATA_NAMES if (base / name).is_file()), base)
    path = Path(config.dataset_metadata_path).expanduser()
    if not path.is_file():
        raise ConfigError(f"There is no metadata file {path}; give --dataset_metadata_path.")
    return path


def _metadata_rows(path: Path) -> Iterator[dict[str, Any]]:
    readers = {".csv": _csv_rows, ".json": _json_rows, ".jsonl": _jsonl_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"Metadata is read from {', '.join(readers)} files; got {path.name}.")
    if path.stat().st_size > JSON_BYTES and reader is _json_rows:
        raise ConfigError(f"{path} has more than {JSON_BYTES >> 20} MiB; JSON Lines (.jsonl) are read row by row.")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}); save it as UTF-8.") from error
    except (OSError, csv.Error, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**24)
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, restkey=EXTRA_CELLS):
            yield {(name or "").strip(): value for name, value in row.items()}


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError(f"a list of objects is expected, got {type(rows).__name__}")
    for row in rows:
        yield row if isinstance(row, dict) else {BROKEN: f"the entry is no object: {row!r:.80}"}


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for line in filter(str.strip, file):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                row = {BROKEN: f"the line is no JSON: {error}"}
            yield row if isinstance(row, dict) else {BROKEN: f"the line is no object: {row!r:.80}"}


def _folder_rows(folder: Path, left_out: list[str]) -> Iterator[dict[str, Any]]:
    """One row per picture, clip or folder of frames, with the text file of the same name as its caption; what else
    lies in the folder is named in `left_out`.
    """
    found = files_below(folder, _is_clip)
    shown = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    # Names in capitals are the same to some file systems and to most people.
    texts = {str(path).lower(): path for path in shown if path.suffix.lower() == ".txt"}
    for path in shown:
        if path.suffix.lower() == ".txt":
            continue
        name = path.relative_to(folder)
        if path.suffix.lower() not in PICTURE_SUFFIXES + CLIP_SUFFIXES:
            try:
                probe(path)
            except MediaError as error:
                left_out.append(f"{name} ({str(error).removeprefix(str(path)).lstrip(': ')})")
                continue
        wanted = path.with_name(f"{path.name if path.is_dir() else path.stem}.txt")
        row = {TARGETS[0]: str(name)}
        beside = texts.pop(str(wanted).lower(), wanted)
        try:
            row[CAPTION] = read_text(beside, "is no caption").strip()
        except ValueError as error:
            row[BROKEN] = str(error) if beside.exists() else f"there is no caption file {wanted.name} beside it"
        yield row
    left_out += [f"{path.relative_to(folder)} (no picture or clip has that name)" for path in texts.values()]


def _is_clip(folder: Path) -> bool:
    """Whether a folder holds the frames of one clip: its caption is beside it, and in it are pictures alone, without
    captions of their own.
    """
    if not folder.with_name(f"{folder.name}.txt").is_file():
        return False
    with contextlib.suppress(OSError):
        inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
        pictures = {path.stem for path in inside if path.suffix.lower() in PICTURE_SUFFIXES}
        others = {path.stem for path in inside if path.suffix.lower() in (*CLIP_SUFFIXES, ".txt")}
        return bool(pictures) and not pictures & others and not any(path.is_dir() for path in inside)
    return False


def _sample(row: Mapping[str, Any], index: int, base: Path, config: TrainConfig) -> Sample:
    problems = [str(row[BROKEN])] if BROKEN in row else []
    if EXTRA_CELLS in row:
        problems.append(f"it has more cells than the header ({row[EXTRA_CELLS]}); put captions with commas in quotes")
    captions = _texts(row.get(CAPTION))
    if not captions and BROKEN not in row:
        problems.append(f"the caption (column {CAPTION}) is empty")
    keys = [name for name in TARGETS if name in config.data_file_keys]
    outside: list[Path] = []
    no_names: list[str] = []

    def files_of(cell: Any) -> tuple[Path, ...]:
        texts = _path_texts(cell)
        no_names.extend(text for text in texts if not is_nameable(text))
        found = tuple(_path(text, base, config.confined) for text in texts if is_nameable(text))
        if not config.confined:
            return found
        outside.extend(path for path in found if not _is_inside(path, base))
        return tuple(path for path in found if path not in outside)

    targets = next((found for name in keys if (found := files_of(row.get(name)))), ())
    if not targets and not outside and not no_names and BROKEN not in row:
        problems.append(f"it names no clip (column {' or '.join(keys) or ', '.join(TARGETS)})")
    files, values = {}, {}
    for name in config.extra_inputs:
        cell = row.get(name)
        if INPUTS[name].is_file:
            files[name] = files_of(cell)
        elif INPUTS[name].column and (texts := _texts(cell)):
            values[name] = texts[0]
    problems += [f"{text:.60}... is not a valid file name" for text in no_names]
    problems += [f"{path} is outside of the data set's folder {base}" for path in outside]
    return Sample(
        position=index,
        where=f"row {index + 1}",
        captions=captions,
        target=targets[0] if targets else None,
        files=files,
        values=values,
        problems=tuple(problems),
    )


def _column_problems(config: TrainConfig, columns: set[str]) -> Iterator[str]:
    has = f"the metadata has {', '.join(sorted(columns))}"
    if CAPTION not in columns:
        yield f"there is no column {CAPTION}; {has}"
    if not set(TARGETS) & set(config.data_file_keys):
        yield f"--data_file_keys names neither video nor image, so there is nothing to train; it has {has}"
    elif not set(TARGETS) & set(config.data_file_keys) & columns:
        yield f"there is no column video or image; {has}"
    needed = [INPUTS[name] for name in config.extra_inputs if INPUTS[name].default is None]
    wanted = {row.column for row in needed if row.column is not None}
    for name in sorted(wanted - columns):
        yield f"there is no column {name} for that input; {has}"
    for name in sorted(set(config.data_file_keys) - {*TARGETS, *wanted} - columns):
        yield f"--data_file_keys names {name}, which is no column; {has}"


def _texts(cell: Any) -> tuple[str, ...]:
    """The texts of a cell, without empty ones; a list holds several."""
    cells = cell if isinstance(cell, list) else [cell]
    missing = (None, "")
    return tuple(
        str(item).strip()
        for item in cells
        if item not in missing and not (isinstance(item, float) and math.isnan(item)) and str(item).strip()
    )


def _path_texts(cell: Any) -> tuple[str, ...]:
    """The paths of a cell: one, or several as a list or as the JSON text of a list."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            cell = [cell]
    return _texts(cell)


def _path(text: str, base: Path, confined: bool) -> Path:
    if not confined:
        return base / text if (base / text).exists() else base / text.replace("\\", "/")
    # By its text, so that `link/..` is the folder itself; what lies outside of it is not so much as looked for.
    path = Path(os.path.normpath(base / text))
    if not _is_inside(path, base) or path.exists():
        return path
    return Path(os.path.normpath(base / text.replace("\\", "/")))


def _is_inside(path: Path, base: Path) -> bool:
    """Whether a path leads nowhere but below `base`, by its text: links in the folder are the owner's, and followed."""
    return Path(os.path.normpath(path.absolute())).is_relative_to(os.path.normpath(base.absolute()))


def _file_mark(path: Path | None) -> Sequence[Any]:
    if path is None:
        return ()
    if path.is_dir():
        return (path.name, *(_file_mark(file) for file in frame_files(path)))
    return (path.name, path.stat().st_size if path.is_file() else -1)
