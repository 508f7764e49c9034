"""GGUF files: by the `gguf` package in the layout of ComfyUI-GGUF, and byte by byte for what no writer makes."""

import struct
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from tests.reference import load_case
from wan_core.offload.packed import PACKINGS

Types = Callable[[str, Tensor], Type]
"""The type of a tensor by its name and content."""

MADE = (Type.Q8_0, Type.Q5_1, Type.Q5_0, Type.Q4_1, Type.Q4_0)
"""The types that the package quantises to."""


def big(name: str, tensor: Tensor) -> bool:
    """Whether ComfyUI-GGUF's converter lets a tensor be quantised: the matrices of blocks."""
    return "blocks." in name and tensor.ndim == 2 and tensor.numel() > 1024


def types(kind: Type, rest: Type = Type.F32) -> Types:
    """`kind` for the matrices of blocks and for UMT5's; `rest` for other matrices; F32 for small tensors."""

    def choose(name: str, tensor: Tensor) -> Type:
        if big(name, tensor) or (name.startswith(("enc.blk", "token_embd")) and tensor.ndim == 2):
            return kind if tensor.shape[1] % 32 == 0 else Type.F16
        return Type.F32 if tensor.ndim < 2 or tensor.ndim > 4 or tensor.numel() <= 1024 else rest

    return choose


def encoded(tensor: Tensor, kind: Type) -> np.ndarray:
    """A tensor as the numbers of a GGUF type: quantised by the package, or taken from `blocks` for the K and IQ types,
    which it cannot make."""
    if kind in MADE or kind in (Type.F32, Type.F16, Type.BF16):
        return gguf.quants.quantize(tensor.float().numpy(), kind)
    count = tensor.numel() // PACKINGS[kind.name].numbers
    chosen = torch.arange(count) * 7 % len(blocks(kind.name))
    return blocks(kind.name)[chosen].view(*tensor.shape[:-1], -1).numpy()


@cache
def blocks(name: str) -> Tensor:
    """The blocks of a type in the reference values, (n, bytes)."""
    return load_case("gguf_blocks")[f"{name}_raw"].reshape(-1, PACKINGS[name].nbytes)


def write(
    file: Path,
    tensors: Mapping[str, Tensor],
    choose: Types | None = None,
    arch: str | None = "wan",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Tensor]:
    """Write `tensors` in that order; returns the float32 values that the package reads from what was written.

    Args:
        choose: `types(Q8_0)` if None.
        shapes: of tensors that are stored in another shape, their own, as `comfy.gguf.orig_shape` says it.
    """
    writer = gguf.GGUFWriter(file, arch or "none")
    if arch is None:
        writer.kv_data[0].clear()
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for name, shape in (shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
    values = {}
    for name, tensor in tensors.items():
        kind = (choose or types(Type.Q8_0))(name, tensor)
        data = encoded(tensor, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        values[name] = torch.from_numpy(gguf.quants.dequantize(data, kind).copy()).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def text(value: str) -> bytes:
    """A text as the format has it: its length, its bytes."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def number(key: str, value: int) -> bytes:
    """An entry of metadata, a number of 4 bytes."""
    return text(key) + struct.pack("<II", 4, value)


def array(key: str, kind: int, count: int, content: bytes = b"") -> bytes:
    """An entry of metadata, an array that claims `count` elements."""
    return text(key) + struct.pack("<IIQ", 9, kind, count) + content


def tensor(name: str = "a", axes: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    """A tensor in the header, its axes from the innermost out."""
    return text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)


def made(
    *tensors: bytes,
    fields: tuple[bytes, ...] = (),
    data: int = 128,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A whole file of these entries with `data` zeros; `counts` are claimed instead of the true numbers of entries."""
    claimed = counts or (len(tensors), len(fields))
    header = b"GGUF" + struct.pack("<IQQ", version, *claimed) + b"".join(fields) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + bytes(data)
