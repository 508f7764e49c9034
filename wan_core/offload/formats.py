"""The formats in which the weight of a linear layer is stored, one row each.

A format recognises its tensors in a header, and knows the shape of the weight they stand for, how numbers and scale
become that weight, and how rows are cut from it. Loading, planning, streaming, LoRA, saving and messages ask it and
know none by name. In memory a weight is the tensors of its file, so its bytes are theirs (`nbytes`), however many a
number of it takes.

A new format is a row of `FORMATS`: a dtype, or a class of its own. One whose numbers are bytes of no dtype, such as
`Packed`, overrides `recognises`, `weight_shape` and `dequantise`; everything else, streaming included, moves its bytes
as they are. How files name the tensors of a weight is in `loading.stored_weights`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal, Protocol

import torch
from torch import Tensor

from .packed import PACKINGS, Packing

Shape = tuple[int, ...]

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

FP8_MADE = torch.float8_e4m3fn
"""The dtype of FP8 weights that are made here: 4 bits of exponent, 3 of mantissa."""

FP8_MAX = torch.finfo(FP8_MADE).max

CHUNK = 1 << 18
"""Numbers of a weight that are quantised or unpacked at once: enough to keep all cores busy, few enough to stay in
their cache."""

DEVICE_CHUNK = 1 << 24
"""Numbers that are unpacked at once where kernels take time to start: 64 MB in float32."""

WeightChoice = Literal["auto", "fp8", "plain"]
WEIGHT_CHOICES: tuple[WeightChoice, ...] = ("auto", "fp8", "plain")
"""How big layers are to be held: as the file has them, as FP8, or in the compute dtype."""

BLOCK_SIDES = (128, 64, 32, 16, 256)
"""Sides of the blocks that share a scale, in the order of trial; 128 is DeepSeek-V3's, which block-wise FP8 follows."""

ADVICE = "Use the bf16, fp16, FP8 or int8 file of this model."


class FormatError(ValueError):
    """A weight that is stored in a way that is not read; the message continues a sentence that begins with the file."""


