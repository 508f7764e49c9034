"""From patches to the tensors of a LoRA file in the names of a program, and from several LoRAs to one."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from .naming import Dialect, dialect_of
from .patches import Decomposed, Difference, Hadamard, Kronecker, LowRank, Patch, Replacement

Named = Sequence[tuple[str, Patch]]
"""Patches with the names of the parameters they change."""

OVERSAMPLING, POWER_ITERATIONS = 16, 4
"""Parameters of the randomised SVD of large matrices (Halko et al. 2011); more of either is closer to the exact one."""


@dataclass(frozen=True)
class Format:
    """How a program names the tensors of a LoRA, in its own `dialect`.

    Attributes:
        alpha: it expects an alpha tensor beside every pair of factors; without one the scale is multiplied into the up
            factor, which every reader understands.
        whole: it also reads differences, and other kinds than LoRA.
        diffusers: its modules have diffusers' paths.
    """

    dialect: Dialect
    down: str = "lora_A.weight"
    up: str = "lora_B.weight"
    alpha: bool = False
    whole: bool = False
    diffusers: bool = False


FORMATS = {
    "comfyui": Format(dialect_of("diffusion_model."), whole=True),
    "diffsynth": Format(dialect_of(""), "lora_A.default.weight", "lora_B.default.weight"),
    "kohya": Format(dialect_of("lora_unet_"), "lora_down.weight", "lora_up.weight", alpha=True, whole=True),
    "diffusers": Format(dialect_of("transformer."), diffusers=True),
    "peft": Format(dialect_of("base_model.model.")),
}
"""The names that can be written; `comfyui` is read by every program."""

WHOLE_KEYS = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}


def encode(
    patches: Named, format_name: str, dtype: torch.dtype, diffusers_path: Callable[[str], str] = lambda path: path
) -> dict[str, Tensor]:
    """The tensors of a file in the names of `format_name`.

    Args:
        dtype: of every tensor but alpha.
        diffusers_path: from a path of this model to diffusers'.

    Raises:
        ValueError: the format is unknown, or cannot hold one of the patches.
    """
    if format_name not in FORMATS:
        raise ValueError(f"LoRA format must be one of {', '.join(FORMATS)}; got {format_name!r}.")
    form = FORMATS[format_name]
    tensors: dict[str, Tensor] = {}
    for name, patch in patches:
        if not form.whole and not (isinstance(patch, LowRank) and patch.mid is None):
            raise ValueError(
                f"The {format_name} format holds plain LoRA factors only, but {name} is changed by a {patch.label}. "
                "Write it as comfyui or kohya, or give a rank to approximate LoHa and LoKr."
            )
        path, _, leaf = name.rpartition(".")
        for ending, tensor in _parts(patch, leaf, form):
            if leaf not in WHOLE_KEYS:
                path = name
            spelled = diffusers_path(path) if form.diffusers else path
            spelled = spelled.replace(".", "_") if form.dialect.joined else spelled
            key = f"{form.dialect.prefix}{spelled}.{ending}"
            tensors[key] = tensor if ending == "alpha" else tensor.to(dtype).contiguous()
    return tensors


def _parts(patch: Patch, leaf: str, form: Format) -> Iterable[tuple[str, Tensor]]:
    """The endings of a patch's keys with their tensors."""
    match patch:
        case Decomposed():
            yield from _parts(patch.inner, leaf, form)
            # With two axes (out, 1), as ComfyUI and LyCORIS store it.
            yield "dora_scale", patch.magnitude if patch.magnitude.ndim > 1 else patch.magnitude[:, None]
        case LowRank():
            up = patch.up if form.alpha else patch.up.float() * patch.scale
            yield from ((form.down, patch.down), (form.up, up))
            if patch.mid is not None:
                yield "lora_mid.weight", patch.mid
            if form.alpha:
                yield "alpha", torch.tensor(patch.scale * patch.rank)
        case Hadamard():
            yield from ((f"hada_{name}", tensor) for name, tensor in patch.tensors().items())
            yield "alpha", torch.tensor(patch.scale * patch.rank)
        case Kronecker():
            # Scaled here: LyCORIS ignores the alpha of a LoKr whose factors are both stored whole.
            yield from (("lokr_w1", patch.w1.float() * patch.scale), ("lokr_w2", patch.w2))
        case Difference():
            yield WHOLE_KEYS.get(leaf, "diff"), patch.delta()
        case _:
            raise ValueError(f"A {patch.label} is no LoRA; extract one from the checkpoint and its base instead.")


@dataclass(frozen=True)
class Merged:
    """The patches of several LoRAs as one, and the share of the change that a lower rank leaves out (0 is exact)."""

    patches: Named
    error: float = 0.0


