"""Tensors of model files: read whole into memory of their own, or seen through a mapping of the file."""

import zipfile
from io import BufferedReader
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .header import CheckpointError, Header, TensorInfo, is_safetensors, read_header


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

    They are read with plain sequential reads straight into their place: memory then holds each number once, and network
    drives and slow disks are read as fast as they can. One file is open at a time.
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
        reach = 1 + sum((n - 1) * stride for n, stride in zip(info.shape, info.strides, strict=True))
        numbers = self._fill(torch.empty(reach, dtype=info.dtype), name)
        return numbers.as_strided(info.shape, info.strides).clone(memory_format=torch.contiguous_format)

    def borrow(self, name: str) -> Tensor:
        """A tensor on the CPU that is valid until the next call, for whoever converts it at once.

        All of them share one piece of memory: an allocator that is given back a piece per tensor may keep them all.

        Raises:
            CheckpointError: as for `read`.
        """
        info = self._header[name]
        if info.strides is not None:
            return self.read(name)
        size = info.nbytes
        if self._scratch.numel() < size:
            self._scratch = torch.empty(0, dtype=torch.uint8)
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._fill(self._scratch[:size].view(info.dtype).reshape(info.shape), name)

    def map(self, name: str) -> Tensor | None:
        """A view of the file, of which no byte is read now; None for a tensor that cannot be seen that way.

        The numbers are those of the file for as long as the view lives; the file must not change meanwhile. Writing
        into the view does not reach the file.
        """
        info = self._header[name]
        if info.offset is None or info.offset % info.dtype.itemsize or info.strides is not None:
            return None
        if info.file not in self._storages:
            size = info.file.stat().st_size
            storage = torch.UntypedStorage.from_file(str(info.file), False, size)
            assert isinstance(storage, torch.UntypedStorage)
            self._storages[info.file] = storage
        storage = self._storages[info.file]
        return torch.empty(0, dtype=info.dtype).set_(storage, info.offset // info.dtype.itemsize, info.shape, ())

    def can_map(self, file: Path) -> bool:
        """Whether tensors of `file` can be seen through a mapping at all."""
        return is_safetensors(file) or zipfile.is_zipfile(file)

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
    """All tensors of a file, on the CPU in memory of their own, and its metadata.

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
        """As for files; one that is not there is taken for a published one, which can be mapped."""
        return not file.exists() or super().can_map(file)