class Info(Protocol):
    """A tensor as a header describes it."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def packing(self) -> Packing | None: ...

    @property
    def whole(self) -> Shape | None: ...


@dataclass(frozen=True)
class WeightFormat:
    """Weights that are stored as they are; the base of all formats.

    Attributes:
        name: in messages and in `info`.
        dtypes: of the numbers.
        quantised: whether a layer keeps the stored numbers and computes its weight from them in every call.
        cast_suffices: whether numbers without a scale are the weight as soon as they are cast.
        is_marked: whether the text beside a weight (ComfyUI's `comfy_quant`) has to be read, because only it says
            whether the weight is more than numbers and a scale.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    quantised: bool = False
    cast_suffices: bool = True
    is_marked: bool = False

    def recognises(self, info: Info) -> bool:
        """Whether a tensor of a file holds numbers of this format."""
        return info.dtype in self.dtypes and info.packing is None

    def weight_shape(self, numbers: Shape) -> Shape:
        """The shape of the weight that stored numbers of this shape stand for."""
        return tuple(numbers)

    def scale_shape(self, scale: Shape, numbers: Shape) -> Shape | None:
        """The shape of `scale` in memory, with as many axes as the weight: one number, or one per row. None for any
        other scale.
        """
        weight = self.weight_shape(numbers)
        axes = (1,) * (len(weight) - 1)
        if prod(scale) == 1:
            return (1, *axes)
        # Also by its first axis: (1, n) would be a scale per column.
        if prod(scale) == weight[0] and scale[0] == weight[0]:
            return (weight[0], *axes)
        return None

    def held_shape(self, scale: Shape, numbers: Shape) -> Shape:
        """As `scale_shape`.

        Raises:
            FormatError: no scale of this format has that shape.
        """
        held = self.scale_shape(scale, numbers)
        if held is None:
            raise FormatError(f"has a scale {list(scale)} that does not fit numbers {list(numbers)}. {ADVICE}")
        return held

    def dequantise(self, numbers: Tensor, scale: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in `dtype`, each number rounded once; `scale` is shaped as `scale_shape` says.

        Without a scale it may be `numbers` itself.
        """
        if scale is None:
            return numbers.to(dtype)
        weight = numbers.to(dtype, copy=True)
        if all(have in (1, of) for have, of in zip(scale.shape, weight.shape, strict=True)):
            return weight.mul_(scale)
        rows, columns = (_side(n, have) for n, have in zip(weight.shape, scale.shape, strict=True))
        if weight.shape == (rows * scale.shape[0], columns * scale.shape[1]):
            weight.view(scale.shape[0], rows, scale.shape[1], columns).mul_(scale[:, None, :, None])
            return weight
        # The last block of a row or column is cut short, so the scale is spread out and cut, too.
        whole = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return weight.mul_(whole[: weight.shape[0], : weight.shape[1]])

    def rows(self, numbers: Tensor, scale: Tensor | None, start: int, end: int) -> Tensor:
        """The rows from `start` to `end` of the weight, in float32; no other is computed."""
        if scale is not None and len(scale) > 1:
            scale = scale[torch.arange(start, end, device=scale.device) // _side(len(numbers), len(scale))]
        return self.dequantise(numbers[start:end], scale)

    def describe(self, scale: Shape | None, numbers: Shape) -> str:
        """The format of one weight in words: "FP8, a scale per row"."""
        if scale is None:
            return self.name
        held = self.held_shape(scale, numbers)
        if prod(held) == 1:
            return f"{self.name}, a scale per tensor"
        if prod(held) == held[0]:
            return f"{self.name}, a scale per row"
        rows, columns = (_side(n, have) for n, have in zip(numbers, held, strict=True))
        return f"{self.name}, a scale per block of {rows}x{columns}"


@dataclass(frozen=True)
class EightBit(WeightFormat):
    """Numbers of 8 bits times a scale: of the whole weight, of each row, or of each block."""

    quantised: bool = True

    def scale_shape(self, scale: Shape, numbers: Shape) -> Shape | None:
        """As of any format, or one number per block, as (blocks down, blocks across)."""
        held = super().scale_shape(scale, numbers)
        if held is None and len(scale) == len(numbers) == 2:
            sides = [_side(n, have) for n, have in zip(numbers, scale, strict=True)]
            return tuple(scale) if all(sides) else None
        return held


@dataclass(frozen=True)
class Float8(EightBit):
    """FP8 numbers, which are also made here."""

    def quantise(self, weight: Tensor, *, per_row: bool = True) -> tuple[Tensor, Tensor]:
        """FP8 numbers for a weight (out, in), with a float32 scale per row, (out, 1), or for all, (1, 1)."""
        # In float32, a few rows at a time, so that there is never a second copy of the weight.
        rows = len(weight) if weight.is_meta else max(1, CHUNK // weight.shape[1])
        stored = torch.empty(weight.shape, dtype=FP8_MADE, device=weight.device)
        quotient = torch.empty(rows, weight.shape[1], dtype=torch.float32, device=weight.device)
        ranges = [torch.aminmax(part, dim=1, keepdim=True) for part in weight.split(rows)]
        scale = fp8_scale(torch.cat([torch.maximum(-low, high) for low, high in ranges]))
        if not per_row:
            scale = scale.amax().reshape(1, 1)
        scales = scale.expand(len(weight), 1)
        for target, part, factor in zip(stored.split(rows), weight.split(rows), scales.split(rows), strict=True):
            target.copy_(torch.div(part, factor, out=quotient[: len(part)]))
        return stored, scale


@dataclass(frozen=True)
class Packed(WeightFormat):
    """Rows of packed numbers, as GGUF files hold them: the bytes of a row are its blocks, in order.

    Attributes:
        packing: of every row.
    """

    dtypes: tuple[torch.dtype, ...] = ()
    quantised: bool = True
    cast_suffices: bool = False
    packing: Packing = field(kw_only=True)

    def recognises(self, info: Info) -> bool:
        """Whether a tensor of a file is packed in this way."""
        return info.packing == self.packing

    def weight_shape(self, numbers: Shape) -> Shape:
        """The shape of the weight whose rows take the last of the axes `numbers`, in bytes."""
        return *numbers[:-1], numbers[-1] // self.packing.nbytes * self.packing.numbers

    def dequantise(self, numbers: Tensor, scale: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in `dtype`, each number rounded once; there is no `scale`."""
        packing = self.packing
        weight = torch.empty(self.weight_shape(tuple(numbers.shape)), dtype=dtype, device=numbers.device)
        blocks = numbers.reshape(-1, packing.nbytes)
        # A few blocks at a time, so that there is never a float32 copy of the weight. A compiler fuses by itself.
        size = CHUNK if numbers.device.type == "cpu" else DEVICE_CHUNK
        count = max(1, len(blocks)) if torch.compiler.is_compiling() else size // packing.numbers
        for target, part in zip(weight.view(-1, packing.numbers).split(count), blocks.split(count), strict=True):
            target.copy_(packing.unpack(part))
        return weight


def fp8_scale(peak: Tensor) -> Tensor:
    """The float32 scale with which the largest number of the format stands for `peak`; above 0, so zeros stay zeros."""
    return (peak.float() / FP8_MAX).clamp_(min=torch.finfo(torch.float32).tiny)


def _side(length: int, blocks: int) -> int:
    """How many of `length` numbers share one of `blocks` scales; the last block may be shorter. 0 when none fits."""
    if blocks == 1:
        return length
    known = (side for side in BLOCK_SIDES if -(-length // side) == blocks)
    return next(known, 0 if not blocks or length % blocks else length // blocks)


PLAIN = WeightFormat("plain", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
FP8 = Float8("FP8", FP8_DTYPES)
INT8 = EightBit("int8", (torch.int8,), is_marked=True)
PACKED = {name: Packed(f"GGUF {name}", packing=packing) for name, packing in PACKINGS.items()}
FORMATS = (PLAIN, FP8, INT8, *PACKED.values())

MADE_FORMATS: Mapping[WeightChoice, Float8] = {"fp8": FP8}
"""The format that big layers are brought into on request, by the choice that asks for it."""


def choice_for_dtype(dtype: torch.dtype | None) -> WeightChoice | None:
    """The choice of `MADE_FORMATS` that a dtype names; None for dtypes that weights are just cast to."""
    return next((choice for choice, row in MADE_FORMATS.items() if dtype in row.dtypes), None)


def recognised_format(info: Info) -> WeightFormat | None:
    """The format that recognises a tensor of a file as its numbers; None when there is none."""
    return next((row for row in FORMATS if row.recognises(info)), None)


def format_of(dtype: torch.dtype) -> WeightFormat | None:
    """The format whose numbers are of `dtype`; None when there is none."""
    return next((row for row in FORMATS if dtype in row.dtypes), None)
