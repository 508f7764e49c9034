"""Safetensors files, written tensor by tensor.

The safetensors library's own writer makes files that only their owner can read, and wants all tensors in memory.
"""

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from .header import SAFETENSORS_DTYPES

CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""The dtype and the shape of each tensor of a file, by name."""


def file_size(layout: Layout) -> int:
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
    file: Path, layout: Layout, made: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file of that layout whose tensors are made one after the other, in any order.

    Raises:
        OSError: the disk is full or fails.
    """
    # Widest numbers first, so that all of them are aligned.
    placed = sorted(layout, key=lambda name: -layout[name][0].itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts, end = {}, 0
    for name in placed:
        dtype, shape = layout[name]
        starts[name] = end
        end += dtype.itemsize * prod(shape)
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in made:
            stream.seek(8 + len(text) + starts[name])
            stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
