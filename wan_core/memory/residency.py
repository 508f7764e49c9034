"""Where a whole module's weights are while it works."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """`module` with its weights on `device` inside the block, and back where they rest after it.

    Weights are copied in and dropped afterwards, never copied back: inference does not change them.
    """
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.device != device]
    resting = [t.data for t in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, non_blocking=True)
        yield module
    finally:
        for tensor, data in zip(tensors, resting, strict=True):
            tensor.data = data
