"""Gradient checkpointing, put around the blocks of a finished model from outside."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from wan_core.memory.block_stream import BlockStream


@contextmanager
def checkpointed(
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
