"""Files of tensors: names, shapes and dtypes read without the weights, tensors read or mapped, safetensors written."""

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import errors_from
from .gguf_files import MARK, read_gguf
from .pickles import read_tensors
from .stored import SAFETENSORS_DTYPES, CheckpointError, TensorInfo, check_bounds

HEADER_BYTES = 16 * 2**20
"""The longest header that is read. Those of published models have less than 0.5 MB, most of a LoRA's is metadata."""

HEADER_TEXTS = 2**18
"""The most texts in a header, five per tensor. Parsed, a text takes up to fifty times its length."""

FOREIGN_STARTS = {
    b"version https://git-lfs": "is a git-LFS pointer, not the weights; run `git lfs pull` or download the file",
    b"<": "is a web page, not weights; the download went to an error or login page, so download the file again",
    b"{": "is a JSON file, not weights",
}
"""How files that are not weights begin, and what the message says of them."""

FileKind = Literal["safetensors", "gguf", "pickle"]


@dataclass(frozen=True, eq=False)
class Header(Mapping[str, TensorInfo]):
    """The tensors of one model, over all its shards, as the files name them; `metadata` joins that of the files."""

    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    metadata: Mapping[str, str]

    def __getitem__(self, name: str) -> TensorInfo:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def read_header(files: Sequence[Path]) -> Header:
    """The joint header of the files of one model.

    Raises:
        CheckpointError: a file is empty, truncated, not a weights file, not readable as plain tensors, or two files
            hold a tensor of the same name.
    """
    if not files:
        raise CheckpointError("No model file was given; name a .safetensors or .pth file, or a folder that holds one.")
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file in map(Path, files):
        found, extra = _read(file)
        double = sorted(found.keys() & tensors.keys())
        if double:
            raise CheckpointError(
                f"{file.name} and {tensors[double[0]].file.name} both hold {double[0]!r} (and {len(double) - 1} more). "
                "They are two models, or two copies of one: name the files of one model only."
            )
        tensors |= found
        metadata |= extra
    return Header(MappingProxyType(tensors), tuple(map(Path, files)), MappingProxyType(metadata))


def file_kind(file: Path) -> FileKind:
    """What the file of weights is, judged by its first bytes.

    Raises:
        CheckpointError: it is none.
    """
    with errors_from(file, "cannot be read", error=CheckpointError):
        if not file.is_file():
            raise ValueError("there is no such file")
        with file.open("rb") as stream:
            start = stream.read(64)
    size = file.stat().st_size
    if not start:
        raise CheckpointError(f"{file} is empty; download it again.")
    # The first 8 bytes are the header's length, so text read as that number is astronomically large.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return "safetensors"
    if start.startswith(MARK):
        return "gguf"
    for mark, meaning in FOREIGN_STARTS.items():
        if start.lstrip().startswith(mark):
            raise CheckpointError(f"{file} {meaning}.")
    if start[:4] == b"PK\x03\x04":
        with errors_from(file, "is a damaged PyTorch checkpoint", "Download it again.", CheckpointError):
            is_whole = zipfile.is_zipfile(file)
        if not is_whole:
            raise CheckpointError(f"{file} is truncated: {size} bytes, and the end is missing; download it again.")
        if file.suffix == ".safetensors":
            # `torch.load` goes by this suffix, too.
            raise CheckpointError(f"{file} is a PyTorch checkpoint under a wrong name; rename it to end in .pth.")
        return "pickle"
    if start[:1] == b"\x80":
        return "pickle"
    raise CheckpointError(
        f"{file} is neither a safetensors file, a GGUF file nor a PyTorch checkpoint (it starts with {start[:8]!r})."
    )


def verify_file(file: Path) -> None:
    """Check that `file` is a whole weights file, by its header and length only.

    Raises:
        CheckpointError: it is empty, truncated, or not a weights file.
    """
    _read(file)


