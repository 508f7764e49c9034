"""Names, shapes and dtypes of the tensors in model files, read without reading the weights."""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
} | {
    code: getattr(torch, name)
    for code, name in (("F8_E8M0", "float8_e8m0fnu"), ("U16", "uint16"), ("U32", "uint32"), ("U64", "uint64"))
    if hasattr(torch, name)
}
WRAPPER_KEYS = ("state_dict", "module", "model_state", "model")
"""Top-level keys under which training frameworks store a state dict."""

FOREIGN_STARTS = {
    b"version https://git-lfs": "is a git-LFS pointer, not the weights; run `git lfs pull` or download the file",
    b"GGUF": "is a GGUF file; use the safetensors release of the model",
    b"<": "is a web page, not weights; the download went to an error or login page, so download the file again",
    b"{": "is a JSON file, not weights",
}
"""How files that are not weights begin, and what to tell their owner."""


class CheckpointError(ValueError):
    """A model file that cannot be used as asked; the message says why and what to do."""


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header tells about one tensor.

    `offset` is where its bytes begin in a safetensors file; None in a PyTorch checkpoint, which must be unpickled.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int | None = None


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
        reader = _safetensors_header if is_safetensors(file) else _pickle_header
        found, extra = reader(file)
        double = sorted(found.keys() & tensors.keys())
        if double:
            raise CheckpointError(
                f"{file.name} and {tensors[double[0]].file.name} both hold {double[0]!r} (and {len(double) - 1} more). "
                "They are two models, or two copies of one: name the files of one model only."
            )
        tensors |= found
        metadata |= extra
    return Header(MappingProxyType(tensors), tuple(map(Path, files)), MappingProxyType(metadata))


def is_safetensors(file: Path) -> bool:
    """Whether `file` is a safetensors file (True) or a PyTorch pickle (False), judged by its first bytes.

    Raises:
        CheckpointError: it is neither.
    """
    with file.open("rb") as stream:
        start = stream.read(64)
    size = file.stat().st_size
    if not start:
        raise CheckpointError(f"{file} is empty; download it again.")
    # The first 8 bytes are the header's length, so text read as that number is astronomically large.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32:
        return True
    for mark, meaning in FOREIGN_STARTS.items():
        if start.lstrip().startswith(mark):
            raise CheckpointError(f"{file} {meaning}.")
    if start[:4] == b"PK\x03\x04":
        if not zipfile.is_zipfile(file):
            raise CheckpointError(f"{file} is truncated: {size} bytes, and the end is missing; download it again.")
        if file.suffix == ".safetensors":
            # `torch.load` goes by this suffix, too.
            raise CheckpointError(f"{file} is a PyTorch checkpoint under a wrong name; rename it to end in .pth.")
        return False
    if start[:1] == b"\x80":
        return False
    raise CheckpointError(
        f"{file} is neither a safetensors file nor a PyTorch checkpoint (it starts with {start[:8]!r})."
    )


def verify_file(file: Path) -> None:
    """Check that `file` is a whole weights file, by its header and length only.

    Raises:
        CheckpointError: it is empty, truncated, or not a weights file.
    """
    if is_safetensors(file):
        _safetensors_header(file)


@contextmanager
def open_tensors(file: Path) -> Iterator[Callable[[str], Tensor]]:
    """A function from a tensor's name to the tensor on the CPU, which may be a view of the file while that is open."""
    if is_safetensors(file):
        with safe_open(file, "pt") as stream:
            yield stream.get_tensor
    else:
        yield open_pickle(file, "cpu").__getitem__


def open_pickle(file: Path, device: str) -> dict[str, Tensor]:
    """The tensors of a PyTorch checkpoint, mapped from the file where its format allows, wrapper keys removed.

    `device` "meta" gives shapes without data. Only plain tensors and containers are unpickled.

    Raises:
        CheckpointError: the file needs code to be run, is damaged, or holds no tensors by name.
    """
    try:
        content = torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if not refused:
            raise CheckpointError(f"{file} is a damaged PyTorch checkpoint; download it again.") from error
        raise CheckpointError(
            f"{file} is refused: it holds more than plain tensors and would run {refused[1]} when opened. "
            "Convert it to safetensors where you trust it."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as a PyTorch checkpoint: {_first_line(error)}") from error
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPER_KEYS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    named = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not named:
        raise CheckpointError(f"{file} holds no named tensors (its top level is a {type(content).__name__}).")
    return named


def _pickle_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    tensors = open_pickle(file, "meta")
    return {str(k): TensorInfo(tuple(t.shape), t.dtype, file) for k, t in tensors.items()}, {}


def _safetensors_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read the JSON that opens the file: 8 bytes of length, then names with dtype, shape and byte range."""
    actual = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length + 8 > actual:
            raise CheckpointError(
                f"{file} is truncated or damaged: its header is said to take {length} bytes, the file has "
                f"{actual}. Download it again."
            )
        raw = stream.read(length)
    try:
        entries: dict[str, Any] = json.loads(raw)
        metadata = entries.pop("__metadata__", None) or {}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        found = {
            name: (tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{file} has a damaged safetensors header ({_first_line(error)}); download it again."
        ) from error
    expected = 8 + length + end
    if actual != expected:
        state = "truncated" if actual < expected else "damaged"
        raise CheckpointError(
            f"{file} is {state}: it has {actual} bytes, its header says {expected}. Download it again."
        )
    unknown = sorted({code for _, code, _ in found.values()} - SAFETENSORS_DTYPES.keys())
    if unknown:
        raise CheckpointError(
            f"{file} stores tensors as {', '.join(unknown)}, which this version of PyTorch does not know."
        )
    return {
        name: TensorInfo(shape, SAFETENSORS_DTYPES[code], file, offset) for name, (shape, code, offset) in found.items()
    }, metadata


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
