"""Three-dimensional rotary position embedding: a rotation of interleaved pairs."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import Operation
from .ops import may_overwrite

THETA = 10000.0
ROTATION_TOKENS = 8192
"""Tokens rotated at a time, so that the float32 products are small beside the sequence."""
CPU_TOKENS = 256
"""The same on a CPU, where a piece of this size stays in its cache."""


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines (S, 1, head_dim / 2) in float32, one row per token."""

    cos: Tensor
    sin: Tensor


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """How many channels of a head the time, height and width axes rotate: 44, 42 and 42 of 128 (Wan-Video/Wan2.1)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotary_table(
    grid: tuple[int, int, int], head_dim: int, device: torch.device, *, theta: float = THETA
) -> RotaryTable:
    """The rotation of every token of a (frames, rows, columns) grid, tokens ordered with columns fastest.

    Pair j of an axis of width D turns by `position * theta ** (-2j / D)`. Angles, cosines and sines are computed in
    float64 on the CPU, one axis at a time (Wan-Video/Wan2.1 `rope_params`), and expanded to the grid on `device`.
    """
    cosines: list[Tensor] = []
    sines: list[Tensor] = []
    for axis, (length, width) in enumerate(zip(grid, axis_widths(head_dim), strict=True)):
        frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
        angle = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * frequency
        shape = [1, 1, 1, width // 2]
        shape[axis] = length
        for parts, values in ((cosines, angle.cos()), (sines, angle.sin())):
            parts.append(values.float().to(device).view(shape).expand(*grid, -1))
    return RotaryTable(*(torch.cat(parts, -1).reshape(-1, 1, head_dim // 2) for parts in (cosines, sines)))


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """`x` (B, S, heads, head_dim) rotated by `table` in float32, as a new tensor in x's dtype: the definition, and what
    compilers and devices other than a CPU use with gradients.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((even * table.cos - odd * table.sin, even * table.sin + odd * table.cos), -1)
    return turned.flatten(-2).to(x.dtype)


def rotate_(x: Tensor, table: RotaryTable) -> Tensor:
    """`rotate` in the memory of `x`; with gradients a new tensor."""
    on_cpu = x.device.type == "cpu"
    if not may_overwrite(x):
        return (_rotate_complex if on_cpu else rotate)(x, table)
    # Only a CPU has a choice: elsewhere the planned memory is that of the real form.
    return _ROTATE(x, table, sizes=tuple(x.shape)) if on_cpu else _rotate_real_(x, table)


def _rotate_real_(x: Tensor, table: RotaryTable) -> Tensor:
    for chunk, cos, sin in _pieces(x, table, CPU_TOKENS if x.device.type == "cpu" else ROTATION_TOKENS):
        even, odd = chunk[..., 0::2], chunk[..., 1::2]
        even_cos, even_sin = even * cos, even * sin
        torch.addcmul(even_cos, odd, sin, value=-1, out=even)
        torch.addcmul(even_sin, odd, cos, out=odd)
    return x


def _rotate_complex_(x: Tensor, table: RotaryTable) -> Tensor:
    for chunk, cos, sin in _pieces(x, table, CPU_TOKENS):
        chunk.copy_(_rotate_complex(chunk, RotaryTable(cos, sin)))
    return x


def _some_tokens(x: Tensor, table: RotaryTable) -> tuple[Tensor, RotaryTable]:
    """The first tokens, as a copy: the kernels overwrite what they are timed on."""
    return x[:, :ROTATION_TOKENS].clone(), RotaryTable(table.cos[:ROTATION_TOKENS], table.sin[:ROTATION_TOKENS])


_ROTATE = Operation("rotate", {"complex": _rotate_complex_, "real": _rotate_real_}, _some_tokens)


def _pieces(x: Tensor, table: RotaryTable, tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return zip(x.split(tokens, 1), table.cos.split(tokens), table.sin.split(tokens), strict=True)


def _rotate_complex(x: Tensor, table: RotaryTable) -> Tensor:
    """`rotate` as a product of complex numbers. On a CPU it is faster, because it reads each pair at once, where
    `rotate` reads even and odd channels with a stride. Compilers and some devices lack complex numbers.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(table.cos, table.sin)).flatten(-2).to(x.dtype)