@torch.no_grad()
def merge(loras: Sequence[tuple[Named, float]], rank: int | None = None) -> Merged:
    """The patches that do what `loras` do together, each at its strength.

    Without `rank` factors are joined, which is exact and adds up the ranks; with it the sum is cut to that rank.

    Raises:
        ValueError: kinds that have no exact sum meet in one weight, or a DoRA is to be scaled or cut.
    """
    grouped: dict[str, list[tuple[Patch, float]]] = defaultdict(list)
    for patches, strength in loras:
        for name, patch in patches:
            grouped[name].append((patch, strength))
    merged: list[tuple[str, Patch]] = []
    lost = whole = 0.0
    for name, parts in grouped.items():
        differences = [patch.delta() * strength for patch, strength in parts if isinstance(patch, Difference)]
        factors = [part for part in parts if not isinstance(part[0], Difference)]
        if differences:
            merged.append((name, Difference(sum(differences[1:], differences[0]))))
        if factors:
            patch, missing = _joined(name, factors, rank)
            merged.append((name, patch))
            lost, whole = lost + missing**2, whole + (patch.norm() ** 2 + missing**2 if rank else 0.0)
    return Merged(merged, (lost / whole) ** 0.5 if whole else 0.0)


def _joined(name: str, parts: Sequence[tuple[Patch, float]], rank: int | None) -> tuple[Patch, float]:
    """The sum of `parts` as one patch, and the norm of what it leaves out."""
    if any(isinstance(patch, Replacement) for patch, _ in parts):
        raise ValueError(f"A checkpoint that replaces {name} cannot be merged; extract a LoRA from it first.")
    if len(parts) == 1 and rank is None:
        patch, strength = parts[0]
        if strength == 1:
            return patch, 0.0
        if isinstance(patch, (LowRank, Hadamard, Kronecker, Difference)):
            return replace(patch, scale=patch.scale * strength), 0.0
    if any(isinstance(patch, Decomposed) for patch, _ in parts):
        raise ValueError(
            f"{name} is changed by a DoRA, which depends on the weights of the model: it can be converted at strength "
            "1, but not merged, scaled or cut to a rank."
        )
    plain = [(patch, strength) for patch, strength in parts if isinstance(patch, LowRank) and patch.mid is None]
    if len(plain) < len(parts):
        if rank is None:
            kinds = " and ".join(sorted({patch.label for patch, _ in parts}))
            raise ValueError(f"{name} is changed by {kinds}, whose sum is no LoRA; give a rank to approximate it.")
        shape = parts[0][0].shape
        dense = reduce(torch.add, (patch.delta().reshape(shape) * strength for patch, strength in parts))
        return decompose(dense, rank)
    # up_1 @ down_1 + up_2 @ down_2 is the product of the factors side by side, so the ranks add up.
    down = torch.cat([patch.down.float() for patch, _ in plain])
    up = torch.cat([patch.up.float() * (patch.scale * strength) for patch, strength in plain], 1)
    joined = LowRank(down, up)
    return (joined, 0.0) if rank is None or joined.rank <= rank else _cut(joined, rank)


def _cut(patch: LowRank, rank: int) -> tuple[LowRank, float]:
    """The best patch of `rank`, from the factors alone; the norm of what it leaves out."""
    down, up = patch.factors()
    # After a QR of both factors the SVD is of a matrix of the rank instead of the weight's size.
    (left, outer), (right, inner) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, sizes, v = torch.linalg.svd(outer @ inner.T)
    # Half of each singular value in either factor, so that both are of one size when they are rounded to 16 bits.
    root = sizes[:rank].sqrt()
    cut_up, cut_down = left @ u[:, :rank] * root, (root[:, None] * v[:rank]) @ right.T
    kernel = patch.down.shape[2:]
    shaped = LowRank(cut_down.reshape(rank, -1, *kernel), cut_up.reshape(*cut_up.shape, *(1,) * len(kernel)))
    return shaped, torch.linalg.vector_norm(sizes[rank:]).item()


def decompose(change: Tensor, rank: int) -> tuple[LowRank, float]:
    """The LoRA of `rank` that comes nearest to `change` (out, in, ...); the norm of what it leaves out."""
    matrix = change.float().flatten(1)
    rank = min(rank, *matrix.shape)
    width = rank + OVERSAMPLING
    # A random projection is cheaper only where the rank is far below the size of the matrix.
    if 4 * width > min(matrix.shape):
        u, sizes, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        # `torch.manual_seed` would also seed every card, for all that runs in this process.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            u, sizes, v = torch.svd_lowrank(matrix, width, POWER_ITERATIONS)
        vh = v.T
    root = sizes[:rank].sqrt()
    kernel = change.shape[2:]
    up, down = u[:, :rank] * root, root[:, None] * vh[:rank]
    lost = torch.linalg.vector_norm(matrix - up @ down).item()
    return LowRank(down.reshape(rank, -1, *kernel), up.reshape(*up.shape, *(1,) * len(kernel))), lost


@torch.no_grad()
def extract(pairs: Iterable[tuple[str, Tensor, Tensor]], rank: int) -> Merged:
    """The LoRA of `rank` in every matrix that leads from a base to a tuned model; other parameters exactly.

    Args:
        pairs: name, base and tuned tensor of every parameter.

    Raises:
        ValueError: the two models are equal.
    """
    patches: list[tuple[str, Patch]] = []
    lost = whole = 0.0
    for name, base, tuned in pairs:
        change = tuned.float() - base.float()
        if not change.any():
            continue
        whole += change.square().sum().item()
        if name.endswith(".weight") and change.ndim > 1:
            patch, missing = decompose(change, rank)
            lost += missing**2
            patches.append((name, patch))
        else:
            patches.append((name, Difference(change)))
    if not patches:
        raise ValueError("The two checkpoints hold the same weights; there is nothing to extract.")
    return Merged(patches, (lost / whole) ** 0.5)
