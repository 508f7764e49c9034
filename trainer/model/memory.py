"""What is done to a finished model from outside: gradient checkpointing of its blocks, frozen weights on the device."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from wan_core.offload.streaming import BlockStream, Inventory, Placement, place
from wan_core.offload.weights import WeightProvider
from wan_core.runtime import GIB

from ..config import TrainConfig
from .trainable import Denoiser

Saving = Callable[[Tensor], AbstractContextManager[object]]


@contextmanager
def activation_checkpointing(
    blocks: Sequence[nn.Module],
    *,
    keeps_attention: bool = False,
    saving: Saving | None = None,
    preserve_rng: bool = False,
    stream: BlockStream | None = None,
) -> Iterator[None]:
    """Within the block of this statement, `blocks` keep only their inputs for the backward pass and run again in it.

    Args:
        keeps_attention: keep what self-attention gave, too: one more tensor as large as the tokens, for what is half
            of a block's work in long videos.
        saving: how inputs are kept elsewhere; `in_host_memory` does.
        preserve_rng: draw the same random numbers again, which only dropout needs.
        stream: brings the blocks' weights; a block that runs again needs them again.
    """
    for block in blocks:
        block.forward = _around(block, keeps_attention, saving, preserve_rng, stream)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def checkpointing_of(
    config: TrainConfig, blocks: Sequence[nn.Module], saving: Saving, stream: BlockStream | None = None
) -> AbstractContextManager[None]:
    """`activation_checkpointing` of `blocks` as `config` has it, which may be none; `saving` keeps inputs elsewhere."""
    if not config.use_gradient_checkpointing:
        return nullcontext()
    return activation_checkpointing(
        blocks,
        keeps_attention=config.gradient_checkpointing_keeps == "attention",
        saving=saving if config.use_gradient_checkpointing_offload else None,
        preserve_rng=config.lora_dropout > 0,
        stream=stream,
    )


def in_host_memory(tokens: Tensor) -> AbstractContextManager[object]:
    """Within the block of this statement what the backward pass needs is kept in host memory, pinned for CUDA."""
    return save_on_cpu(pin_memory=tokens.is_cuda)


def _around(
    block: nn.Module,
    keeps_attention: bool,
    saving: Saving | None,
    preserve_rng: bool,
    stream: BlockStream | None,
) -> Callable[..., Any]:
    forward = block.forward
    contexts = partial(create_selective_checkpoint_contexts, _keeps) if keeps_attention else noop_context_fn

    def with_weights(*args: Any) -> Any:
        with nullcontext() if stream is None else stream.around(block):
            return forward(*args)

    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        with nullcontext() if saving is None else saving(args[0]):
            return checkpoint(
                with_weights, *args, use_reentrant=False, preserve_rng_state=preserve_rng, context_fn=contexts
            )

    return run


ATTENTION = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(torch.ops.aten, name)
)
"""What PyTorch's attention may be run as."""


def _keeps(context: object, operation: object, *args: Any, **_: Any) -> CheckpointPolicy:
    """Keep what attention among the video's tokens gave; that to the text is cheap to compute again."""
    if operation in ATTENTION and args[0].shape[-2] == args[1].shape[-2]:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


log = logging.getLogger("wancore")


def placement_within(inventory: Inventory, config: TrainConfig) -> Placement:
    """Which frozen blocks stay on the device within `--vram_limit`; none do without one."""
    return place(inventory, (config.vram_limit or 0) * GIB)


class FrozenWeights:
    """The frozen weights of `module`, able to work on `device` inside a `with` statement: those of one transformer at a
    time, of which blocks beyond the limit are brought there by a stream.
    """

    def __init__(self, module: Denoiser, config: TrainConfig, device: torch.device) -> None:
        self._dits, self._device = module.experts, device
        self._beside = [part for part in module.children() if part not in module.experts]
        providers = [WeightProvider.of(dit) for dit in self._dits]
        self._placements = [
            placement_within(provider.inventory(dit.block_order()), config)
            for dit, provider in zip(self._dits, providers, strict=True)
        ]
        self._all, self._one = ExitStack(), ExitStack()
        self._there: int | None = None
        self._stream: BlockStream | None = None

    def bring(self, expert: int) -> BlockStream | None:
        """The transformer of that number, in place of the one that is there; what brings its blocks."""
        if self._there != expert:
            self.leave()
            working = WeightProvider.of(self._dits[expert]).working(self._device, self._placements[expert])
            self._stream = self._one.enter_context(working)
            self._there = expert
        return self._stream

    def leave(self) -> None:
        """Take the transformer that is there off the device, before another program part brings one."""
        self._there = self._stream = None
        self._one.close()

    def __enter__(self) -> "FrozenWeights":
        log.info("Frozen weights: %s.", self._placements[0].summary())
        for part in self._beside:
            self._all.enter_context(WeightProvider.of(part).working(self._device))
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()
        self._all.close()
