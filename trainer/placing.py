"""Frozen weights of a training run on the device, as far as they are to be there."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from wan_core.memory.block_stream import BlockStream
from wan_core.memory.device import GIB
from wan_core.memory.plan import Inventory, Placement, place
from wan_core.memory.residency import Residency

from .config import TrainConfig
from .trainable import Denoiser

log = logging.getLogger("wancore")


def placement_within(inventory: Inventory, config: TrainConfig) -> Placement:
    """Which frozen blocks stay on the device within `--vram_limit`; none do without one."""
    return place(inventory, (config.vram_limit or 0) * GIB)


@contextmanager
def frozen_at_work(module: Denoiser, config: TrainConfig, device: torch.device) -> Iterator[BlockStream | None]:
    """All frozen weights of `module` able to work on `device` inside the block; blocks of the DiT beyond the limit are
    brought there by what this gives.
    """
    parts = dict(module.named_children())
    dit = Residency.of(parts.pop("dit"))
    placement = placement_within(dit.inventory(module.dit.block_order()), config)
    log.info("Frozen weights: %s.", placement.summary())
    with ExitStack() as stack:
        for part in parts.values():
            stack.enter_context(Residency.of(part).working(device))
        yield stack.enter_context(dit.working(device, placement))
