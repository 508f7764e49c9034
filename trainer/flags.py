"""Settings as flags of the shell, and the reference's flags that are no settings here."""

import argparse
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from wan_core import files
from wan_core.catalog import IMAGE_ENCODER_PATTERN, TEXT_ENCODER_PATTERN, VAE_PATTERN
from wan_core.checks import check_choice, check_number, check_whole

ENCODER_FILES = (TEXT_ENCODER_PATTERN, VAE_PATTERN, IMAGE_ENCODER_PATTERN)

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class ReferenceFlag:
    """A flag that is taken.

    Attributes:
        note: what happens instead, for the log.
        sets: the settings that it means, from the value that follows it.
        has_value: whether a value follows it.
    """

    note: str
    sets: Callable[[str], Settings] = lambda word: {}
    has_value: bool = True


def _names_base(entries: Sequence[str]) -> bool:
    """Whether a list of models, each a file or model_id:file_pattern, names more than encoders."""
    named = (entry.strip() for entry in entries)
    return any(entry and not entry.endswith(ENCODER_FILES) for entry in named)


def _fp8_models(word: str) -> Settings:
    return {"fp8_base": True} if _names_base(word.split(",")) else {}


def _quant_options(word: str) -> Settings:
    return {"fp8_base": True} if _names_base([entry.rpartition(":")[0] for entry in word.split(";")]) else {}


REFERENCE_FLAGS: Mapping[str, ReferenceFlag] = {
    "initialize_model_on_cpu": ReferenceFlag(
        "weights are always read from their file to where they are needed", has_value=False
    ),
    "offload_models": ReferenceFlag("models that a run does not need are not loaded, and encoders are freed after use"),
    "fp8_models": ReferenceFlag(
        "frozen weights of the trained model are kept in 8 bits (--fp8_base); encoders are freed after use", _fp8_models
    ),
    "quant_options": ReferenceFlag(
        "frozen weights of the trained model are kept in 8 bits (--fp8_base), whatever the method", _quant_options
    ),
    "enable_model_cpu_offload": ReferenceFlag(
        "frozen blocks stay in host memory (--stream_base)", lambda word: {"stream_base": True}, has_value=False
    ),
    "enable_optimizer_cpu_offload": ReferenceFlag(
        "the optimizer stays with what it trains; the DeepSpeed configurations of trainer/accelerate move it",
        has_value=False,
    ),
    "cpu_offload_split_threshold": ReferenceFlag("blocks are copied one by one; --vram_limit says how many stay"),
    "enable_tensorboard_log": ReferenceFlag(
        "the same as --log_with tensorboard", lambda word: {"log_with": ("tensorboard",)}, has_value=False
    ),
    "enable_wandb_log": ReferenceFlag(
        "the same as --log_with wandb", lambda word: {"log_with": ("wandb",)}, has_value=False
    ),
    "enable_swanlab_log": ReferenceFlag(
        "events.jsonl and loss.png show the loss; --log_with plots it", has_value=False
    ),
    "swanlab_project": ReferenceFlag("events.jsonl and loss.png show the loss; --log_with plots it"),
    "enable_csv_log": ReferenceFlag("events.jsonl is always written", has_value=False),
}
"""Flags of DiffSynth-Studio, without dashes, that are accepted although they are no settings here."""

REFUSED_FLAGS: Mapping[str, str] = {
    "audio_processor_path": "it is for Wan 2.2 S2V, which is not trained here",
    "framewise_decoding": "it is for WanToDance models, which are not trained here",
    "template_model_id_or_path": "template models are of other families",
    "enable_lora_hot_loading": "image-to-LoRA models are of other families",
    "align_to_opensource_format": "use --lora_format",
    "dataset_metadata_paths": "use --dataset_metadata_path",
}
"""Flags of DiffSynth-Studio that are refused, and what to do instead."""


def translate(flags: Sequence[tuple[str, str]]) -> tuple[Settings, tuple[str, ...]]:
    """The settings that `flags` of REFERENCE_FLAGS, each with its value, mean; and a line for the log on each."""
    settings: dict[str, Any] = {}
    for name, word in flags:
        for key, value in REFERENCE_FLAGS[name].sets(word).items():
            settings[key] = (*settings.get(key, ()), *value) if isinstance(value, tuple) else value
    return settings, tuple(f"--{name}: {REFERENCE_FLAGS[name].note}." for name in dict(flags))


class ConfigError(ValueError):
    """A flag or a configuration file that cannot be used as it is."""


def option(
    default: Any,
    text: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float = float("inf"),
    aliases: Sequence[str] = (),
) -> Any:
    """A dataclass field that is a flag.

    Args:
        default: its value without the flag.
        text: the help text.
        choices: the words that it may be.
        low, high: the range of a number.
        aliases: other spellings of the flag, without dashes.
    """
    metadata = {"help": text, "choices": tuple(choices), "low": low, "high": high, "aliases": tuple(aliases)}
    return dataclasses.field(default=default, metadata=metadata)


def flag_type(field: dataclasses.Field) -> tuple[Any, bool]:
    """The field's type without None, and whether it may be None."""
    arms = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    kept = [arm for arm in arms if arm is not types.NoneType]
    return kept[0], len(kept) < len(arms)


