"""The description of one stored tensor, and bounds for files of every format."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeVar

import torch

from ..offload.packed import Packing

MAX_NAME = 512
"""The longest name of a tensor, in characters; those of published models and LoRAs have less than 150."""

MAX_AXES = 8
"""The most axes of a tensor; those of convolutions have five."""

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
"""Dtypes by the codes of safetensors, as far as the running PyTorch has them."""


class CheckpointError(ValueError):
    """A model file that cannot be used as asked; the message says why and what to do."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a file describes it; one of packed numbers as its rows of bytes.

    Attributes:
        offset: where its bytes begin in `file`; None when there is no file.
        strides: numbers between neighbours along each axis; None when they lie in the order of reading.
        packing: of bytes that are packed numbers; None for numbers of `dtype`.
        whole: the shape that a file gives to packed numbers whose rows in it are other ones; None where its rows are
            theirs.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    offset: int | None = None
    strides: tuple[int, ...] | None = None
    packing: Packing | None = None
    whole: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        return prod(self.shape) * self.dtype.itemsize


WRAPPER_KEYS = (
    *("generator_ema", "generator", "model_ema", "ema_model", "ema_state_dict", "ema", "params_ema", "state_dict"),
    *("model_state_dict", "module", "model_state", "model", "params", "dit", "transformer", "student", "net"),
)
"""Top-level keys under which programs store a state dict, averaged weights first: Self-Forcing and CausVid keep the
model that generates beside its critic and optimizer."""

MAX_WRAPPERS = 4
"""How deep wrappers are looked through: a dictionary may hold itself."""

OPTIMIZER_KEYS = {"optimizer", "optimizer_state_dict", "optimizer_states", "state", "param_groups", "exp_avg"}
"""Top-level keys of files that hold the state of an optimizer."""

T = TypeVar("T")


def named_tensors(file: Path, content: object, kind: type[T]) -> dict[str, T]:
    """The tensors, values of `kind`, of a state dict or of the one inside of the first wrapper that holds any.

    Raises:
        CheckpointError: there are none; the message says what the file holds instead.
    """
    found = _unwrapped(content, kind, MAX_WRAPPERS)
    if not found:
        raise CheckpointError(_without_tensors(file, content))
    return found


def _unwrapped(content: object, kind: type[T], depth: int) -> dict[str, T]:
    if not isinstance(content, dict) or not depth:
        return {}
    wrapped = (_unwrapped(content[key], kind, depth - 1) for key in WRAPPER_KEYS if key in content)
    return next(filter(None, wrapped), {str(k): v for k, v in content.items() if isinstance(v, kind)})


def _without_tensors(file: Path, content: object) -> str:
    if not isinstance(content, dict):
        return f"{file} holds no named tensors (its top level is a {type(content).__name__})."
    keys = ", ".join(repr(str(key)[:40]) for key in list(content)[:5]) or "nothing"
    if content.keys() & OPTIMIZER_KEYS:
        return f"{file} is the state of an optimizer (it holds {keys}), not a model; name the model file beside it."
    return (
        f"{file} holds no named tensors that are known: its top level holds {keys}. If the weights are under one of "
        "these, save that part as a .safetensors file."
    )


def check_bounds(name: str, shape: Sequence[int]) -> None:
    """Raise ValueError unless PyTorch can hold a tensor of this name and shape."""
    if len(name) > MAX_NAME:
        raise ValueError(f"the tensor name {name[:40]!r}... has {len(name)} characters; {MAX_NAME} is the most")
    if len(shape) > MAX_AXES:
        raise ValueError(f"{name!r} has {len(shape)} axes; {MAX_AXES} is the most")
    # An empty tensor takes no bytes of the file whatever its other axes say.
    if prod(max(n, 1) for n in shape) >= 2**48:
        raise ValueError(f"{name!r} has the shape {list(shape)}, which no file can hold")
