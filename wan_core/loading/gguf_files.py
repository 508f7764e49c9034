"""The headers of GGUF files, read within bounds.

The reader of the `gguf` package is not used: it makes a Python object of every element that an array claims to have,
and takes sizes and offsets for granted, so a header of a few bytes keeps it busy for years. Tensors are read and mapped
by `tensor_files`, as those of every format.
"""

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..files import errors_from
from ..offload.packed import PACKINGS, Packing
from .stored import MAX_AXES, MAX_NAME, CheckpointError, TensorInfo, check_bounds

MARK = b"GGUF"
"""The first bytes of every GGUF file."""

VERSIONS = (2, 3)
"""Versions of the format that are read; 3 added files of big-endian machines, which are not."""

HEADER_BYTES = 64 * 2**20
"""The longest header that is read. A DiT has one of 0.1 MB, UMT5 with its vocabulary of 256,384 tokens one of 7 MB."""

MAX_TENSORS = 2**16
"""The most tensors of a file; the largest models have about 2,000."""

ALIGNMENT, MAX_ALIGNMENT = 32, 2**20
"""Tensors begin at multiples of the first, unless `general.alignment` says otherwise; the second is the most."""

STRING, ARRAY = 8, 9

SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""`struct` codes of the types of metadata; `STRING` and `ARRAY` are the two others."""

INTEGERS = (4, 5, 10, 11)
"""Those of integers of 4 and 8 bytes."""

ABOUT = ("general.", "tokenizer.ggml.")
"""What metadata begin with that say what is in the file."""

TYPES: Mapping[int, torch.dtype | Packing] = {
    0: torch.float32, 1: torch.float16, 24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64,
    28: torch.float64, 30: torch.bfloat16,
} | {
    code: PACKINGS[name]
    for code, name in {
        2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
        14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS",
    }.items()
}  # fmt: skip
"""The types of tensors that are read, by the number of `ggml_type`."""

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Before a tensor's name: its shape, where a converter stored it in another one (ComfyUI-GGUF's `convert.py`)."""


@dataclass(frozen=True)
class Array:
    """An array of metadata, which is left in the file: `count` elements of a type of `SCALARS`, or strings."""

    type: int
    count: int
    offset: int


@dataclass(frozen=True)
class _Entry:
    """A tensor as the header has it: its axes from the innermost out, and its place after the header."""

    axes: tuple[int, ...]
    type: int
    offset: int


class _Cursor:
    """Reads the header from its beginning, and nothing beyond the file or `HEADER_BYTES`."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.file, self.size = file, file.stat().st_size
        self._stream = stream
        self.at = 0

    def skip(self, count: int) -> None:
        """Go on after `count` bytes."""
        self.at += count
        if self.at > self.size:
            raise CheckpointError(
                f"{self.file} is truncated or damaged: its header goes on after the end of the file, which has "
                f"{self.size} bytes. Download it again."
            )
        if self.at > HEADER_BYTES:
            raise ValueError(f"it has more than {HEADER_BYTES} bytes")
        self._stream.seek(self.at)

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        begin = self.at
        self.skip(count)
        self._stream.seek(begin)
        return self._stream.read(count)

    def number(self, code: str) -> Any:
        """The next number, of a `struct` code."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self, most: int = HEADER_BYTES) -> str:
        length = self.number("Q")
        if length > most:
            raise ValueError(f"a name in it has {length} bytes; {most} is the most")
        return self.take(length).decode()

    def value(self) -> Any:
        """The next value of metadata with its type before it: a number, a text or an `Array`."""
        kind = self.number("I")
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"it holds metadata of the type {kind}, which GGUF does not have")
        element, count = self.number("I"), self.number("Q")
        array = Array(element, count, self.at)
        if element in SCALARS:
            self.skip(count * struct.calcsize(f"<{SCALARS[element]}"))
        elif element == STRING:
            # Each text takes 8 bytes at least, so a count that the file cannot hold ends at its end.
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise ValueError(f"it holds an array of the type {element}; numbers and texts are read")
        return array

    def array(self, array: Array) -> tuple[Any, ...]:
        """The elements of an array; the cursor is after it then."""
        self.at = array.offset
        if array.type == STRING:
            return tuple(self.text() for _ in range(array.count))
        code = f"<{array.count}{SCALARS[array.type]}"
        return struct.unpack(code, self.take(struct.calcsize(code)))


