"""From what a user typed to the files of each model: folders, globs, lists and shard series."""

import difflib
import glob
import re
from collections.abc import Sequence
from pathlib import Path

from ..files import errors_from, is_there, read_json
from .tensor_files import CheckpointError

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".pth", ".pt", ".bin", ".ckpt")
INDEX_SUFFIX = ".index.json"
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{4,6})-of-(?P<total>\d{4,6})(?P<suffix>\.\w+)")

PathLike = str | Path


def resolve_files(path: PathLike | Sequence[PathLike]) -> list[list[Path]]:
    """The models named by a file, a folder, a glob, or a list of these: each with all its files in order.

    A single shard stands for its whole series, and an index file for the files it names.

    Raises:
        CheckpointError: nothing is there, or shards of a series are missing.
    """
    given = [path] if isinstance(path, str | Path) else list(path)
    files = list(dict.fromkeys(file for item in given for file in _expand(item)))
    if not files:
        raise CheckpointError("No model file was given; name a .safetensors or .pth file, or a folder that holds one.")
    series = {file: _series(file) for file in files}
    return list({tuple(group): group for group in series.values()}.values())


def resolve_model(path: PathLike | Sequence[PathLike]) -> tuple[Path, ...]:
    """The files of the one model that `path` names.

    Raises:
        CheckpointError: nothing is there, shards are missing, or `path` names several models.
    """
    models = resolve_files(path)
    if len(models) > 1:
        listing = "\n".join(f"  {describe_files(model)}" for model in models)
        named = str(path) if isinstance(path, str | Path) else "The list of files"
        raise CheckpointError(f"{named} holds {len(models)} models; name one of them:\n{listing}")
    return tuple(models[0])


def describe_files(files: Sequence[Path]) -> str:
    """A short name for a model's files: the file name, or a shard series as one."""
    match = SHARD.fullmatch(files[0].name)
    if match and len(files) > 1:
        return f"{match['stem']}-*-of-{match['total']}{match['suffix']} ({len(files)} files)"
    return files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"


def missing_shards(file: Path) -> list[str]:
    """The names in the shard series of `file` that are not in its folder; empty for a file that is no shard."""
    names = _series_names(file)
    here = {path.name for path in file.parent.iterdir()} if len(names) > 1 else {file.name}
    return [name for name in names if name not in here or not (file.parent / name).is_file()]


def _expand(item: PathLike) -> list[Path]:
    path = Path(item).expanduser()
    if is_there(path, Path.is_dir):
        found = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in WEIGHT_SUFFIXES)
        if not found:
            raise CheckpointError(
                f"The folder {path} holds no model file ({', '.join(WEIGHT_SUFFIXES)}).{_nearby(path)}"
            )
        return found
    if is_there(path, Path.is_file):
        return [path]
    if any(mark in str(path) for mark in "*?["):
        found = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())  # noqa: PTH207 - absolute patterns
        if found:
            return found
    problem = "is no regular file" if is_there(path) else "does not exist"
    raise CheckpointError(f"{path} {problem}.{_nearby(path)}")


def _nearby(path: Path) -> str:
    """What the nearest existing folder holds, likest names first."""
    folder = path
    while not is_there(folder, Path.is_dir):
        folder = folder.parent
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(path.name, names, n=5, cutoff=0.3) or names[:5]
    return f" {folder} holds: {', '.join(near)}." if near else f" {folder} is empty."


def _series(file: Path) -> list[Path]:
    """All files of the model that `file` belongs to.

    Raises:
        CheckpointError: some of them are missing.
    """
    names = _series_names(file)
    missing = missing_shards(file)
    if missing:
        raise CheckpointError(
            f"{len(missing)} of the {len(names)} files of this model are missing: {', '.join(missing[:9])}"
            f"{', ...' if len(missing) > 9 else ''}. "
            f"Download them into {file.parent}."
        )
    return [file.parent / name for name in names]


def _series_names(file: Path) -> list[str]:
    match = SHARD.fullmatch(file.name)
    if match:
        width = len(match["total"])
        numbered = (f"{match['stem']}-{n:0{width}d}-of-{match['total']}" for n in range(1, int(match["total"]) + 1))
        numbers = [name + match["suffix"] for name in numbered]
    else:
        numbers = [file.name]
    if file.name.endswith(INDEX_SUFFIX):
        named = _indexed_names(file)
        if not named:
            raise CheckpointError(
                f"{file} is not a shard index (no readable weight_map); delete it or download it again."
            )
        return sorted(named)
    for index in sorted(file.parent.glob(f"*{INDEX_SUFFIX}")):
        named = _indexed_names(index)
        if file.name in named:
            return sorted({*named, *(numbers if match else ())})
    return numbers


def _indexed_names(index: Path) -> set[str]:
    """The file names in an index; empty when it is not one. Those of files in other folders count for nothing."""
    try:
        with errors_from(index, "is no shard index"):
            names = set(read_json(index)["weight_map"].values())
            return names if all(Path(name).name == name for name in names) else set()
    except ValueError:
        return set()
