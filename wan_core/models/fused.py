"""The elementwise steps between a block's matrix products, which only move memory: each in PyTorch's own kernels, or
compiled into one.

Each step stands here twice. The plain form is its definition, and what `torch.compile` fuses; the form with an
underscore is what runs otherwise: it writes into the tensor that it is given and needs no float32 copy of the sequence.

Only these steps are compiled, not whole blocks: matrix products and attention gain nothing by it, and what hangs on a
block's layers (streamed weights, LoRA hooks, FP8) stays out of the compiler's sight. All blocks share the kernels."""

import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import RotaryTable, rotate, rotate_
from .ops import layer_norm, may_overwrite, rms_norm_

log = logging.getLogger("wancore")

COMPILER = "inductor"
MAX_ERROR = 0.01
"""Largest relative error of a compiled step in bfloat16: it rounds once, PyTorch's own kernels round twice."""


MOST_PIECES, PIECE_TOKENS = 16, 1024
"""The most runs of equal tokens that are worked on one after the other; where there are more, pieces of so many tokens
are, each with a copy of the rows that its tokens read.
"""

Piece = tuple[slice, slice | Tensor]
"""Consecutive tokens, and the row or rows of a table that they read."""


@dataclass(frozen=True)
class TokenRows:
    """Which row of a table (B, U, D) each of S tokens reads: `index` (S,), and the same in pieces."""

    index: Tensor
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, index: Tensor, device: torch.device) -> "TokenRows":
        """Those of `index` (S,), whose numbers are on the CPU, for tables on `device`."""
        rows, counts = torch.unique_consecutive(index, return_counts=True)
        ends = counts.cumsum(0).tolist()
        index = index.to(device)
        if len(ends) <= MOST_PIECES:
            runs = zip([0, *ends], ends, rows.tolist(), strict=False)
            return cls(index, tuple((slice(start, end), slice(row, row + 1)) for start, end, row in runs))
        starts = range(0, len(index), PIECE_TOKENS)
        places = (slice(start, start + PIECE_TOKENS) for start in starts)
        return cls(index, tuple((place, index[place]) for place in places))


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, index: Tensor | None = None
) -> Tensor:
    """LayerNorm of x (B, S, D) without weights, times `scale`, plus `shift`, both (B, U, D) in float32; in `dtype`.

    `index` (S,) is the row that each token reads; without it there is one row for all, U = 1. The caller folds the
    "1 +" of adaptive LayerNorm into `scale`, once per step instead of once per token.
    """
    if index is not None:
        shift, scale = shift[:, index], scale[:, index]
    return torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], None, None, eps), scale).to(dtype)


def norm_modulate_(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, rows: TokenRows | None = None
) -> Tensor:
    """`norm_modulate` in the memory of the norm. It leaves `x`, the residual stream, as it is."""
    normed = layer_norm(x, eps, dtype)
    if rows is not None:
        pieces = [(normed[:, place], shift[:, row], scale[:, row]) for place, row in rows.pieces]
        if not may_overwrite(normed, shift, scale):
            return torch.cat([torch.addcmul(low, piece, gain).to(dtype) for piece, low, gain in pieces], 1)
        for piece, low, gain in pieces:
            torch.addcmul(low, piece, gain, out=piece)
        return normed
    if may_overwrite(normed, shift, scale):
        return torch.addcmul(shift, normed, scale, out=normed)
    return torch.addcmul(shift, normed, scale).to(dtype)


def norm_rotate(x: Tensor, weight: Tensor, eps: float, table: RotaryTable, head_dim: int) -> Tensor:
    """RMS norm of x (B, S, D), then its heads turned by `table`: (B, S, heads, head_dim)."""
    normed = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).unflatten(2, (-1, head_dim))
    return rotate(normed, table).to(x.dtype)


def norm_rotate_(x: Tensor, weight: Tensor, eps: float, table: RotaryTable, head_dim: int) -> Tensor:
    """`norm_rotate` in the memory of `x`."""
    return rotate_(rms_norm_(x, weight, eps).unflatten(2, (-1, head_dim)), table)


def gated_add(x: Tensor, update: Tensor, gate: Tensor, index: Tensor | None = None) -> Tensor:
    """`x + update * gate` for x, update (B, S, D) and a float32 gate (B, U, D), in x's dtype; `index` as above."""
    gate = gate if index is None else gate[:, index]
    return torch.addcmul(x.float(), update.float(), gate).to(x.dtype)


def gated_add_(x: Tensor, update: Tensor, gate: Tensor, rows: TokenRows | None = None) -> Tensor:
    """`gated_add` in the memory of `x`."""
    if rows is not None:
        pieces = [(x[:, place], update[:, place], gate[:, row]) for place, row in rows.pieces]
        if not may_overwrite(x, update, gate):
            return torch.cat([torch.addcmul(*piece).to(x.dtype) for piece in pieces], 1)
        for piece in pieces:
            torch.addcmul(*piece, out=piece[0])
        return x
    if may_overwrite(x, update, gate):
        return torch.addcmul(x, update, gate, out=x)
    return torch.addcmul(x, update, gate).to(x.dtype)


