"""A LoRA matched with a model: which parameter each patch changes, and what the model does not have."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..offload.quant import weight_shapes
from .naming import Spellings
from .patches import Patch, fits
from .read import Lora, Skipped

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes by parameter name."""

NO_SUCH_PART = "the model has no such part"


@dataclass(frozen=True)
class Misfit:
    """A parameter whose shape in the model is not the one that the LoRA was made for."""

    name: str
    made_for: tuple[int, ...]
    found: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Bound:
    """Patches with the names of the parameters that they change; `skipped` and `misfits` have all others."""

    lora: Lora
    patches: tuple[tuple[str, Patch], ...]
    skipped: tuple[Skipped, ...] = ()
    misfits: tuple[Misfit, ...] = ()


def parameter_shapes(modules: Sequence[nn.Module]) -> dict[str, tuple[int, ...]]:
    """Shapes of all that a patch could change in `modules`, whose names must not collide."""
    return {name: shape for module in modules for name, shape in weight_shapes(module).items()}


def module_names(shapes: Shapes) -> list[str]:
    """The names that a LoRA can use: modules, and parameters that are neither weight nor bias."""
    names: dict[str, None] = {}
    for name in shapes:
        owner, _, leaf = name.rpartition(".")
        names[owner] = names[owner if leaf in ("weight", "bias") else name] = None
    return [name for name in names if name]


def bind(lora: Lora, shapes: Shapes, spellings: Spellings) -> Bound:
    """The patches of `lora` for parameters of these `shapes`."""
    patches: list[tuple[str, Patch]] = []
    skipped: list[Skipped] = []
    misfits: list[Misfit] = []
    for layer in lora.layers:
        target = spellings.find(layer.path, layer.joined)
        if target is None:
            skipped.append(Skipped(layer.path, NO_SUCH_PART))
            continue
        for leaf, patch in layer.patches:
            # `modulation` and the like are parameters themselves, not modules with a weight.
            name = target if target in shapes else f"{target}.{leaf}"
            if name not in shapes:
                skipped.append(Skipped(name, "the model has no such parameter"))
            elif not fits(patch, shapes[name]):
                misfits.append(Misfit(name, patch.shape, shapes[name]))
            else:
                patches.append((name, patch))
    return Bound(lora, tuple(patches), (*lora.skipped, *skipped), tuple(misfits))


@dataclass(frozen=True)
class BlockStrengths:
    """Factors on the strength by block.

    Attributes:
        ranges: (container, first, last, factor); the first range that holds a block counts.
        rest: the factor of every parameter that no range names.
    """

    ranges: tuple[tuple[str, int, int, float], ...] = ()
    rest: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "BlockStrengths":
        """From text such as "0-9, 20-29=0.5, vace_blocks.0-7, other=1"; empty text means everything at 1.

        Blocks and parameters that the text does not name get nothing.

        Raises:
            ValueError: a piece is neither a block, a range nor `other`.
        """
        if not text.strip():
            return cls()
        ranges, rest = [], 0.0
        for piece in filter(None, re.split(r"[,;\s]+(?![=-])", text.strip())):
            match = re.fullmatch(r"(?:(other)|(?:(\w+)\.)?(\d+)(?:-(\d+))?)(?:[=:](-?(?:\d+\.?\d*|\.\d+)))?", piece)
            first, last = (int(match[3]), int(match[4] or match[3])) if match and match[3] else (0, 0)
            if match is None or last < first:
                raise ValueError(
                    f"Blocks are given as '0-9, 20-29=0.5, other=1' (a range, its factor, everything outside of the "
                    f"blocks); {piece!r} cannot be read."
                )
            factor = float(match[5] or 1)
            if match[1]:
                rest = factor
            else:
                ranges.append((match[2] or "blocks", first, last, factor))
        return cls(tuple(ranges), rest)

    def factor(self, name: str) -> float:
        """The factor of the parameter `name`; 0 in a block outside of the ranges that its list of blocks has."""
        match = re.match(r"(\w+)\.(\d+)\.", name)
        for container, first, last, factor in self.ranges:
            if match and match[1] == container and first <= int(match[2]) <= last:
                return factor
        in_named_container = match and any(match[1] == container for container, *_ in self.ranges)
        return 0.0 if in_named_container else self.rest


EVERYWHERE = BlockStrengths()
"""Every parameter at factor 1."""
