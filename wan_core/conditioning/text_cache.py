"""Encoded prompts, kept so that the same prompt does not need its encoder again."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..atomic import replacing
from ..checkpoints.header import CheckpointError, is_safetensors
from ..checkpoints.read import read_whole
from ..checkpoints.write import write_safetensors
from ..runtime import log

MEMORY_BYTES = 64 * 2**20
"""Room for a hundred prompts of eighty tokens of UMT5-XXL in bfloat16."""

SAMPLES, SAMPLE_BYTES = 256, 64 * 1024
"""How much of a file's weights a fingerprint reads: 16 MiB, a fraction of a second."""

DIRECTORY_BYTES = 2**20
"""The end of a PyTorch checkpoint that a fingerprint reads whole: the archive's directory, with checksums of all
tensors.
"""

NAME = "embedding"


class Store(Protocol):
    """Where embeddings (tokens, dim) are kept by key."""

    def get(self, key: str) -> Tensor | None: ...

    def put(self, key: str, rows: Tensor) -> None: ...


class MemoryStore:
    """The embeddings that were used last, up to `max_bytes`."""

    def __init__(self, max_bytes: int = MEMORY_BYTES) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, key: str) -> Tensor | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: str, rows: Tensor) -> None:
        if key in self._kept or rows.nbytes > self.max_bytes:
            return
        self._kept[key] = rows
        self._bytes += rows.nbytes
        while self._bytes > self.max_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= dropped.nbytes


@dataclass(frozen=True)
class DiskStore:
    """One safetensors file per prompt in `directory`, made when it is needed. A file that cannot be read is not there;
    a folder that cannot be written to costs a notice.
    """

    directory: Path

    def get(self, key: str) -> Tensor | None:
        try:
            return read_whole(self._file(key))[0].get(NAME)
        except CheckpointError:
            return None

    def put(self, key: str, rows: Tensor) -> None:
        try:
            with replacing(self._file(key)) as partial:
                write_safetensors(partial, {NAME: rows})
        except OSError as error:
            _warn(self.directory, error.strerror or str(error))

    def _file(self, key: str) -> Path:
        return self.directory / f"{key}.safetensors"


@cache
def _warn(directory: Path, problem: str) -> None:
    """Say once for each folder what is wrong with it."""
    log.warning("Encoded prompts cannot be kept in %s: %s", directory, problem)


@dataclass(frozen=True)
class TextCache:
    """The embeddings of one encoder's prompts.

    Attributes:
        fingerprint: of the encoder, see `fingerprint`.
        stores: asked one after the other; what is new goes into all of them.
    """

    fingerprint: str
    stores: tuple[Store, ...]

    @classmethod
    def in_memory(cls, fingerprint: str, max_bytes: int = MEMORY_BYTES) -> "TextCache":
        return cls(fingerprint, (MemoryStore(max_bytes),))

    def and_on_disk(self, directory: str | Path) -> "TextCache":
        """A cache that shares this one's memory and also keeps prompts in `directory`."""
        return replace(self, stores=(*self.stores, DiskStore(Path(directory))))

    def key(self, ids: Tensor, dtype: torch.dtype) -> str:
        """The name of a prompt's embedding: of the encoder, the dtype that it computes in, and the prompt's token ids,
        which stand for the cleaned text and for the tokenizer that cut it."""
        content = f"{self.fingerprint} {dtype} {ids.tolist()}"
        return hashlib.sha256(content.encode()).hexdigest()

    def get(self, key: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        """The embedding of that name; None when it is not there, or is none of that shape and dtype."""
        for index, store in enumerate(self.stores):
            rows = store.get(key)
            if rows is not None and rows.shape == shape and rows.dtype == dtype:
                for earlier in self.stores[:index]:
                    earlier.put(key, rows)
                return rows
        return None

    def put(self, key: str, rows: Tensor) -> None:
        """Keep the embedding (tokens, dim) of a prompt."""
        kept = rows.detach().cpu().clone()
        for store in self.stores:
            store.put(key, kept)


def fingerprint(files: Sequence[Path], *details: str) -> str:
    """Tells the weights in `files` from others without reading all of them: a digest of their headers, their sizes, a
    sample of their bytes, and of `details` on how they are used.

    A file is read once as long as its size and its time of change stay the same. Two files that differ only in a few
    weights may look the same if they are safetensors.
    """
    digest = hashlib.sha256("\n".join(details).encode())
    for file in files:
        state = file.stat()
        digest.update(_file_digest(file, state.st_size, state.st_mtime_ns))
    return digest.hexdigest()


@cache
def _file_digest(file: Path, size: int, changed: int) -> bytes:
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if is_safetensors(file):
            length = stream.read(8)
            digest.update(length + stream.read(int.from_bytes(length, "little")))
        else:
            stream.seek(max(0, size - DIRECTORY_BYTES))
            digest.update(stream.read())
        last = max(0, size - SAMPLE_BYTES)
        for index in range(SAMPLES):
            stream.seek(last * index // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.digest()
