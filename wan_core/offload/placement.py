"""Which blocks of a module stay on the device and which pass through it, decided before the first copy."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..runtime import gigabytes
from .blocks import FlatLayout, blocks_of, tables_of, weights_of
from .quant import parameter_counts

SLOTS = 2
"""Places on the device for streamed blocks: one that computes, one that is filled meanwhile."""


@dataclass(frozen=True)
class WeightSizes:
    """Size of some weights."""

    bytes: int
    parameters: int


@dataclass(frozen=True)
class Inventory:
    """The weights of a module: `blocks` in the order in which a pass runs them, and those `outside` of them.

    Blocks that are `idle` in every pass, and tables, which are used where they are kept, are in neither.
    """

    outside: WeightSizes
    blocks: Mapping[str, WeightSizes]
    idle: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        module: nn.Module,
        dtypes: Mapping[str, torch.dtype],
        order: Sequence[str] | None = None,
        idle: Collection[str] = (),
    ) -> "Inventory":
        """The inventory of `module`, whose weights work in `dtypes` where these name one.

        Args:
            order: the blocks that can be streamed, as a pass runs them; all of them one after the other if None.
            idle: blocks that no pass will run.
        """
        paths = blocks_of(module) if order is None else order
        weights, counts = weights_of(module), parameter_counts(module)
        layouts = {path: FlatLayout.of(path, weights, dtypes) for path in paths if path not in idle}
        apart = tuple(f"{path}." for path in (*layouts, *idle))
        tables = tables_of(module)
        # What is trained counts as outside wherever it is: it is never streamed.
        outside = {
            name: weight
            for name, weight in weights.items()
            if weight.requires_grad or not (name.startswith(apart) or name in tables)
        }
        size = sum(weight.numel() * dtypes.get(name, weight.dtype).itemsize for name, weight in outside.items())
        return cls(
            WeightSizes(size, sum(counts[name] for name in outside)),
            {
                path: WeightSizes(layout.bytes, sum(counts[entry.name] for entry in layout.entries))
                for path, layout in layouts.items()
            },
            frozenset(idle),
        )

    @property
    def bytes(self) -> int:
        return self.outside.bytes + sum(block.bytes for block in self.blocks.values())


@dataclass(frozen=True)
class Placement:
    """Where the blocks of a module are while it works.

    Attributes:
        inventory: what is placed.
        streamed: the blocks that are copied to the device each time their turn comes, in the order of a pass.
    """

    inventory: Inventory
    streamed: tuple[str, ...] = ()

    @property
    def resident(self) -> tuple[str, ...]:
        """The blocks that are on the device for the whole run."""
        return tuple(name for name in self.inventory.blocks if name not in set(self.streamed))

    @property
    def resident_bytes(self) -> int:
        """Everything that stays on the device, what lies outside of blocks included."""
        return self.inventory.outside.bytes + sum(self.inventory.blocks[name].bytes for name in self.resident)

    @property
    def slot_bytes(self) -> int:
        """Both slots together."""
        return SLOTS * max((self.inventory.blocks[name].bytes for name in self.streamed), default=0)

    @property
    def device_bytes(self) -> int:
        """All that the weights take on the device."""
        return self.resident_bytes + self.slot_bytes

    @property
    def streamed_bytes(self) -> int:
        """What is copied to the device in each pass through the blocks."""
        return sum(self.inventory.blocks[name].bytes for name in self.streamed)

    def summary(self) -> str:
        """In words: "12 of 40 blocks stay on the device (9.1 GB), 28 are streamed (19.2 GB per pass)"."""
        total, streamed = len(self.inventory.blocks), len(self.streamed)
        if not streamed:
            return f"all weights stay on the device ({gigabytes(self.device_bytes)})"
        return (
            f"{total - streamed} of {total} blocks stay on the device ({gigabytes(self.device_bytes)} with what is "
            f"under way), {streamed} are streamed ({gigabytes(self.streamed_bytes)} per pass)"
        )


def place(inventory: Inventory, budget: float | None = None, parameters: int | None = None) -> Placement:
    """The placement with the fewest streamed blocks whose weights take at most `budget` bytes on the device, and which
    keeps at most `parameters` parameters there.

    When even full streaming takes more, everything is streamed: that is the least there is.
    """
    names = list(inventory.blocks)

    def fits(placement: Placement) -> bool:
        kept = inventory.outside.parameters + sum(inventory.blocks[name].parameters for name in placement.resident)
        within = parameters is None or kept <= parameters or not placement.resident
        return within and (budget is None or placement.device_bytes <= budget)

    placement = Placement(inventory)
    for count in range(len(names) + 1):
        # Evenly spaced, so that each copy has as many resident blocks as possible to run beside.
        spaced = (math.floor((index + 0.5) * len(names) / count) for index in range(count))
        placement = Placement(inventory, tuple(names[index] for index in spaced))
        if fits(placement):
            break
    return placement
