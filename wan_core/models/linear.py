"""Linear layers by the fastest matrix product of the device.

PyTorch gives a float32 product on a CPU to MKL, which does not use all that AMD's processors can do; oneDNN, a part of
PyTorch as well, takes less than half the time there. In bfloat16 both ways lead to oneDNN, and its own layer spares a
pass for the bias.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .elementwise import may_overwrite


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` for x (..., in) and a weight (out, in), all of one dtype."""
    return _onednn(x, weight, bias) if _suits_onednn(x, weight, bias) else F.linear(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _suits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN's layer computes the same, and fast: it knows neither gradients, mixed dtypes nor autocast, and is
    slow with weights that are not contiguous."""
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        x.device.type == "cpu"
        and weight.is_contiguous()
        and all(tensor.dtype == x.dtype for tensor in given)
        and onednn_has(x.dtype)
        and may_overwrite(*given)
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def onednn_has(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this processor have oneDNN's linear layer in `dtype`; found out by trying once."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        eye = torch.eye(16, dtype=dtype, device="cpu")
        return torch.equal(_onednn(eye, 2 * eye, None), 2 * eye)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


class Linear(nn.Linear):
    """`torch.nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
