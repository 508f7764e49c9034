"""Names, shapes and dtypes of the tensors in model files, read without reading the weights."""

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import SafetensorError, safe_open

from ..reading import blamed_on
from .pickles import read_tensors
from .stored import SAFETENSORS_DTYPES, CheckpointError, TensorInfo, check_bounds

HEADER_BYTES = 16 * 2**20
"""The longest header that is read. Those of published models have less than 0.5 MB, most of a LoRA's is metadata."""

HEADER_TEXTS = 2**18
"""The most texts in a header, five per tensor. Parsed, a text takes up to fifty times its length."""

FOREIGN_STARTS = {
    b"version https://git-lfs": "is a git-LFS pointer, not the weights; run `git lfs pull` or download the file",
    b"GGUF": "is a GGUF file; use the safetensors release of the model",
    b"<": "is a web page, not weights; the download went to an error or login page, so download the file again",
    b"{": "is a JSON file, not weights",
}
"""How files that are not weights begin, and what to tell their owner."""


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


def is_safetensors(file: Path) -> bool:
    """Whether `file` is a safetensors file (True) or a PyTorch pickle (False), judged by its first bytes.

    Raises:
        CheckpointError: it is neither.
    """
    with blamed_on(file, "cannot be read", error=CheckpointError):
        if not file.is_file():
            raise ValueError("there is no such file")
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
        with blamed_on(file, "is a damaged PyTorch checkpoint", "Download it again.", CheckpointError):
            is_whole = zipfile.is_zipfile(file)
        if not is_whole:
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
    _read(file)


def _read(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata of one file."""
    return _safetensors_header(file) if is_safetensors(file) else (read_tensors(file), {})


def _safetensors_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read the JSON that opens the file: 8 bytes of length, then names with dtype, shape and byte range.

    The safetensors library judges whether the header is sound and the file as long as it says; beyond that, the bounds
    of `stored` hold here, and a name must not occur twice, of which the library takes the last.
    """
    actual = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length + 8 > actual:
            raise CheckpointError(
                f"{file} is truncated or damaged: its header is said to take {length} bytes, the file has "
                f"{actual}. Download it again."
            )
        raw = stream.read(min(length, HEADER_BYTES + 1))
    with blamed_on(file, "has a damaged safetensors header", "Download it again.", CheckpointError):
        texts = (raw.count(b'"') - raw.count(b'\\"')) // 2
        if length > HEADER_BYTES or texts > HEADER_TEXTS:
            raise ValueError(f"it has {length} bytes and {texts} texts; {HEADER_BYTES} and {HEADER_TEXTS} are the most")
        try:
            # As arrays of numpy, because the library's mapping for PyTorch needs memory of the file's size.
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
    """Raise CheckpointError where more can be said of a header that the library refuses than it says itself."""
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