def words(text: str) -> tuple[str, ...]:
    """A comma list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def groups(text: str) -> tuple[tuple[str, ...], ...]:
    """A JSON list of paths, in which an inner list holds the shards of one model."""
    items = json.loads(text) if text.lstrip().startswith(("[", '"')) else [text]
    return tuple((item,) if isinstance(item, str) else tuple(item) for item in items)


def pairs(text: str) -> dict[str, Any]:
    """`a=1,b=true` or a JSON object; a value that is not JSON is text."""
    if text.lstrip().startswith("{"):
        return json.loads(text)
    found = {}
    for part in words(text):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{part!r} is not name=value")
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            found[name.strip()] = value
    return found


PARSERS: dict[Any, Any] = {
    int: int,
    float: float,
    str: str,
    tuple[str, ...]: words,
    tuple[tuple[str, ...], ...]: groups,
    Mapping[str, Any]: pairs,
}
"""By a field's type: the function that parses a value of the command line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}. `--help` lists every flag.")


def build_parser(cls: type, prog: str, description: str, *, prints_help: bool = True) -> argparse.ArgumentParser:
    """A parser whose results hold only what was typed, under the names of the fields of `cls`.

    Without `prints_help` it has no `--help`, which ends the program.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=prints_help,
    )
    for field in dataclasses.fields(cls):
        kind, optional = flag_type(field)
        names = [f"--{name}" for name in (field.name, *field.metadata["aliases"])]
        text = f"{field.metadata['help']} (default: {_shown(field.default)})".replace("%", "%%")
        if kind is bool:
            parser.add_argument(*names, dest=field.name, help=text, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(*names, dest=field.name, help=text, type=_reader(field.name, kind, optional))
    return parser


def _reader(name: str, kind: Any, optional: bool) -> Any:
    def read(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        try:
            return PARSERS[kind](text)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise argparse.ArgumentTypeError(f"{text!r:.200} cannot be read: {error}") from error

    read.__name__ = name
    return read


def parse_known(parser: argparse.ArgumentParser, argv: Sequence[str], elsewhere: Mapping[str, str]) -> dict[str, Any]:
    """The values of the flags in `argv`, by field name.

    Args:
        elsewhere: flags of other trainers, without dashes, and what to do here instead.

    Raises:
        ConfigError: a flag is unknown or its value cannot be read; the nearest flag is named.
    """
    known, unknown = parser.parse_known_args(argv)
    flags = [word.partition("=")[0] for word in unknown]
    for flag in flags:
        name = flag.lstrip("-")
        if flag.startswith("--") and name in elsewhere:
            raise ConfigError(f"{flag} is not a flag of this trainer: {elsewhere[name]}")
    if unknown:
        strange = next((flag for flag in flags if flag.startswith("-")), flags[0])
        every = [name for action in parser._actions for name in action.option_strings]
        raise ConfigError(f"There is no flag {strange:.100}.{_meant(strange, every)}")
    return vars(known)


def from_json(cls: type, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values of a JSON object as fields of `cls` hold them.

    Raises:
        ConfigError: a name is no field, or a value is not of its type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    found = {}
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(f"{source}: there is no setting {name!r}.{_meant(name, list(fields))}")
        kind, optional = flag_type(fields[name])
        if isinstance(value, str) and kind is not str:
            try:
                value = _reader(name, kind, optional)(value) if kind in PARSERS else value
            except argparse.ArgumentTypeError as error:
                raise ConfigError(f"{source}: {name}: {error}") from error
        found[name] = _frozen(value)
        if found[name] is not None or not optional:
            try:
                _check(fields[name], kind, found[name])
            except ValueError as error:
                raise ConfigError(f"{source}: {error}") from error
    return found


def to_json(value: Any) -> dict[str, Any]:
    """Every field of the dataclass `value`, ready for JSON."""
    return json.loads(json.dumps({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}))


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in the file.

    Raises:
        ConfigError: there is no such file, or no JSON object in it.
    """
    values = files.read_json(Path(path), "cannot be read as a configuration", error=ConfigError)
    if not isinstance(values, dict):
        raise ConfigError(f"The configuration {path} must be a JSON object of flags; got {type(values).__name__}.")
    return values


def check_fields(value: Any) -> None:
    """Raise ConfigError when a field of the dataclass `value` has the wrong type or is out of range."""
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        kind, optional = flag_type(field)
        if held is None and optional:
            continue
        try:
            _check(field, kind, held)
        except ValueError as error:
            raise ConfigError(f"--{error}") from error


def _check(field: dataclasses.Field, kind: Any, value: Any) -> None:
    low: Any = float("-inf") if field.metadata["low"] is None else field.metadata["low"]
    if kind is int:
        check_whole(field.name, value, low=low, high=field.metadata["high"])
    elif kind is float:
        check_number(field.name, value, low=low, high=field.metadata["high"])
    elif field.metadata["choices"]:
        for word in value if isinstance(value, tuple) else (value,):
            check_choice(field.name, word, field.metadata["choices"])
    elif not isinstance(value, typing.get_origin(kind) or kind):
        raise ValueError(f"{field.name} must be {getattr(kind, '__name__', kind)}; got {value!r}.")


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _meant(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else " `--help` lists every flag."