def read_gguf(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a GGUF file, and its metadata about the model as a whole and its tokenizer (`ABOUT`) as texts,
    without arrays.

    Packed tensors are described as their rows of bytes.

    Raises:
        CheckpointError: the file is truncated, damaged or of another version, or has tensors of a type that is not
            read.
    """
    with (
        errors_from(file, "has a damaged GGUF header", "Download it again.", CheckpointError),
        file.open("rb", buffering=2**16) as stream,
    ):
        cursor = _Cursor(file, stream)
        values, entries = _header(cursor)
        tensors = _tensors(cursor, values, entries)
    single = {key: value for key, value in values.items() if not isinstance(value, Array)}
    return tensors, {key: str(value) for key, value in single.items() if key.startswith(ABOUT)}


def read_values(file: Path, keys: Collection[str]) -> dict[str, Any]:
    """Those of the metadata `keys` that a GGUF file has: numbers, texts, and tuples of them.

    Raises:
        CheckpointError: the file is truncated, damaged or of another version.
    """
    with (
        errors_from(file, "has a damaged GGUF header", "Download it again.", CheckpointError),
        file.open("rb", buffering=2**16) as stream,
    ):
        cursor = _Cursor(file, stream)
        values, _ = _header(cursor)
        found = {key: values[key] for key in keys if key in values}
        return {key: cursor.array(v) if isinstance(v, Array) else v for key, v in found.items()}


def _header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, _Entry]]:
    """The metadata and the tensors in the order of the file."""
    mark, version = cursor.take(4), cursor.number("I")
    if mark != MARK or version not in VERSIONS:
        kind = "of a big-endian machine" if version & 0xFFFF == 0 else f"of version {version}"
        raise CheckpointError(f"{cursor.file} is a GGUF file {kind}; versions {VERSIONS} are read. Convert it again.")
    count, fields = cursor.number("Q"), cursor.number("Q")
    if count > MAX_TENSORS:
        raise ValueError(f"it claims {count} tensors; {MAX_TENSORS} are the most")
    values: dict[str, Any] = {}
    for _ in range(fields):
        key = cursor.text(MAX_NAME + len(ORIGINAL_SHAPE))
        if key in values:
            raise ValueError(f"the metadata {key!r} occur twice")
        values[key] = cursor.value()
    entries: dict[str, _Entry] = {}
    for _ in range(count):
        name, axes = cursor.text(4 * MAX_NAME), cursor.number("I")
        if axes > MAX_AXES:
            raise ValueError(f"{name!r} has {axes} axes; {MAX_AXES} is the most")
        if name in entries:
            raise ValueError(f"{name!r} occurs twice")
        shape = struct.unpack(f"<{axes}Q", cursor.take(8 * axes))
        entries[name] = _Entry(shape, cursor.number("I"), cursor.number("Q"))
    return values, entries


def _tensors(cursor: _Cursor, values: Mapping[str, Any], entries: Mapping[str, _Entry]) -> dict[str, TensorInfo]:
    """What the entries describe, checked against the length of the file."""
    alignment = values.get("general.alignment", ALIGNMENT)
    if alignment not in {2**n for n in range(MAX_ALIGNMENT.bit_length())}:
        raise ValueError(f"general.alignment is {alignment}; a power of two up to {MAX_ALIGNMENT} is expected")
    unread = sorted({entry.type for entry in entries.values()} - TYPES.keys())
    if unread:
        raise CheckpointError(
            f"{cursor.file} stores tensors as {', '.join(map(_type_name, unread))}, which is not read. Use a file of "
            f"{', '.join(PACKINGS)}."
        )
    end = start = -(-cursor.at // alignment) * alignment
    shapes = {name: _shape(cursor, values.get(ORIGINAL_SHAPE + name)) for name in entries}
    found, before = {}, ""
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        begin = start + entry.offset
        if begin < end or entry.offset % alignment:
            raise ValueError(f"{name!r} does not begin after {before!r}, at a multiple of {alignment}")
        info = found[name] = _info(cursor.file, name, entry, begin, shapes[name])
        end, before = begin + info.nbytes, name
    if end > cursor.size:
        raise CheckpointError(
            f"{cursor.file} is truncated: it has {cursor.size} bytes, its header says {end}. Download it again."
        )
    # In the order of the file.
    return {name: found[name] for name in entries}


def _info(file: Path, name: str, entry: _Entry, offset: int, original: tuple[int, ...] | None) -> TensorInfo:
    shape, kind = entry.axes[::-1], TYPES[entry.type]
    check_bounds(name, shape)
    whole = shape if original is None else original
    if min(whole, default=1) < 0 or prod(whole) != prod(shape):
        raise ValueError(f"{name!r} has the shape {list(shape)}, and metadata that call it {list(whole)}")
    if isinstance(kind, torch.dtype):
        return TensorInfo(whole, kind, file, offset)
    rows = whole if whole and whole[-1] % kind.numbers == 0 else shape
    if not rows or rows[-1] % kind.numbers:
        raise ValueError(f"{name!r} has rows of {list(rows[-1:])} numbers, which are no blocks of {kind.name}")
    held = (*rows[:-1], rows[-1] // kind.numbers * kind.nbytes)
    return TensorInfo(held, torch.uint8, file, offset, packing=kind, whole=None if rows == whole else whole)


def _shape(cursor: _Cursor, array: object) -> tuple[int, ...] | None:
    """The integers of a shape in the metadata; None when there are none."""
    if array is None:
        return None
    if not isinstance(array, Array) or array.type not in INTEGERS or array.count > MAX_AXES:
        raise ValueError(f"a shape in the metadata is {array!r}; an array of up to {MAX_AXES} integers is expected")
    return cursor.array(array)


def _type_name(code: int) -> str:
    # Imported where it is needed: it takes a fifth of a second.
    from gguf import GGMLQuantizationType

    known = {kind.value: kind.name for kind in GGMLQuantizationType}
    return known.get(code, f"type {code}")
