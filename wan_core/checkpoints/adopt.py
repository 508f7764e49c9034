"""Models whose weights another program already holds in memory."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .detect import Component, check_against, detect, require_kind
from .dialects import Kind
from .header import Header, TensorInfo
from .load import combine, unfilled


class _Held:
    """Tensors in memory, read as those of files are."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    def read(self, name: str) -> Tensor:
        return self._weights[name]

    borrow = read


def describe_weights(weights: Mapping[str, Tensor], name: str, kind: Kind) -> Component:
    """What `weights` are, by the names and shapes of its tensors; messages call them `name`.

    Raises:
        CheckpointError: they are not a model of that kind.
    """
    place = Path(name)
    tensors = {key: TensorInfo(tuple(tensor.shape), tensor.dtype, place) for key, tensor in weights.items()}
    return require_kind(detect(Header(MappingProxyType(tensors), (place,), MappingProxyType({}))), kind)


def adopt(
    component: Component, weights: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """The module of `component` with a copy of `weights` in `dtype` on `device`, in evaluation mode, no gradients.

    Raises:
        CheckpointError: names or shapes do not fit.
    """
    module = unfilled(component)
    check_against(component, module)
    held = _Held(weights)
    copies = {name: combine(source, held).to(device, dtype, copy=True) for name, source in component.sources.items()}
    module.load_state_dict(copies, assign=True)
    return module.requires_grad_(False).eval()
