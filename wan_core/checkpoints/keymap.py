"""From the names in a file to the original names of Wan 2.1.

What a rename cannot do is written in the `Source` of a tensor: joined parts, a transpose, leading axes, an FP8 scale.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from types import MappingProxyType

import torch

from .dialects import DIALECTS, Combine, Dialect
from .header import CheckpointError, Header

FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
"""Formats of ComfyUI's quantisation metadata that are a weight times one scale per tensor or row."""

SPIECE_MODEL = "spiece_model"
"""Name of the byte tensor in ComfyUI's UMT5 packs that holds the SentencePiece model."""

PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "_orig_mod.",
    "module.",
    "pipe.dit.",
    "pipe.vace.",
    "pipe.motion_controller.",
    "text_encoders.umt5xxl.",
    "cond_stage_model.",
    "first_stage_model.",
    "transformer.",
    "model.",
    "net.",
)
"""What programs put before every name of a model. The longer of two that overlap stands first."""

SCALES = (".scale_weight", ".weight_scale")
"""Endings of FP8 scales in older and newer ComfyUI packs; `X.weight` times its scale is the effective weight."""

UNUSED = re.compile(
    r"scaled_fp8|spiece_model|log_scale|logit_scale|textual\..+|text_model\..+|text_projection\..+|.+\.position_ids"
    r"|.+\.(scale_weight|weight_scale|scale_input|input_scale|comfy_quant)"
)
"""Names that stand beside the weights of a model and are no parameters of it."""

UNSUPPORTED = {
    ".weight_scale_2": "NVFP4",
    ".pre_quant_scale": "pre-scaled",
    ".absmax": "bitsandbytes",
    ".qweight": "GPTQ",
}
"""Endings that mark quantised packs this library does not read."""

LORA = re.compile(r".+\.(lora_(A|B|down|up)(\.\w+)?\.weight|diff|diff_b|diff_m|hada_w[12]_[ab]|lokr_w[12](_[ab])?)")


ADVICE = "Use the fp16, bf16 or scaled fp8 file of this model."


@dataclass(frozen=True)
class Source:
    """How one original tensor is made: the names to read, how they combine, the resulting shape, the stored dtype.

    `scales` holds the FP8 scale name of each of `names`; it is empty when there are none.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    combine: Combine = "identity"
    scales: tuple[str | None, ...] = ()


def strip_prefix(names: Iterable[str]) -> dict[str, str]:
    """The names without the prefixes that a host program put on most of them, mapped to the names in the file."""
    stripped = {name: name for name in names}
    while True:
        prefix = next((p for p in PREFIXES if 2 * sum(name.startswith(p) for name in stripped) > len(stripped)), None)
        if prefix is None:
            return stripped
        stripped = {name.removeprefix(prefix): stored for name, stored in stripped.items()}


def find_dialect(names: Iterable[str]) -> Dialect | None:
    """The layout whose marks are best found among `names` (without prefixes), None when fewer than half are."""
    text = "\n".join(name for name in names if not UNUSED.fullmatch(name))

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


def convert(dialect: Dialect, header: Header, names: Mapping[str, str]) -> Mapping[str, Source]:
    """The source of every original tensor that the file can give.

    `names` are the names without prefixes, mapped to those in the file. A tensor that lacks some of its parts is left
    out.

    Raises:
        CheckpointError: the file is quantised in a way that cannot be read.
    """
    _check_quantisation(header, names)
    scales = _scales(header, names)
    found: dict[str, dict[int, str]] = {}
    how: dict[str, tuple[Combine, int]] = {}
    for name, stored in names.items():
        if UNUSED.fullmatch(name) or (dialect.ignored and re.fullmatch(dialect.ignored, name)):
            continue
        target, combine, part, parts = rename(dialect, name)
        found.setdefault(target, {}).setdefault(part, stored)
        how[target] = (combine, parts)
    return MappingProxyType(
        {
            target: _source(header, tuple(pieces[i] for i in sorted(pieces)), how[target][0], scales)
            for target, pieces in found.items()
            if len(pieces) == how[target][1]
        }
    )


def _source(header: Header, names: tuple[str, ...], combine: Combine, scales: Mapping[str, str]) -> Source:
    first = header[names[0]]
    shape = first.shape
    if combine == "cat":
        shape = (sum(header[name].shape[0] for name in names), *shape[1:])
    elif combine == "transpose":
        shape = shape[::-1]
    elif combine == "reshape":
        shape = (1,) * (3 - len(shape)) + shape
    own = tuple(scales.get(name) for name in names)
    return Source(names, shape, first.dtype, combine, own if any(own) else ())


def _scales(header: Header, names: Mapping[str, str]) -> dict[str, str]:
    """Stored weight name -> stored scale name.

    Raises:
        CheckpointError: a scale does not belong to a floating-point weight, or is neither one number nor one per row.
    """
    scales = {}
    for name, stored in names.items():
        ending = next((ending for ending in SCALES if name.endswith(ending)), None)
        weight = names.get(f"{name.removesuffix(ending)}.weight") if ending else None
        if weight is None:
            continue
        info, scale = header[weight], header[stored]
        if not info.dtype.is_floating_point or prod(scale.shape) not in (1, info.shape[0]):
            raise CheckpointError(
                f"{info.file.name} is quantised in a way that is not supported: {weight!r} is {info.dtype} "
                f"{list(info.shape)} with a scale {list(scale.shape)}. {ADVICE}"
            )
        scales[weight] = stored
    return scales


def _check_quantisation(header: Header, names: Mapping[str, str]) -> None:
    for name, stored in names.items():
        method = next((method for ending, method in UNSUPPORTED.items() if name.endswith(ending)), None)
        if method:
            raise CheckpointError(
                f"{header[stored].file.name} is quantised ({method}: it holds {stored!r}), which is not supported. "
                f"{ADVICE}"
            )
    for layer, value in _declared_formats(header).items():
        if value not in FP8_FORMATS:
            raise CheckpointError(
                f"{header.files[0].name} stores {layer!r} as {value}, which is not supported; only "
                f"{' and '.join(FP8_FORMATS)} are. {ADVICE}"
            )


def _declared_formats(header: Header) -> dict[str, str]:
    """Layer -> format, from the `_quantization_metadata` of ComfyUI's newer packs; empty when there is none."""
    try:
        layers = json.loads(header.metadata.get("_quantization_metadata", "{}")).get("layers", {})
        return {layer: str(entry.get("format")) for layer, entry in layers.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{header.files[0].name} has unreadable quantisation metadata: {error}.") from error
