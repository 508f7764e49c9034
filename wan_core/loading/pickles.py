"""PyTorch checkpoints, read without unpickling them: names, shapes, dtypes and places of their tensors.

A pickle is a program for a stack machine that can call any function. The machine here knows the instructions and names
that `torch.save` writes, and calls only the functions in `CALLS`, which describe tensors and make none. So no code of a
file runs, memory grows only with the bytes of its pickle, and no weight is read: what comes out is a header."""

import io
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..files import errors_from
from .stored import MAX_AXES, SAFETENSORS_DTYPES, CheckpointError, TensorInfo, check_bounds, named_tensors

PICKLE_BYTES = 16 * 2**20
"""The longest pickle that is read. UMT5-XXL's has 30 kB, that of an optimizer's state less than a megabyte."""

MAX_OPERATIONS = 2**18
"""The most instructions; the pickle of a model takes twenty-five per tensor."""

DIRECTORY_BYTES = 4 * 2**20
"""The longest directory of an archive, which has about a hundred bytes per storage."""

MAX_SHARING = 2
"""How many times the size of the file its tensors may have together. Two names may share a storage, as tied embeddings
do, but a small file must not stand for a thousand large tensors."""

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""The number that opens a checkpoint of the format before PyTorch 1.6: five pickles, then the storages."""

STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64, "Untyped": torch.uint8,
}  # fmt: skip
"""Dtypes by the names of PyTorch's storage classes."""

DTYPES = {str(dtype): dtype for dtype in (*SAFETENSORS_DTYPES.values(), torch.complex128)}
"""Dtypes by the names that pickles have for them."""


@dataclass(frozen=True, slots=True)
class _Name:
    """The name of a function or class in a pickle. It is never imported."""

    path: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """Numbers of one dtype that tensors are views of."""

    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A view of a storage; `start` and `strides` count its numbers."""

    storage: _Storage
    dtype: torch.dtype
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_tensors(file: Path) -> dict[str, TensorInfo]:
    """The tensors of the PyTorch checkpoint `file` by name, wrapper keys removed.

    Raises:
        CheckpointError: it holds more than plain tensors and containers, is damaged, compressed or too large, or holds
            no tensors by name.
    """
    content, places = _open(file)
    named = named_tensors(file, content, StoredTensor)
    with errors_from(file, "is a damaged PyTorch checkpoint", "Download it again.", CheckpointError):
        found = {name: _placed(name, tensor, file, places) for name, tensor in named.items()}
    _check_total(file, found.values())
    return found


def require_plain(file: Path) -> None:
    """Raise CheckpointError unless `file` is a PyTorch checkpoint of nothing but tensors, numbers, texts and containers
    of them, within the bounds of this module.
    """
    content, places = _open(file)
    with errors_from(file, "is a damaged PyTorch checkpoint", error=CheckpointError):
        _check_total(file, [_placed("a tensor", tensor, file, places) for tensor in _walk(content)])


def _check_total(file: Path, tensors: Collection[TensorInfo]) -> None:
    total, size = sum(info.nbytes for info in tensors), file.stat().st_size
    if total > MAX_SHARING * size:
        raise CheckpointError(
            f"{file} is refused: its tensors would take {total} bytes, {total / size:.3g} times its own size, because "
            "they share their numbers."
        )


def _walk(content: Any) -> Iterator[StoredTensor]:
    """Every tensor in `content`, whose containers may occur several times, or contain themselves."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, StoredTensor):
            yield value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)


def _open(file: Path) -> tuple[Any, Mapping[str, tuple[int, int]]]:
    """The pickled content of `file`, and where the bytes of each storage begin and end."""
    with errors_from(file, "is a damaged PyTorch checkpoint", "Download it again.", CheckpointError):
        with file.open("rb") as stream:
            is_archive = stream.read(4) == b"PK\x03\x04"
        return (_read_archive if is_archive else _read_legacy)(file)


class _Bounded(io.BufferedReader):
    """A file that refuses to read more at once than an archive's directory may have."""

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(DIRECTORY_BYTES + 1 if size is None or size < 0 else min(size, DIRECTORY_BYTES + 1))
        if len(content) > DIRECTORY_BYTES:
            raise ValueError(f"its directory is longer than {DIRECTORY_BYTES} bytes")
        return content