def _read(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata of one file."""
    match file_kind(file):
        case "safetensors":
            return _safetensors_header(file)
        case "gguf":
            return read_gguf(file)
        case "pickle":
            return read_tensors(file), {}


def _safetensors_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read the JSON that opens the file: 8 bytes of length, then names with dtype, shape and byte range.

    The safetensors library checks the header and the length of the file. Checked here as well: the bounds of `stored`,
    and that no name occurs twice, of which the library would take the last.
    """
    actual = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length + 8 > actual:
            raise CheckpointError(
                f"{file} is truncated or damaged: its header has {length} bytes by the first number in it, the file "
                f"{actual} in all. Download it again."
            )
        raw = stream.read(min(length, HEADER_BYTES + 1))
    with errors_from(file, "has a damaged safetensors header", "Download it again.", CheckpointError):
        texts = (raw.count(b'"') - raw.count(b'\\"')) // 2
        if length > HEADER_BYTES or texts > HEADER_TEXTS:
            raise ValueError(f"it has {length} bytes and {texts} texts; {HEADER_BYTES} and {HEADER_TEXTS} are the most")
        try:
            # Opened for numpy: the library's mapping for PyTorch would reserve memory of the file's size.
            with safe_open(file, "numpy") as checked:
                metadata = dict(checked.metadata() or {})
        except SafetensorError as error:
            _explain(file, raw, actual, error)
            raise
        entries = json.loads(raw, object_pairs_hook=_without_doubles)
        entries.pop("__metadata__", None)
        found = {}
        _require_known(file, {entry["dtype"] for entry in entries.values()})
        for name, entry in entries.items():
            check_bounds(name, entry["shape"])
            offset = 8 + length + entry["data_offsets"][0]
            found[name] = TensorInfo(tuple(entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]], file, offset)
    return found, metadata


def _explain(file: Path, raw: bytes, actual: int, error: SafetensorError) -> None:
    """Raise CheckpointError with the reason that the library refuses a header, where ours is clearer than its own."""
    _require_known(file, {code.decode() for code in re.findall(rb'"dtype"\s*:\s*"(\w*)"', raw)})
    ends = re.findall(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d{1,18})\s*\]', raw)
    expected = 8 + len(raw) + max(map(int, ends), default=0)
    if ends and expected != actual:
        state = "truncated" if actual < expected else "damaged"
        raise CheckpointError(
            f"{file} is {state}: it has {actual} bytes, its header says {expected}. Download it again."
        ) from error


def _require_known(file: Path, codes: set[str]) -> None:
    unknown = sorted(codes - SAFETENSORS_DTYPES.keys())
    if unknown:
        raise CheckpointError(
            f"{file} stores tensors as {', '.join(unknown[:5])}, which this version of PyTorch does not know."
        )


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return unique


class TensorReader(Protocol):
    """Tensors by name, in files or in memory."""

    def read(self, name: str) -> Tensor:
        """A tensor that stays as it is."""
        ...

    def borrow(self, name: str) -> Tensor:
        """A tensor that is valid until the next one is asked for."""
        ...


