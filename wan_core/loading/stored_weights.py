"""The weights of a file by their plain names: how programs name the tensors of a quantised one, and what is not read.

A format whose tensors have other names than those known here is a row of `SPELLINGS`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..offload.formats import (
    ADVICE,
    FP8,
    FP8_MADE,
    MADE_FORMATS,
    Float8,
    FormatError,
    Info,
    Shape,
    WeightChoice,
    WeightFormat,
    format_of,
    recognised_format,
)
from .paths import describe_files
from .tensor_files import CheckpointError, Header, TensorFiles


@dataclass(frozen=True)
class Spelling:
    """How programs name the tensors of one weight: what follows the layer's name, for the numbers and for the scale.

    `unit` is a factor on the stored scale.
    """

    numbers: str
    scale: str
    unit: float = 1.0


SPELLINGS = (
    Spelling(".weight", ".scale_weight"),  # ComfyUI, first dialect
    Spelling(".weight", ".weight_scale"),  # ComfyUI with `comfy_quant`, compressed-tensors
    Spelling(".weight", ".weight_scale_inv"),  # DeepSeek-V3; despite its name it is multiplied
    Spelling(".weight._data", ".weight._scale"),  # optimum-quanto
    Spelling(".int8_weight", ".scale"),  # TurboDiffusion
    Spelling(".weight", ".SCB", 1 / 127),  # bitsandbytes LLM.int8: the largest number of each row
)


@dataclass(frozen=True)
class OutputFormat:
    """How quantised weights are written to files.

    Attributes:
        dtype: of the numbers, which are of `format`.
        mark: the name of a tensor of two elements of that dtype, by which readers know the file.
    """

    format: Float8
    dtype: torch.dtype
    spelling: Spelling
    mark: str

    def keeps(self, stored: "StoredWeight", header: Mapping[str, Info]) -> bool:
        """Whether the numbers and the scale of a file can be written as they are."""
        one_scale = not stored.scale or prod(header[stored.scale].shape) == 1
        return stored.dtype == self.dtype and one_scale


OUTPUT_FORMAT = OutputFormat(FP8, FP8_MADE, SPELLINGS[0], "scaled_fp8")
"""ComfyUI's first dialect, the one form that every version reads: 0.3.64 takes one scale per tensor only (its
`scaled_fp8_ops` declares it as a scalar), and newer ones, which write `weight_scale` and `comfy_quant`, convert it on
loading. The two elements of the mark ask for products in the compute dtype."""

SIDE_TENSORS = re.compile(
    r"scaled_fp8|.+\.(scale_weight|weight_scale|weight_scale_inv|scale_input|input_scale|output_scale|comfy_quant|SCB"
    r"|weight_format)"
)
"""Tensors of a quantised file that are neither weights nor their scales; those of inputs are for products in 8 bits."""

UNSUPPORTED = {
    r".+\.weight_scale_2": "NVFP4 (4 bits)",
    r".+\.pre_quant_scale": "ModelOpt with pre-scaled inputs",
    r".+\.weight\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..+)": "bitsandbytes NF4 or FP4",
    r".+\.(wscales|wtscale|wcscales|smooth_factor|smooth_factor_orig|proj_down)": "Nunchaku SVDQuant (4 bits)",
    r".+\.(qweight|qzeros|g_idx)": "GPTQ or AWQ (4 bits)",
    r".+\.weight\.(_data\.\w+|_shift|_zeropoint|_packed)": "quanto with 4 or 2 bits",
    r".+\.(_?weight[_:.](qdata|zero_point)|weight\.tensor_impl\..+|_weight_(scale|qdata).*)": "torchao",
    r".+\.weight_(packed|zero_point|shape|global_scale)": "compressed-tensors with 4 bits",
    r".+\.(weight_codes|codebooks|weight_codebook)": "a codebook",
}
"""Names that prove a format that is not read."""

DECLARED = re.compile(r"float8_e4m3fn(_rowwise|_blockwise)?|float8_e5m2|int8(_tensorwise|_rowwise|_blockwise)?")
"""Formats of ComfyUI's quantisation metadata that are numbers of 8 bits times their scale."""


MARK_BYTES = 4096
"""The longest text beside a weight that is read; those of ComfyUI have less than 200."""


