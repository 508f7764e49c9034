"""What the counts of several models share: attention without its logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..memory.count import LiveBytes

META = torch.device("meta")


class _FusedAttention(TorchFunctionMode):
    """Attention as fused kernels run it: its result is all that it allocates.

    The meta device knows only the plain form, which holds the logits of all pairs.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, _, value = args
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(*given: Tensor) -> Iterator[LiveBytes]:
    """A counter of what is made on the meta device inside the block, beside the tensors that are `given`."""
    with torch.no_grad(), LiveBytes(META, given) as counter, _FusedAttention():
        yield counter