class TensorFiles:
    """The tensors of a header, by name. Use as a context manager; tensors that are read or mapped stay valid after it.

    They are read sequentially, straight into their place: memory then holds each number once, and network drives and
    slow disks give all their speed. One file is open at a time.
    """

    def __init__(self, header: Header) -> None:
        self._header = header
        self._stream: BufferedReader | None = None
        self._file: Path | None = None
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._storages: dict[Path, torch.UntypedStorage] = {}

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        self._storages.clear()

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own, on the CPU.

        Raises:
            CheckpointError: the file has become shorter since its header was read.
        """
        info = self._header[name]
        if info.strides is None:
            return self._fill(torch.empty(info.shape, dtype=info.dtype), name)
        # A transposed or sliced tensor: the span that it covers is read, then put in order.
        reach = 1 + sum((n - 1) * stride for n, stride in zip(info.shape, info.strides, strict=True))
        numbers = self._fill(torch.empty(reach, dtype=info.dtype), name)
        return numbers.as_strided(info.shape, info.strides).clone(memory_format=torch.contiguous_format)

    def borrow(self, name: str) -> Tensor:
        """A tensor on the CPU that is valid until the next call, for callers that convert it at once.

        All of them share one buffer: the C library's allocator may keep what is freed tensor by tensor.

        Raises:
            CheckpointError: as for `read`.
        """
        info = self._header[name]
        if info.strides is not None:
            return self.read(name)
        size = info.nbytes
        if self._scratch.numel() < size:
            self._scratch = torch.empty(0, dtype=torch.uint8)
            # The old buffer is freed first, so that memory never holds both.
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._fill(self._scratch[:size].view(info.dtype).reshape(info.shape), name)

    def map(self, name: str) -> Tensor | None:
        """A view of the file, read when its numbers are used; None for a tensor that cannot be a view.

        The file must not change as long as the view lives. Writing into the view does not reach the file.
        """
        info = self._header[name]
        if info.offset is None or info.offset % info.dtype.itemsize or info.strides is not None:
            return None
        if info.file not in self._storages:
            size = info.file.stat().st_size
            # Mapped privately: what is written into it stays in this process.
            storage = torch.UntypedStorage.from_file(str(info.file), False, size)
            assert isinstance(storage, torch.UntypedStorage)
            self._storages[info.file] = storage
        storage = self._storages[info.file]
        return torch.empty(0, dtype=info.dtype).set_(storage, info.offset // info.dtype.itemsize, info.shape, ())

    def can_map(self, file: Path) -> bool:
        """Whether tensors of `file` can be seen through a mapping at all."""
        return file_kind(file) != "pickle" or zipfile.is_zipfile(file)

    def _fill(self, tensor: Tensor, name: str) -> Tensor:
        info = self._header[name]
        assert info.offset is not None, "tensors that are read lie in a file"
        stream = self._open(info)
        stream.seek(info.offset)
        if stream.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data) != tensor.nbytes:
            raise CheckpointError(f"{info.file} ended within {name!r}; it was changed while it was read. Try again.")
        return tensor

    def _open(self, info: TensorInfo) -> BufferedReader:
        if self._stream is None or info.file != self._file:
            self._close()
            self._file, self._stream = info.file, info.file.open("rb")
        return self._stream

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream, self._file = None, None


def read_whole(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, on the CPU, and its metadata.

    Raises:
        CheckpointError: it is not there, damaged, or no file of tensors.
    """
    header = read_header([file])
    with TensorFiles(header) as files:
        return {name: files.read(name) for name in header}, dict(header.metadata)


class TensorShapes(TensorFiles):
    """The same tensors on the meta device: nothing is opened, and the files need not be there."""

    def read(self, name: str) -> Tensor:
        """The tensor without its numbers."""
        info = self._header[name]
        return torch.empty(info.shape, dtype=info.dtype, device="meta")

    borrow = read

    def map(self, name: str) -> Tensor | None:
        """The tensor without its numbers, if it could be a view of its file."""
        info = self._header[name]
        return None if (info.offset or 0) % info.dtype.itemsize else self.read(name)

    def can_map(self, file: Path) -> bool:
        """As for files; one that is not on this machine is taken for a published one, which can be mapped."""
        return not file.exists() or super().can_map(file)


CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}

TensorSpecs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""The dtype and the shape of each tensor of a file, by name."""


def file_size(layout: TensorSpecs) -> int:
    """Bytes of the tensors in a file of that layout."""
    return sum(dtype.itemsize * prod(shape) for dtype, shape in layout.values())


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of any device into `file`, in place of its content.

    Raises:
        OSError: the disk is full or fails.
    """
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_made(file, layout, tensors.items(), metadata)


def write_made(
    file: Path, layout: TensorSpecs, made: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file of that layout from tensors that are made one after the other, in any order.

    Raises:
        OSError: the disk is full or fails.
    """
    # Widest numbers first, so that every tensor is aligned and can be a view of the file.
    placed = sorted(layout, key=lambda name: -layout[name][0].itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, end = {}, 0
    for name in placed:
        dtype, shape = layout[name]
        starts[name] = end
        end += dtype.itemsize * prod(shape)
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The format aligns the first tensor to 8 bytes by spaces after the header.
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in made:
            stream.seek(8 + len(text) + starts[name])
            stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