@dataclass(frozen=True)
class StoredWeight:
    """One weight as a file holds it.

    Attributes:
        numbers: the stored name of its numbers, `dtype` their dtype.
        scale: the stored name of its scale, None when there is none; `unit` as in `Spelling`.
        shape: of the weight.
        words: the format in words.
        in_rows: whether the rows of the numbers are those of the weight; else it is reshaped when it is read.
    """

    format: WeightFormat
    numbers: str
    dtype: torch.dtype
    shape: Shape
    scale: str | None = None
    unit: float = 1.0
    words: str = ""
    in_rows: bool = True

    def kept(self, weights: WeightChoice) -> bool:
        """Whether a big layer that is to be held as `weights` keeps these numbers."""
        kept = weights == "auto" or MADE_FORMATS.get(weights) == self.format
        return kept and self.format.quantised and self.in_rows

    def held_scale(self, scale: Tensor, numbers: Shape) -> Tensor:
        """The stored `scale` as layers and `dequantise` take it, in float32."""
        held = scale.float().reshape(self.format.held_shape(tuple(scale.shape), numbers))
        return held if self.unit == 1 else held * self.unit

    @property
    def is_cast(self) -> bool:
        """Whether a cast makes the weight of its numbers."""
        return self.scale is None and self.format.cast_suffices

    def weight(self, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight from its tensors by stored name: in its stored dtype where a cast suffices, else in `dtype`."""
        numbers = tensors[self.numbers]
        if self.is_cast:
            return numbers
        scale = None if self.scale is None else self.held_scale(tensors[self.scale], tuple(numbers.shape))
        return self.format.dequantise(numbers, scale, dtype).reshape(self.shape)


def stored_weights(header: Header, names: Mapping[str, str]) -> dict[str, StoredWeight]:
    """The weights of a file by the names that they would have if they were plain.

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


def plain_name(name: str) -> str:
    """The name that a weight would have if it were plain."""
    endings = (spelling.numbers for spelling in SPELLINGS if spelling.numbers != ".weight")
    ending = next(filter(name.endswith, endings), None)
    return f"{name.removesuffix(ending)}.weight" if ending else name


def recognise(names: Mapping[str, str], header: Mapping[str, Info]) -> dict[str, StoredWeight]:
    """The weights among tensors, by the name that each would have if it were plain.

    Args:
        names: without prefixes, mapped to those in `header`.

    Raises:
        FormatError: a weight is stored in a way that is not read.
    """
    check_readable(names)
    scales: dict[str, tuple[str, Spelling]] = {}
    for name in names:
        for spelling in SPELLINGS:
            numbers = name.removesuffix(spelling.scale) + spelling.numbers
            if name.endswith(spelling.scale) and numbers in names:
                scales[numbers] = name, spelling
    found: dict[str, StoredWeight] = {}
    sides = {name for name, _ in scales.values()}
    for name, stored in names.items():
        if name in sides or SIDE_TENSORS.fullmatch(name):
            continue
        scale, spelling = scales.get(name, (None, SPELLINGS[0]))
        found[plain_name(name)] = _stored(
            name, header[stored], stored, (names[scale], header[names[scale]]) if scale else None, spelling
        )
    return found


def _stored(name: str, info: Info, stored: str, scale: tuple[str, Info] | None, spelling: Spelling) -> StoredWeight:
    row = recognised_format(info)
    if scale is None:
        # Any model may hold integers, such as tables of positions; its weights never are.
        if name.endswith(".weight") and not info.dtype.is_floating_point and (row is None or row.cast_suffices):
            raise FormatError(f"holds {name!r} as {_word(info.dtype)} with no scale that is known. {ADVICE}")
        row = row or WeightFormat(_word(info.dtype), (info.dtype,))
        shape = row.weight_shape(info.shape) if info.whole is None else info.whole
        return StoredWeight(row, stored, info.dtype, shape, words=row.name, in_rows=info.whole is None)
    called, side = scale
    if not side.dtype.is_floating_point or str(side.dtype).endswith("e8m0fnu"):
        raise FormatError(
            f"is quantised in a way that is not supported: {name!r} is {_word(info.dtype)} with a scale stored as "
            f"{_word(side.dtype)}, as MXFP8 and MXFP4 have it. {ADVICE}"
        )
    if row is None or row.scale_shape(tuple(side.shape), tuple(info.shape)) is None:
        raise FormatError(
            f"is quantised in a way that is not supported: {name!r} is {_word(info.dtype)} {list(info.shape)} with a "
            f"scale {list(side.shape)}. {ADVICE}"
        )
    words = row.describe(tuple(side.shape), tuple(info.shape))
    return StoredWeight(row, stored, info.dtype, row.weight_shape(info.shape), called, spelling.unit, words)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_readable(names: Iterable[str]) -> None:
    """Raise FormatError if one of `names` proves a format that is not read."""
    for name in names:
        method = next((method for pattern, method in UNSUPPORTED.items() if re.fullmatch(pattern, name)), None)
        if method:
            raise FormatError(f"is quantised with {method}, which is not read (it holds {name!r}). {ADVICE}")


def check_declared(layer: str, entry: Mapping[str, object]) -> None:
    """Raise FormatError if ComfyUI's metadata say that the weight of `layer` is more than numbers and a scale."""
    name = str(entry.get("format"))
    if not DECLARED.fullmatch(name):
        raise FormatError(f"stores {layer!r} as {name}, which is not read. {ADVICE}")
    if entry.get("convrot"):
        raise FormatError(f"stores {layer!r} rotated (ConvRot), which is not read. {ADVICE}")


def _declared(header: Header, names: Mapping[str, str]) -> dict[str, Mapping[str, object]]:
    """What ComfyUI's newer files declare of each layer's format, in their metadata or beside the weight."""
    try:
        layers = dict(json.loads(header.metadata.get("_quantization_metadata", "{}")).get("layers", {}))
        layers |= {name: json.loads(text) for name, text in _marks(header, names)}
        return {layer: dict(entry) for layer, entry in layers.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{describe_files(header.files)} has unreadable quantisation metadata: {error}."
        ) from error


def _marks(header: Header, names: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """The text beside each weight of a format that needs it: only it says whether int8 numbers are rotated."""
    with TensorFiles(header) as files:
        for name, stored in names.items():
            layer, ending, _ = name.partition(".comfy_quant")
            weight, info = names.get(f"{layer}.weight"), header[stored]
            if not (ending and weight and info.file.is_file()):
                continue
            form = format_of(header[weight].dtype)
            if form is not None and form.is_marked:
                if info.nbytes > MARK_BYTES:
                    raise ValueError(f"{stored!r} has {info.nbytes} bytes")
                yield layer, bytes(files.read(stored).tolist())
