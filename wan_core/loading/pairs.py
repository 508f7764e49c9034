"""The two files of a model of two experts: found as one, and compared before anything is loaded.

Their tensors have the same names and shapes, so only the names of files and folders say which is which.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Literal, get_args

from ..files import is_there, read_json
from .detect import Component, join_vace
from .paths import SHARD, WEIGHT_SUFFIXES, PathLike, resolve_files, resolve_model
from .tensor_files import CheckpointError

Side = Literal["high", "low"]
"""The expert of the noisy timesteps, or that of the others."""

EXPERTS: tuple[Side, ...] = get_args(Side)
"""The experts of a pair in the order of its files."""

BOTH = "both"
"""The choice of both experts, where one of them may be chosen."""

_OTHER_WORDS = r"(?![-_ ]?(?:v?ram|mem|rank|res|quality|poly|cfg|step))"
_PLAIN = rf"(?<![a-zA-Z])(?i:(high|low))(?=(?i:[-_ ]?noise)|[^a-zA-Z]|$){_OTHER_WORDS}"
_IN_CAMEL_CASE = rf"(?<=[a-zA-Z0-9])(High|Low)(?=Noise|[^a-z]|$){_OTHER_WORDS}"
WORD = re.compile(f"{_PLAIN}|{_IN_CAMEL_CASE}")
"""Where a name says which expert it is: high_noise, HighNoise, -HIGH, _low_ and so on."""

DIFFUSERS: dict[str, Side] = {"transformer": "high", "transformer_2": "low"}
"""The folders of a pair in a repository of diffusers."""

BRACES = re.compile(r"\{([^{},]*),([^{},]*)\}")


def side_of(path: str | PurePath) -> Side | None:
    """The expert that a file's name says it is, or else its folder's, up to three folders above; None where none does,
    or one says both.
    """
    for part in reversed(PurePath(path).parts[-4:]):
        sides = {(match[1] or match[2]).lower() for match in WORD.finditer(part)}
        if sides:
            return _side(sides.pop()) if len(sides) == 1 else None
        if part == "transformer_2":
            return "low"
    return None


def _side(word: str) -> Side:
    return "low" if word == "low" else "high"


def find_pairs(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The pairs among `names` (of files, with folders): the high-noise file and the low-noise one, by one name for both
    in which the words that differ stand in braces, `wan2.2_t2v_{high,low}_noise_14B_fp16.safetensors`.

    Of a model in several files the first one stands for all.
    """
    found: dict[str, dict[Side, str]] = {}
    for name in names:
        shard = SHARD.fullmatch(PurePath(name).name)
        side, shape = _marked(name)
        if side is not None and (shard is None or int(shard["number"]) == 1):
            found.setdefault(shape.lower(), {}).setdefault(side, name)
    return {
        _in_braces(pair["high"], pair["low"]): (pair["high"], pair["low"]) for pair in found.values() if len(pair) == 2
    }


def expand(name: str) -> tuple[str, ...]:
    """The names that braces stand for, high first; a name without braces, or of a file that is there, is itself."""
    if not BRACES.search(name) or is_there(Path(name)):
        return (name,)
    return BRACES.sub(r"\1", name), BRACES.sub(r"\2", name)


def _words(name: str) -> list[tuple[int, int, Side]]:
    """Where `name` says which expert it is: start, end and expert."""
    words = [(match.start(), match.end(), _side((match[1] or match[2]).lower())) for match in WORD.finditer(name)]
    folders = re.finditer(r"(?<![^/\\])(transformer(?:_2)?)(?=[/\\])", name)
    return sorted([*words, *((m.start(), m.end(), DIFFUSERS[m[1]]) for m in folders)])


def _marked(name: str) -> tuple[Side | None, str]:
    """The expert that a name says it is, and the name with a mark in place of the words that do."""
    words = _words(name)
    sides = {side for *_, side in words}
    shape, done = "", 0
    for start, end, _ in words:
        shape, done = f"{shape}{name[done:start]}\0", end
    return (sides.pop() if len(sides) == 1 else None), shape + name[done:]


