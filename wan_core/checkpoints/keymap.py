"""From the names in a file to the original names of Wan 2.1.

What a rename cannot do is written in the `Source` of a tensor: joined parts, a transpose, leading axes, the format.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch

from ..memory.formats import BESIDE, FormatError, Stored, check_declared, plain_name, recognise
from .dialects import DIALECTS, Combine, Dialect
from .files import describe_files
from .header import CheckpointError, Header
from .read import TensorFiles

SPIECE_MODEL = "spiece_model"
"""Name of the byte tensor in ComfyUI's UMT5 packs that holds the SentencePiece model."""

PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "module.",
    "pipe.dit.",
    "pipe.vace.",
    "pipe.motion_controller.",
    "text_encoders.umt5xxl.",
    "text_encoders.t5xxl.",
    "clip_vision.",
    "vae.",
    "cond_stage_model.",
    "first_stage_model.",
    "transformer.",
    "model.",
    "net.",
)
"""What programs put before every name of a model. The longer of two that overlap stands first."""

MARK_BYTES = 4096
"""The longest text beside a weight that is read; those of ComfyUI have less than 200."""

INNER_PREFIXES = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
"""What FSDP, activation checkpointing and torch.compile put into names, at any place of them."""

UNUSED = re.compile(
    r"spiece_model|log_scale|logit_scale|textual\..+|text_model\..+|text_projection\..+|.+\.position_ids"
)
"""Names that stand beside the weights of a model and are no parameters of it."""


@dataclass(frozen=True)
class Source:
    """How one original tensor is made: the stored weights to read, how they combine, the resulting shape."""

    parts: tuple[Stored, ...]
    shape: tuple[int, ...]
    combine: Combine = "identity"

    @property
    def names(self) -> tuple[str, ...]:
        """The stored names of the numbers of each part."""
        return tuple(part.numbers for part in self.parts)

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored numbers."""
        return self.parts[0].dtype

    @property
    def is_cast(self) -> bool:
        """Whether a cast makes the weights of the stored numbers."""
        return all(part.is_cast for part in self.parts)

    @property
    def single(self) -> Stored | None:
        """The one stored weight that this is, as it stands; None when parts are joined or turned."""
        return self.parts[0] if self.combine == "identity" else None


def strip_prefix(names: Iterable[str]) -> dict[str, str]:
    """The names without the prefixes that a host program put on most of them, mapped to the names in the file."""
    stripped = {INNER_PREFIXES.sub("", name): name for name in names}
    while True:
        prefix = next((p for p in PREFIXES if 2 * sum(name.startswith(p) for name in stripped) > len(stripped)), None)
        if prefix is None:
            return stripped
        stripped = {name.removeprefix(prefix): stored for name, stored in stripped.items()}


def find_dialect(names: Iterable[str]) -> Dialect | None:
    """The layout whose marks are best found among `names` (without prefixes), None when fewer than half are."""
    weights = (name for name in names if not (UNUSED.fullmatch(name) or BESIDE.fullmatch(name)))
    text = "\n".join(map(plain_name, weights))

    def has(pattern: str) -> bool:
        return re.search(rf"^(?:{pattern})$", text, re.MULTILINE) is not None

    def likeness(dialect: Dialect) -> float:
        if dialect.absent and has(dialect.absent):
            return 0.0
        return sum(map(has, dialect.marks)) / len(dialect.marks)

    best = max(DIALECTS, key=likeness)
    return best if likeness(best) > 0.5 else None


@cache
def rename(dialect: Dialect, name: str) -> tuple[str, Combine, int, int]:
    """The original name that `name` belongs to, how it gets there, and which part of how many it is."""
    combine: Combine = "identity"
    part, parts = 0, 1
    for rule in dialect.rules:
        name, count = re.subn(rule.pattern, rule.replacement, name)
        if count and rule.combine != "identity":
            combine, part, parts = rule.combine, rule.part, rule.parts
    return name, combine, part, parts


def stored_weights(header: Header, names: Mapping[str, str]) -> dict[str, Stored]:
    """The weights of a file by the names that they would have if they were plain (`memory.formats`).

    `names` are the names without prefixes, mapped to those in the file.

    Raises:
        CheckpointError: a weight is stored in a way that is not read.
    """
    try:
        for layer, entry in _declared(header, names).items():
            check_declared(layer, entry)
        return recognise(names, header)
    except FormatError as error:
        raise CheckpointError(f"{describe_files(header.files)} {error}") from error


def convert(dialect: Dialect, weights: Mapping[str, Stored]) -> Mapping[str, Source]:
    """The source of every original tensor that the file can give; one that lacks some of its parts is left out."""
    found: dict[str, dict[int, Stored]] = {}
    how: dict[str, tuple[Combine, int]] = {}
    for name, stored in weights.items():
        if UNUSED.fullmatch(name) or (dialect.ignored and re.fullmatch(dialect.ignored, name)):
            continue
        target, combine, part, parts = rename(dialect, name)
        found.setdefault(target, {}).setdefault(part, stored)
        how[target] = (combine, parts)
    return MappingProxyType(
        {
            target: _source(tuple(pieces[i] for i in sorted(pieces)), how[target][0])
            for target, pieces in found.items()
            if len(pieces) == how[target][1]
        }
    )


def _source(parts: tuple[Stored, ...], combine: Combine) -> Source:
    shape = parts[0].shape
    if combine == "cat":
        shape = (sum(part.shape[0] for part in parts), *shape[1:])
    elif combine == "transpose":
        shape = shape[::-1]
    elif combine == "reshape":
        shape = (1,) * (3 - len(shape)) + shape
    return Source(parts, shape, combine)


def _declared(header: Header, names: Mapping[str, str]) -> dict[str, Mapping[str, object]]:
    """Layer -> what ComfyUI's newer packs say of its format, in the file's metadata or beside the weight."""
    try:
        layers = dict(json.loads(header.metadata.get("_quantization_metadata", "{}")).get("layers", {}))
        layers |= {name: json.loads(text) for name, text in _marks(header, names)}
        return {layer: dict(entry) for layer, entry in layers.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{describe_files(header.files)} has unreadable quantisation metadata: {error}."
        ) from error


def _marks(header: Header, names: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """The text beside each int8 weight: numbers of that dtype may be rotated, which nothing else tells."""
    with TensorFiles(header) as files:
        for name, stored in names.items():
            layer, ending, _ = name.partition(".comfy_quant")
            weight, info = names.get(f"{layer}.weight"), header[stored]
            if ending and weight and header[weight].dtype == torch.int8 and info.file.is_file():
                if info.nbytes > MARK_BYTES:
                    raise ValueError(f"{stored!r} has {info.nbytes} bytes")
                yield layer, bytes(files.read(stored).tolist())