@dataclass(frozen=True)
class FusedSteps:
    """How a block runs each of these steps; a field takes the arguments of its default, `TokenRows` included."""

    norm_modulate: Callable[..., Tensor] = norm_modulate_
    norm_rotate: Callable[..., Tensor] = norm_rotate_
    gated_add: Callable[..., Tensor] = gated_add_


EAGER = FusedSteps()
"""PyTorch's own kernels, one after the other."""


@cache
def compiled(compiler: str = COMPILER) -> FusedSteps:
    """Steps that `torch.compile` makes one kernel each, compiled for each new shape. What requires gradients runs as
    `EAGER`.
    """

    def gated_add_into(x: Tensor, update: Tensor, gate: Tensor, index: Tensor | None = None) -> Tensor:
        # Into the residual stream, as `gated_add_`: a second stream would be the largest tensor of the block.
        return x.copy_(gated_add(x, update, gate, index))

    plain = FusedSteps(norm_modulate, norm_rotate, gated_add_into)

    def fused(name: str) -> Callable[..., Tensor]:
        kernel, eager = torch.compile(getattr(plain, name), backend=compiler, dynamic=False), getattr(EAGER, name)

        def run(x: Tensor, *others: object) -> Tensor:
            tensors = [x, *(other for other in others if isinstance(other, Tensor))]
            if not may_overwrite(*tensors):
                return eager(x, *others)
            # The kernel reads each token's row where it is, so that no table of all tokens is ever in memory.
            return kernel(x, *(other.index if isinstance(other, TokenRows) else other for other in others))

        return run

    return FusedSteps(*(fused(entry.name) for entry in fields(FusedSteps)))


def load_fused(compile_them: bool, device: torch.device, dtype: torch.dtype) -> FusedSteps:
    """The steps of a model that computes on `device`; compiled ones are tried once.

    Raises:
        ValueError: this machine cannot compile for `device`, or what it compiles computes something else.
    """
    if not compile_them:
        return EAGER
    try:
        error = _error(compiled(), device, dtype)
    except Exception as problem:
        raise ValueError(
            f"torch.compile does not work on {device} here: {_failure(problem)}, or turn torch_compile off."
        ) from problem
    if not error < MAX_ERROR:
        raise ValueError(
            f"torch.compile gives wrong results on {device}: relative error {error:.3g}, at most {MAX_ERROR} expected. "
            "Turn torch_compile off."
        )
    log.info("Elementwise steps are compiled (relative error %.2g); each new size takes some seconds more.", error)
    return compiled()


def _failure(problem: Exception) -> str:
    """What was wrong when `problem` ended a compilation, and what to do about it."""
    # Up to 2.13 at least, torch writes these folders into the command of a C++ compiler without quotes.
    settings = {"TMPDIR": tempfile.gettempdir(), "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR")}
    places = {"Move the Python environment": str(Path(torch.__file__).parent)}
    places |= {f"Set {name}": place for name, place in settings.items() if place}
    for remedy, place in places.items():
        if " " in place and place in str(problem):
            return (
                f"the path '{place}' has a space, and torch hands it to the C++ compiler without quotes. {remedy} to a "
                "folder without spaces in its path"
            )
    cause = getattr(problem, "inner_exception", problem)
    lines = (str(getattr(cause, "output", "") or cause).strip() or type(cause).__name__).splitlines()
    reason = next((line for line in lines if "error: " in line), lines[0]).rstrip(".")
    return f"{reason}. It needs Triton on a card and a C++ compiler on a CPU. Install what is missing"


@torch.no_grad()
def _error(steps: FusedSteps, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of a step against its eager form, on random numbers."""
    generator = torch.Generator().manual_seed(0)
    x, update = (torch.randn(1, 24, 256, generator=generator).to(device, dtype) for _ in range(2))
    shift, scale = (torch.randn(1, 1, 256, generator=generator).to(device) for _ in range(2))
    table = RotaryTable(*torch.randn(2, 24, 1, 64, generator=generator).to(device))
    arguments: dict[str, tuple[object, ...]] = {
        "norm_modulate": (shift, scale, 1e-6, dtype),
        "norm_rotate": (scale[0, 0].to(dtype), 1e-6, table, 128),
        "gated_add": (update, scale),
    }
    errors = []
    for name, others in arguments.items():
        got, expected = (getattr(way, name)(x.clone(), *others).float() for way in (steps, EAGER))
        errors.append((got - expected).norm() / expected.norm())
    return torch.stack(errors).max().item()