def _in_braces(high: str, low: str) -> str:
    text, done = "", 0
    for (start, end, _), (other, last, _) in zip(_words(high), _words(low), strict=True):
        text, done = f"{text}{high[done:start]}{{{high[start:end]},{low[other:last]}}}", end
    return text + high[done:]


def resolve_experts(path: PathLike | Sequence[PathLike]) -> list[tuple[Path, ...]]:
    """The files of each transformer of the model that `path` names: of one, or of a pair, high first.

    A pair is a name with braces (`find_pairs`), a folder that holds one, by its files or its subfolders, or a list of
    two models; the order of a list counts where the names do not say which is which.

    Raises:
        CheckpointError: nothing is there, shards are missing, or there are several models that are no pair.
    """
    if isinstance(path, (str, Path)):
        names = _pair_in(Path(path)) if is_there(Path(path), Path.is_dir) else expand(str(path))
        if len(names) == 2:
            return [resolve_model(name) for name in names]
    models = resolve_files(path)
    if len(models) != 2 or isinstance(path, (str, Path)):
        return [resolve_model(path)]
    swapped = [side_of(files[0]) for files in models] == ["low", "high"]
    return [tuple(files) for files in (reversed(models) if swapped else models)]


def expert_files(path: PathLike, count: int) -> list[Path]:
    """The file of trained weights of each of `count` experts: a pair is named by its folder or with braces; one file is
    that of all.

    Raises:
        CheckpointError: as of `resolve_experts`, or there is a pair for a model that is none.
    """
    found = [files[0] for files in resolve_experts(Path(path).expanduser())]
    if len(found) > count:
        raise CheckpointError(f"{path} is a pair of files, but the model has one expert; name one of them.")
    return found * (count // len(found))


def _pair_in(folder: Path) -> tuple[str, ...]:
    """The paths of the one pair in `folder` or its subfolders, high first; nothing when there is none."""
    pairs = find_pairs(_files_in(folder, "*", "*/*"))
    if len(pairs) > 1:
        listing = "\n".join(f"  {folder / name}" for name in pairs)
        raise CheckpointError(f"{folder} holds {len(pairs)} pairs of experts; name one of them:\n{listing}")
    return tuple(str(folder / name) for pair in pairs.values() for name in pair)


def _files_in(folder: Path, *patterns: str) -> list[str]:
    """The model files in `folder` that match, as paths from there, sorted."""
    files = (file for pattern in patterns for file in folder.glob(pattern) if file.suffix in WEIGHT_SUFFIXES)
    return sorted(file.relative_to(folder).as_posix() for file in files)


def with_pairs(path: PathLike) -> list[PathLike]:
    """`path`; both names where it has braces, and with the pair in its subfolders where it is a folder with one."""
    folder = Path(path)
    if not is_there(folder, Path.is_dir):
        return list(expand(str(path)))
    below = [name for pair in find_pairs(_files_in(folder, "*/*")).values() for name in pair]
    return [*(folder / name for name in below), *([path] if _files_in(folder, "*") or not below else [])]


def resolve_pair(path: PathLike | Sequence[PathLike]) -> tuple[Path, Path]:
    """The two files that `path` names, high first: as of `resolve_experts`, or by one of them, where the other one is
    beside it or in a folder beside its own that is named like it.

    Raises:
        CheckpointError: they are not there, or no pair.
    """
    if isinstance(path, (str, Path)) and is_there(Path(path), Path.is_file):
        found = _find_partner(Path(path))
        if found is None:
            raise CheckpointError(
                f"{path} is one file, and none beside it is named as its counterpart (high and low in its place); name "
                "both files."
            )
        return found
    pair = resolve_experts(path)
    if len(pair) != 2 or any(len(files) != 1 for files in pair):
        raise CheckpointError(f"{path} is no pair of files for high and low noise; name both files.")
    return pair[0][0], pair[1][0]


def _find_partner(path: Path) -> tuple[Path, Path] | None:
    for folder, pattern in ((path.parent, "*"), (path.parent.parent, "*/*")):
        own = path.relative_to(folder).as_posix()
        found = next((pair for pair in find_pairs(_files_in(folder, pattern)).values() if own in pair), None)
        if found:
            return folder / found[0], folder / found[1]
    return None


def pair_name(high: Component, low: Component) -> str:
    """What to call a pair in messages."""
    first, second = (component.header.files[0] for component in (high, low))
    for depth in (1, 2):
        names = [PurePath(*file.parts[-depth:]).as_posix() for file in (first, second)]
        if found := next(iter(find_pairs(names)), None):
            return found
    return f"{high.name} and {low.name}"


def check_pair(high: Component, low: Component) -> None:
    """Raise CheckpointError unless these can be the experts of one model, each at its place."""
    first, second = _names(high, low)
    if [file.resolve() for file in high.header.files] == [file.resolve() for file in low.header.files]:
        raise CheckpointError(
            f"{first} was given for both experts; give the file for high noise, then the one for low noise."
        )
    if side_of(high.header.files[0]) == "low" or side_of(low.header.files[0]) == "high":
        raise CheckpointError(
            f"{first} was given for high noise and {second} for low noise, but their names say otherwise; give the "
            "file for high noise first."
        )
    check_same_structure(high, low)


def check_same_structure(high: Component, low: Component) -> None:
    """Raise CheckpointError unless both files hold transformers of one structure."""
    configs = [vars(component.config) if component.config else {} for component in (high, low)]
    differing = [name for name, value in configs[0].items() if configs[1].get(name) != value]
    if differing:
        first, second = _names(high, low)
        raise CheckpointError(
            f"{first} and {second} differ in structure ({', '.join(differing)}), so they are not two experts of one "
            "model."
        )


def _names(high: Component, low: Component) -> list[str]:
    """What to call two files; with their folders where their names are equal."""
    if high.name != low.name:
        return [high.name, low.name]
    return [f"{component.header.files[0].parent.name}/{component.name}" for component in (high, low)]


def with_branches(dits: Sequence[Component], vace: Component | Sequence[Component] | None) -> list[Component]:
    """The experts with VACE branches from files of their own: one for all, or one for each.

    Raises:
        CheckpointError: there is another number of branches, or as of `join_vace`.
    """
    branches = [vace] * len(dits) if isinstance(vace, Component) else list(vace or ())
    if branches and len(branches) != len(dits):
        raise CheckpointError(f"There are {len(branches)} VACE branches for {len(dits)} transformers; give as many.")
    return [join_vace(dit, branch) for dit, branch in zip(dits, branches, strict=True)] if branches else list(dits)


def stored_boundary(component: Component) -> float | None:
    """The boundary of a pair in a repository of diffusers, 0 to 1, from its `model_index.json`; None elsewhere.

    Raises:
        ValueError: that file is no JSON.
    """
    index = component.header.files[0].resolve().parents[1] / "model_index.json"
    found = read_json(index) if is_there(index, Path.is_file) else None
    ratio = found.get("boundary_ratio") if isinstance(found, dict) else None
    return ratio if isinstance(ratio, float) and 0 <= ratio <= 1 else None


def side_notes(name: str | Path, expert: int | None, experts: int) -> list[str]:
    """What the user of a model of so many experts may have mixed up, by the name of a LoRA for the one of that number,
    or for all.
    """
    side = side_of(name)
    own = None if expert is None else EXPERTS[expert]
    if experts != 2 or side in (None, own):
        return []
    used = "both experts" if own is None else f"the expert for {own} noise"
    return [f"Its name says that it is for {side} noise, but it is applied to {used}."]
