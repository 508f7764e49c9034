"""The kinds of change that a LoRA file makes to a parameter: as a dense difference, and beside a linear layer.

Every kind gives a difference that is added to the base: `W + strength * delta(W)`. All differences are taken from the
same base, so stacked LoRAs may come in any order. Arithmetic is float32.
"""

from dataclasses import dataclass, fields, replace
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_ROWS = 256
"""Rows from which a norm is estimated where the exact one would need the whole matrix."""


@dataclass(frozen=True, eq=False)
class Patch:
    """A change of one parameter.

    Attributes:
        label: the name of the kind in reports.
    """

    label: ClassVar[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter that this was made for; that of a convolution may be flattened to two axes."""
        raise NotImplementedError

    @property
    def rank(self) -> int | None:
        """The rank of the factors; None for a kind that has none."""
        return None

    def delta(self, base: Tensor | None = None) -> Tensor:
        """The difference at strength 1 in float32, on the device of the patch.

        `base` is the weight that it is added to; a replacement and a DoRA depend on it.
        """
        raise NotImplementedError

    def branch(self, x: Tensor) -> Tensor:
        """What the difference adds to the output of a linear layer for input `x` (..., in)."""
        return F.linear(x, self.delta().flatten(1).to(x.dtype))

    def norm(self) -> float:
        """The Frobenius norm of the difference at strength 1."""
        return torch.linalg.vector_norm(self.delta()).item()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def to(self, device: torch.device, dtype: torch.dtype) -> "Patch":
        """A copy with its factors on `device` in `dtype`."""
        return replace(self, **{name: tensor.to(device, dtype) for name, tensor in self.tensors().items()})


@dataclass(frozen=True, eq=False)
class LowRank(Patch):
    """LoRA: `scale * up @ down`; `down` (r, in, ...), `up` (out, r, ...), with `mid` (r, r, ...) a Tucker core."""

    label = "LoRA"
    down: Tensor
    up: Tensor
    scale: float = 1.0
    mid: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """`down` (r, in) and `up` (out, r) in float32 with the scale in `up`, their kernels flattened."""
        down, up = self.down.float(), self.up.float().flatten(1) * self.scale
        if self.mid is not None:
            down = torch.einsum("st...,ti->si...", self.mid.float(), down.flatten(1))
        return down.flatten(1), up

    def delta(self, base: Tensor | None = None) -> Tensor:
        down, up = self.factors()
        return (up @ down).reshape(self.shape)

    def branch(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.down.flatten(1))
        return F.linear(hidden, self.up.flatten(1)).mul_(self.scale)

    def norm(self) -> float:
        # ||up @ down||^2 = tr(up^T up down down^T), in matrices of the rank instead of the parameter's size.
        down, up = self.factors()
        if down.shape[0] > min(up.shape[0], down.shape[1]):
            return super().norm()
        return max((up.T @ up * (down @ down.T)).sum().item(), 0.0) ** 0.5


@dataclass(frozen=True, eq=False)
class Hadamard(Patch):
    """LoHa: `scale * (w1_a @ w1_b) * (w2_a @ w2_b)`, with `t1` and `t2` Tucker cores of a convolution."""

    label = "LoHa"
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        if self.t1 is not None:
            return (self.w1_a.shape[1], self.w1_b.shape[1], *self.t1.shape[2:])
        return (self.w1_a.shape[0], *self.w1_b.shape[1:])

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    def delta(self, base: Tensor | None = None) -> Tensor:
        first = _product(self.w1_a, self.w1_b, self.t1)
        return first * _product(self.w2_a, self.w2_b, self.t2) * self.scale

    def norm(self) -> float:
        """Estimated from evenly spaced rows: unlike a LoRA's, the exact norm needs the whole matrix."""
        if self.t1 is not None:
            return super().norm()
        stride = max(1, self.shape[0] // NORM_ROWS)
        sampled = replace(self, w1_a=self.w1_a[::stride], w2_a=self.w2_a[::stride])
        return torch.linalg.vector_norm(sampled.delta()).item() * (self.shape[0] / sampled.shape[0]) ** 0.5


@dataclass(frozen=True, eq=False)
class Kronecker(Patch):
    """LoKr: `scale * kron(w1, w2)`, with `w1` (a, c) and `w2` (b, d, ...) for a parameter (a * b, c * d, ...).

    Factors that a file stores as low-rank products are multiplied out here; `dim` is their rank.
    """

    label = "LoKr"
    w1: Tensor
    w2: Tensor
    scale: float = 1.0
    dim: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (
            self.w1.shape[0] * self.w2.shape[0],
            self.w1.shape[1] * self.w2.shape[1],
            *self.w2.shape[2:],
        )

    @property
    def rank(self) -> int | None:
        return self.dim

    def delta(self, base: Tensor | None = None) -> Tensor:
        w1 = self.w1.float().reshape(*self.w1.shape, *(1,) * (self.w2.ndim - 2))
        return torch.kron(w1, self.w2.float()) * self.scale

    def branch(self, x: Tensor) -> Tensor:
        # With x as the matrix X (c, d), kron(w1, w2) @ x is w1 @ X @ w2.T: the large matrix is never built.
        cells = x.unflatten(-1, (self.w1.shape[1], self.w2.shape[1]))
        return F.linear(F.linear(cells, self.w2).transpose(-1, -2), self.w1).transpose(-1, -2).flatten(-2) * self.scale

    def norm(self) -> float:
        return abs(self.scale) * (torch.linalg.vector_norm(self.w1.float()) * self.w2.float().norm()).item()


@dataclass(frozen=True, eq=False)
class Difference(Patch):
    """A whole tensor that is added: `.diff`, `.diff_b`, `.diff_m`."""

    label = "difference"
    value: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def delta(self, base: Tensor | None = None) -> Tensor:
        return self.value.float() * self.scale


@dataclass(frozen=True, eq=False)
class Replacement(Patch):
    """A whole tensor that takes the place of the base, as in a fine-tuned checkpoint."""

    label = "replacement"
    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def delta(self, base: Tensor | None = None) -> Tensor:
        assert base is not None, "a replacement depends on the weight that it replaces"
        return self.value.to(base.device, torch.float32) - base.float()

    def norm(self) -> float:
        return float("nan")


@dataclass(frozen=True, eq=False)
class Decomposed(Patch):
    """DoRA: the direction of `W + inner`, with `magnitude` as the length of its rows or columns.

    `magnitude` has one value per output (PEFT, and files trained "on the output axis"), or is (1, in, ...) with one per
    input, as older LyCORIS files have it. Strength interpolates from the base (0) to the trained weight (1).
    """

    label = "DoRA"
    inner: Patch
    magnitude: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def by_row(self) -> bool:
        return self.magnitude.ndim == 1 or self.magnitude.shape[0] == self.shape[0]

    def gain(self, base: Tensor) -> Tensor:
        """The trained length over that of `base + inner`, per row (out,) or per column (in,)."""
        moved = base.float().flatten(1) + self.inner.delta().reshape(base.shape).flatten(1).to(base.device)
        if not self.by_row:
            moved = moved.unflatten(1, (base.shape[1], -1)).transpose(0, 1).flatten(1)
        return self.magnitude.to(base.device, torch.float32).flatten() / torch.linalg.vector_norm(moved, dim=1)

    def delta(self, base: Tensor | None = None) -> Tensor:
        assert base is not None, "a DoRA depends on the weight that it changes"
        gain = self.gain(base)
        gain = (
            gain.reshape(-1, *(1,) * (base.ndim - 1)) if self.by_row else gain.reshape(1, -1, *(1,) * (base.ndim - 2))
        )
        moved = base.float() + self.inner.delta().reshape(base.shape).to(base.device)
        return moved * gain - base.float()

    def norm(self) -> float:
        return self.inner.norm()

    def to(self, device: torch.device, dtype: torch.dtype) -> "Decomposed":
        return Decomposed(self.inner.to(device, dtype), self.magnitude.to(device, dtype))


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """`a @ b` in float32; with a Tucker core (r, r, ...), `a` is (r, out) and `b` (r, in)."""
    a, b = a.float(), b.float()
    if core is not None:
        return torch.einsum("st...,so,ti->oi...", core.float(), a, b)
    return (a @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:])


def fits(patch: Patch, shape: tuple[int, ...]) -> bool:
    """Whether `patch` was made for a parameter of `shape`. Axes of length 1 do not count, and the kernel of a
    convolution may be flattened into its inputs.
    """
    made_for = patch.shape
    if [n for n in made_for if n != 1] == [n for n in shape if n != 1]:
        return True
    flat = prod(made_for[1:]) == prod(shape[1:]) and made_for[:1] == shape[:1]
    return flat and (len(made_for) == 2 or len(shape) == 2 or prod(made_for[2:]) == 1)