def _read_archive(file: Path) -> tuple[Any, Mapping[str, tuple[int, int]]]:
    """The format since PyTorch 1.6: a zip archive of `<name>/data.pkl` and of a record `<name>/data/<key>` per storage,
    none of them compressed.
    """
    with _Bounded(io.FileIO(file)) as stream, zipfile.ZipFile(stream) as archive:
        pickles = [info for info in archive.infolist() if info.filename.split("/", 1)[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise CheckpointError(f"{file} is no PyTorch checkpoint: the archive holds {len(pickles)} data.pkl.")
        prefix = pickles[0].filename.removesuffix("data.pkl")
        records = {info.filename: info for info in archive.infolist() if info.filename.startswith(prefix)}
        order = records.get(f"{prefix}byteorder")
        if order is not None and _record(order, stream, 16) == b"big":
            raise CheckpointError(f"{file} was written on a machine of another byte order. Convert it there.")
        content = _run(io.BytesIO(_record(pickles[0], stream, PICKLE_BYTES)), file)
        storages = (info for name, info in records.items() if name.startswith(f"{prefix}data/"))
        return content, {info.filename.removeprefix(f"{prefix}data/"): _span(info, stream) for info in storages}


def _record(info: zipfile.ZipInfo, stream: io.BufferedReader, limit: int) -> bytes:
    """The content of a small record, whose checksum is verified if there is one."""
    begin, end = _span(info, stream)
    if end - begin > limit:
        raise ValueError(f"{info.filename} has {end - begin} bytes, and at most {limit} are read")
    stream.seek(begin)
    content = b""
    while len(content) < end - begin:
        content += stream.read(min(end - begin - len(content), DIRECTORY_BYTES))
    if info.CRC and zlib.crc32(content) != info.CRC:
        raise ValueError(f"the checksum of {info.filename} is wrong")
    return content


def _span(info: zipfile.ZipInfo, stream: io.BufferedReader) -> tuple[int, int]:
    """Where the bytes of a record begin and end."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ValueError(f"{info.filename} is compressed or encrypted, which PyTorch never does")
    stream.seek(info.header_offset)
    head = stream.read(30)
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise ValueError(f"{info.filename} is not where the archive's directory says")
    begin = info.header_offset + 30 + sum(struct.unpack("<HH", head[26:30]))
    if begin + info.file_size > os.fstat(stream.fileno()).st_size:
        raise ValueError(f"{info.filename} reaches beyond the end of the file")
    return begin, begin + info.file_size


def _read_legacy(file: Path) -> tuple[Any, Mapping[str, tuple[int, int]]]:
    """The format before PyTorch 1.6: pickles of a magic number, a version, the byte order, the content and the keys of
    the storages; then each storage, behind the count of its numbers.
    """
    with file.open("rb") as stream:
        head = io.BytesIO(stream.read(PICKLE_BYTES))
        if _run(head, file) != LEGACY_MAGIC:
            raise ValueError("it does not begin as torch.save begins a file")
        _run(head, file)
        if _run(head, file)["little_endian"] is not True:
            raise CheckpointError(f"{file} was written on a machine of another byte order. Convert it there.")
        storages: dict[str, _Storage] = {}
        content, keys = _run(head, file, storages), _run(head, file)
        places, end, size = {}, head.tell(), file.stat().st_size
        for key in keys:
            stream.seek(end)
            count, begin = int.from_bytes(stream.read(8), "little"), end + 8
            end = begin + count * storages[key].dtype.itemsize
            if count != storages[key].count or end > size:
                raise ValueError(f"its storage {key} is not as long as it should be; the file is truncated")
            places[key] = (begin, end)
        return content, places


def _placed(name: str, tensor: StoredTensor, file: Path, places: Mapping[str, tuple[int, int]]) -> TensorInfo:
    """The place of `tensor` in `file`; it must be inside of its storage."""
    check_bounds(name, tensor.shape)
    begin, end = places[tensor.storage.key]
    if end - begin != tensor.storage.count * tensor.storage.dtype.itemsize:
        raise ValueError(f"{name!r} should have {tensor.storage.count} numbers, but {end - begin} bytes are stored")
    size, held = tensor.dtype.itemsize, (end - begin) // tensor.dtype.itemsize
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True)) + 1
    if prod(tensor.shape) and (tensor.start + reach > held or prod(tensor.shape) > held):
        raise ValueError(f"{name!r} has the shape {list(tensor.shape)}, and its storage holds {held} numbers")
    in_order, step = True, 1
    for n, stride in reversed(list(zip(tensor.shape, tensor.strides, strict=True))):
        in_order, step = in_order and (n == 1 or stride == step), step * n
    strides = None if in_order or not prod(tensor.shape) else tensor.strides
    return TensorInfo(tensor.shape, tensor.dtype, file, begin + tensor.start * size, strides)


def _storage(persistent: Any, known: dict[str, _Storage]) -> _Storage:
    """The storage that a persistent id stands for: ("storage", class, key, device, count), older ones with a view."""
    mark, kind, key, _, count, *view = persistent
    if mark != "storage" or not isinstance(kind, _Name) or any(view):
        raise ValueError(f"it refers to {mark!r}, which is no storage")
    dtype = STORAGES.get(kind.path.rpartition(".")[2].removesuffix("Storage"))
    if dtype is None or not kind.path.startswith("torch.") or not isinstance(key, str) or not _is_count(count):
        raise ValueError(f"it holds a storage {kind.path} {key!r} of {count!r} numbers, which is none of PyTorch's")
    if known.setdefault(key, storage := _Storage(dtype, key, count)) != storage:
        raise ValueError(f"it speaks of the storage {key!r} in two ways")
    return storage


def _tensor(storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    return _tensor_of(storage, start, shape, strides, storage.dtype)


def _tensor_with_dtype(storage: Any, start: Any, shape: Any, strides: Any, *extra: Any) -> StoredTensor:
    return _tensor_of(storage, start, shape, strides, DTYPES[extra[2].path])


def _tensor_of(storage: Any, start: Any, shape: Any, strides: Any, dtype: torch.dtype) -> StoredTensor:
    if not isinstance(storage, _Storage) or len(shape) != len(strides) or len(shape) > MAX_AXES:
        raise ValueError("it describes a tensor in a way that PyTorch does not")
    if not all(map(_is_count, (start, *shape, *strides))):
        raise ValueError(f"it describes a tensor of the shape {list(shape)} and the strides {list(strides)}")
    return StoredTensor(storage, dtype, start, tuple(shape), tuple(strides))


def _empty() -> dict[Any, Any]:
    """A dictionary; `torch.save` sets its items afterwards, where their keys are checked."""
    return {}


def _size(shape: Any) -> tuple[Any, ...]:
    if len(shape) > MAX_AXES:
        raise ValueError(f"it holds a shape of {len(shape)} axes")
    return tuple(shape)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _with_attributes(make: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """A tensor without the attributes that were set on it."""
    return _call(make, arguments)


CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _empty,
    "torch.Size": _size,
    "torch.device": lambda *_: None,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
}
"""The functions that a checkpoint may call, with what is called instead."""

NAMED = {"torch.Tensor", "torch.nn.parameter.Parameter", *CALLS}
"""Names that a checkpoint may hold, beside storages and dtypes."""


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Name) or function.path not in CALLS or not isinstance(arguments, tuple):
        raise ValueError("it calls what cannot be called")
    return CALLS[function.path](*arguments)


class _Machine:
    """Runs one pickle. Each method is an instruction, named as `pickletools` names it."""

    def __init__(self, file: Path, storages: dict[str, _Storage]) -> None:
        self.file, self.storages = file, storages
        self.stack: list[Any] = []
        # The stacks below each open mark; items after a mark become one tuple, list or dictionary.
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def name(self, path: str) -> None:
        is_storage = path.startswith("torch.") and path.endswith("Storage")
        if not is_storage and path not in NAMED and path not in DTYPES:
            raise CheckpointError(
                f"{self.file} is refused: it holds more than plain tensors and would run {path} when opened. "
                "Convert it to safetensors where you trust it."
            )
        self.push(_Name(path))

    def mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("it appends to what is no list")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        keys, values = items[::2], items[1::2]
        # Other keys may be slow to hash: a tuple of tuples takes exponential time.
        if type(self.stack[-1]) is not dict or not all(isinstance(k, str | int | float | None) for k in keys):
            raise ValueError("it sets items that no state dict has")
        self.stack[-1].update(zip(keys, values, strict=True))

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        self.push(_call(function, arguments))


def _push_constant(value: object, machine: _Machine, _: object) -> None:
    machine.push(value)


def _push_tuple(length: int, machine: _Machine, _: object) -> None:
    machine.push(tuple([machine.pop() for _ in range(length)][::-1]))


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}

INSTRUCTIONS: Mapping[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, _: None),
    **{name: partial(_push_constant, value) for name, value in CONSTANTS.items()},
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING"), _Machine.push),
    "MARK": _Machine.mark,
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    **{f"TUPLE{n}": partial(_push_tuple, n) for n in (1, 2, 3)},
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "SETITEM": lambda m, _: m.update([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.update(m.since_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    "GLOBAL": lambda m, words: m.name(words.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda m, _: m.name(".".join([m.pop(), m.pop()][::-1])),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, _: m.call()),
    # State that an object is given beside its items, such as `_metadata` of a state dict, is of no use here.
    "BUILD": lambda m, _: m.pop(),
    "BINPERSID": lambda m, _: m.push(_storage(m.pop(), m.storages)),
}  # fmt: skip
"""The instructions that `torch.save` writes, with Python's pickle protocols 2 to 5."""


def _run(stream: io.BytesIO, file: Path, storages: dict[str, _Storage] | None = None) -> Any:
    """The content of the pickle at the position of `stream`; storages that it refers to are added to `storages`."""
    machine = _Machine(file, {} if storages is None else storages)
    for number, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
        if instruction.name == "STOP":
            return machine.pop()
        if instruction.name not in INSTRUCTIONS or number > MAX_OPERATIONS:
            raise ValueError(f"its instruction {number}, {instruction.name}, is none that torch.save writes")
        INSTRUCTIONS[instruction.name](machine, argument)
    raise ValueError("it ends too early")
