"""The chains of memory-bound steps in a block: one step after the other, or each chain as one compiled kernel.

Only they are compiled, not whole blocks: matrix products and attention gain nothing by it, and what hangs on a block's
layers (streamed weights, LoRA branches, FP8) stays out of the compiler's sight. All blocks share the same kernels."""

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

from .ops import gated_add_, layer_norm, may_overwrite, modulate_, rms_norm_
from .rope import RotaryTable, rotate_, rotated

log = logging.getLogger("wancore")

COMPILER = "inductor"
MAX_ERROR = 0.01
"""Largest relative error of a compiled chain in bfloat16: it rounds once where the steps round twice."""


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm of x (B, S, D) without weights, times `scale`, plus `shift`, both (B, 1, D) in float32; in `dtype`."""
    return modulate_(layer_norm(x, eps, dtype), shift, scale)


def norm_rotate_(x: Tensor, weight: Tensor, eps: float, table: RotaryTable, head_dim: int) -> Tensor:
    """RMS norm of x (B, S, D), then its heads turned by `table`: (B, S, heads, head_dim)."""
    return rotate_(rms_norm_(x, weight, eps).unflatten(2, (-1, head_dim)), table)


@dataclass(frozen=True)
class Chains:
    """How a block runs each of its chains; the arguments are those of the functions that are the defaults."""

    norm_modulate: Callable[..., Tensor] = norm_modulate
    norm_rotate: Callable[..., Tensor] = norm_rotate_
    gated_add: Callable[..., Tensor] = gated_add_


STEPS = Chains()


def _norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], None, None, eps), scale).to(dtype)


def _norm_rotate(x: Tensor, weight: Tensor, eps: float, table: RotaryTable, head_dim: int) -> Tensor:
    normed = F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).unflatten(2, (-1, head_dim))
    return rotated(normed, table).to(x.dtype)


def _gated_add(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    return x.copy_(torch.addcmul(x.float(), update.float(), gate))


@cache
def compiled(compiler: str = COMPILER) -> Chains:
    """Chains that `torch.compile` makes one kernel of, for each shape anew. What requires gradients is run in steps."""
    pure = Chains(_norm_modulate, _norm_rotate, _gated_add)

    def fused(name: str) -> Callable[..., Tensor]:
        kernel, steps = torch.compile(getattr(pure, name), backend=compiler, dynamic=False), getattr(STEPS, name)

        def run(x: Tensor, *others: object) -> Tensor:
            tensors = [x, *(other for other in others if isinstance(other, Tensor))]
            return (kernel if may_overwrite(*tensors) else steps)(x, *others)

        return run

    return Chains(*(fused(entry.name) for entry in fields(Chains)))


def load_chains(compile_them: bool, device: torch.device, dtype: torch.dtype) -> Chains:
    """The chains of a model that computes on `device`; compiled ones are tried out once.

    Raises:
        ValueError: this machine cannot compile for `device`, or what it compiles computes something else.
    """
    if not compile_them:
        return STEPS
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
def _error(chains: Chains, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of a chain against its steps, on random numbers."""
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
        got, expected = (getattr(way, name)(x.clone(), *others).float() for way in (chains, STEPS))
        errors.append((got - expected).norm() / expected.norm())
    return torch.stack(errors).max().item()
