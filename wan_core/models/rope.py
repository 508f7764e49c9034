"""Three-dimensional rotary position embedding as a real rotation of interleaved pairs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .elementwise import may_overwrite

THETA = 10000.0
ROTATION_TOKENS = 8192
"""Tokens rotated at a time, so that the float32 products stay small beside the sequence itself."""


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines (S, 1, head_dim / 2) in float32, one row per token."""

    cos: Tensor
    sin: Tensor


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """How much of the head the time, height and width axes rotate: 44, 42 and 42 of 128."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotary_table(
    grid: tuple[int, int, int], head_dim: int, device: torch.device, *, theta: float = THETA
) -> RotaryTable:
    """The rotation of every token of a (frames, rows, columns) grid, tokens ordered with columns fastest.

    Pair j of an axis of width D turns by `position * theta ** (-2j / D)`. Angles are computed in float64 on the CPU,
    one short vector per axis, and only then spread over the grid (Wan-Video/Wan2.1 `rope_params`).
    """
    angles = []
    for axis, (length, width) in enumerate(zip(grid, axis_widths(head_dim), strict=True)):
        frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
        angle = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * frequency
        shape = [1, 1, 1, width // 2]
        shape[axis] = length
        angles.append(angle.view(shape).expand(*grid, -1))
    angle = torch.cat(angles, -1).reshape(-1, 1, head_dim // 2)
    return RotaryTable(angle.cos().float().to(device), angle.sin().float().to(device))


def rotate_(x: Tensor, table: RotaryTable) -> Tensor:
    """`x` (B, S, heads, head_dim) turned by `table` in float32, stored as x's dtype; in place without gradients."""
    if not may_overwrite(x):
        return _rotated(x, table)
    for chunk, cos, sin in zip(
        *(t.split(ROTATION_TOKENS, dim) for t, dim in ((x, 1), (table.cos, 0), (table.sin, 0))), strict=True
    ):
        even, odd = chunk[..., 0::2], chunk[..., 1::2]
        even_cos, even_sin = even * cos, even * sin
        torch.addcmul(even_cos, odd, sin, value=-1, out=even)
        torch.addcmul(even_sin, odd, cos, out=odd)
    return x


def _rotated(x: Tensor, table: RotaryTable) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((even * table.cos - odd * table.sin, even * table.sin + odd * table.cos), -1)
    return turned.flatten(-2).to(x.dtype)
