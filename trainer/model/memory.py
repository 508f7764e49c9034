"""What is done to a finished model from outside: gradient checkpointing of its blocks, frozen weights on the device."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from wan_core.offload.placement import Inventory, Placement, place
from wan_core.offload.streaming import BlockStream
from wan_core.offload.weights import WeightProvider
from wan_core.runtime import GIB

from ..config import TrainConfig
from .trainable import Denoiser


@contextmanager
def activation_checkpointing(
    blocks: Sequence[nn.Module],
    *,
    offload: bool = False,
    preserve_rng: bool = False,
    stream: BlockStream | None = None,
) -> Iterator[None]:
    """Within the block of this statement, `blocks` keep only their inputs for the backward pass and run again in it.

    Args:
        offload: keep those inputs in host memory, pinned where the device is a CUDA one.
        preserve_rng: draw the same random numbers again, which only dropout needs.
        stream: brings the blocks' weights; a block that runs again needs them again.
    """
    for block in blocks:
        block.forward = _around(block, offload, preserve_rng, stream)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _around(block: nn.Module, offload: bool, preserve_rng: bool, stream: BlockStream | None) -> Callable[..., Any]:
    forward = block.forward

    def with_weights(*args: Any) -> Any:
        with nullcontext() if stream is None else stream.around(block):
            return forward(*args)

    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        saving = save_on_cpu(pin_memory=args[0].is_cuda) if offload else nullcontext()
        with saving:
            return checkpoint(with_weights, *args, use_reentrant=False, preserve_rng_state=preserve_rng)

    return run


log = logging.getLogger("wancore")


def placement_within(inventory: Inventory, config: TrainConfig) -> Placement:
    """Which frozen blocks stay on the device within `--vram_limit`; none do without one."""
    return place(inventory, (config.vram_limit or 0) * GIB)


@contextmanager
def frozen_weights_on(module: Denoiser, config: TrainConfig, device: torch.device) -> Iterator[BlockStream | None]:
    """All frozen weights of `module` able to work on `device` inside the block; blocks of the DiT beyond the limit are
    brought there by what this gives.
    """
    parts = dict(module.named_children())
    dit = WeightProvider.of(parts.pop("dit"))
    placement = placement_within(dit.inventory(module.dit.block_order()), config)
    log.info("Frozen weights: %s.", placement.summary())
    with ExitStack() as stack:
        for part in parts.values():
            stack.enter_context(WeightProvider.of(part).working(device))
        yield stack.enter_context(dit.working(device, placement))
