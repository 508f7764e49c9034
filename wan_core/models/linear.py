"""Linear layers by the fastest matrix product of the device.

PyTorch gives a float32 product on a CPU to MKL, and oneDNN is a part of PyTorch as well. Which is faster depends on the
processor: oneDNN takes less than half the time on AMD's, MKL a tenth less on some of Intel's. In bfloat16 both ways
lead to oneDNN, and its own layer spares a pass for the bias.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .elementwise import may_overwrite
from .kernels import Operation, up_to_power_of_two

MOST_TIMED_PRODUCTS, LEAST_TIMED_ROWS = 2**31, 64
"""How many multiplications a product is timed with at most, if that leaves enough rows."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` for x (..., in) and a weight (out, in), all of one dtype."""
    if not _suits_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    rows = x.numel() // max(1, x.shape[-1])
    return _LINEAR(x, weight, bias, sizes=(up_to_power_of_two(rows), x.shape[-1], weight.shape[0]))


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _pytorch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _some_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    rows = max(LEAST_TIMED_ROWS, MOST_TIMED_PRODUCTS // weight.numel())
    return x.reshape(-1, x.shape[-1])[:rows], weight, bias


_LINEAR = Operation("linear", {"oneDNN": _onednn, "PyTorch": _pytorch}, _some_rows)


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
