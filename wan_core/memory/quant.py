"""Linear layers whose weights are stored as 8-bit floats, at half the bytes of bfloat16.

A scale per row (or per tensor, or none, as a file has it) brings the weights into the range of the format. Layers
compute in their compute dtype; where the hardware multiplies FP8 numbers they can be told to do that instead.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pieces import blocks_of

FP8 = torch.float8_e4m3fn
"""The format of weights that are quantised here: 4 bits of exponent, 3 of mantissa."""

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
FP8_MAX = torch.finfo(FP8).max

CHUNK = 1 << 18
"""Numbers of a weight that are quantised at once: enough to keep all cores busy, few enough to stay in their caches."""

MATMUL_DTYPE = torch.bfloat16
"""What an FP8 product with a scale per row comes out in; cuBLAS offers no other."""


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` (..., n) as FP8 numbers and the float32 scale that each row is to be multiplied with, (..., 1).

    The largest number of a row becomes the largest of the format; rows of zeros stay zeros. Arithmetic is in the dtype
    of `x`.
    """
    scale = _scale_for(x.abs().amax(-1, keepdim=True)).to(x.dtype)
    return (x / scale).to(FP8), scale.float()


def _scale_for(peak: Tensor) -> Tensor:
    return (peak.float() / FP8_MAX).clamp_(min=torch.finfo(torch.float32).tiny)


def weight_to_fp8(weight: Tensor, *, per_row: bool = True) -> tuple[Tensor, Tensor]:
    """A weight (out, in) of any dtype as FP8 numbers with a float32 scale per row, (out, 1), or for all, (1, 1).

    Computed in float32, a few rows at a time: no second copy of the weight arises.
    """
    rows = len(weight) if weight.is_meta else max(1, CHUNK // weight.shape[1])
    stored = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    quotient = torch.empty(rows, weight.shape[1], dtype=torch.float32, device=weight.device)
    ranges = [torch.aminmax(part, dim=1, keepdim=True) for part in weight.split(rows)]
    scale = _scale_for(torch.cat([torch.maximum(-low, high) for low, high in ranges]))
    if not per_row:
        scale = scale.amax().reshape(1, 1)
    scales = scale.expand(len(weight), 1)
    for target, part, factor in zip(stored.split(rows), weight.split(rows), scales.split(rows), strict=True):
        target.copy_(torch.div(part, factor, out=quotient[: len(part)]))
    return stored, scale


class FP8Linear(nn.Linear):
    """A linear layer with an FP8 weight (out, in), inference only: gradients reach its input, not its weight.

    Attributes:
        scale: float32 factor of the weight, (out, 1) or (1, 1); None where the stored numbers are the weights.
        compute_dtype: of inputs, bias and outputs.
        fp8_matmul: multiply in FP8 where no gradient is asked for, with a scale per row of the input.
    """

    scale: Tensor | None

    def __init__(
        self, weight: Tensor, scale: Tensor | None, bias: Tensor | None, compute_dtype: torch.dtype | None = None
    ) -> None:
        """Takes the tensors as they are; the compute dtype is that of `bias` when it is not given."""
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias is not None, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.register_buffer("scale", scale)
        self.compute_dtype = compute_dtype or (torch.bfloat16 if bias is None else bias.dtype)
        self.fp8_matmul = False

    @classmethod
    def of(cls, linear: nn.Linear) -> "FP8Linear":
        """A plain layer quantised with a scale per row, on the device where it is."""
        weight, scale = weight_to_fp8(linear.weight.detach())
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(weight, scale, bias, linear.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8_matmul and not (torch.is_grad_enabled() and x.requires_grad):
            return self._multiply_fp8(x)
        weight = self.weight.to(self.compute_dtype)
        return F.linear(x, weight if self.scale is None else weight.mul_(self.scale), self.bias)

    def dequantised(self) -> Tensor:
        """The weight that this layer stands for, in float32."""
        weight = self.weight.float()
        return weight if self.scale is None else weight.mul_(self.scale)

    def _multiply_fp8(self, x: Tensor) -> Tensor:
        rows, row_scale = to_fp8(x.reshape(-1, self.in_features))
        scale = x.new_ones(1, 1, dtype=torch.float32) if self.scale is None else self.scale
        column_scale = scale.expand(self.out_features, 1).contiguous().T
        out = torch._scaled_mm(
            rows, self.weight.T, scale_a=row_scale, scale_b=column_scale, bias=self.bias, out_dtype=MATMUL_DTYPE
        )
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={self.weight.dtype}, compute={self.compute_dtype}"


def big_linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside of the blocks of `module` by path, quantised or not.

    Nearly all weights of a transformer are in them. What is outside (embedders, heads, time paths) is small, read by
    every token and sensitive.
    """
    return {
        f"{path}.{name}": layer
        for path, block in blocks_of(module).items()
        for name, layer in block.named_modules()
        if name and isinstance(layer, nn.Linear)
    }


def quantise(module: nn.Module, should: Callable[[str, nn.Linear], bool] = lambda path, layer: True) -> nn.Module:
    """Replace the big linear layers that `should` names by FP8 ones, one after the other. Returns `module`.

    The projections at the ends of VACE blocks are among them: they are as large as those of attention, and what they
    give is added to the token stream like that of any other layer.
    """
    for path, layer in big_linears(module).items():
        if not isinstance(layer, FP8Linear) and should(path, layer):
            replace_layer(module, path, FP8Linear.of(layer))
    return module


def replace_layer(module: nn.Module, path: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the submodule of `module` at `path`."""
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, layer)


def use_fp8_matmul(module: nn.Module, device: torch.device) -> nn.Module:
    """Let the FP8 layers of `module` multiply in FP8 on `device`. Returns `module`.

    Raises:
        ValueError: it has none, they compute in another dtype than bfloat16, or `device` cannot do it.
    """
    require_fp8_matmul(device, MATMUL_DTYPE)
    layers = [layer for layer in module.modules() if isinstance(layer, FP8Linear)]
    if not layers:
        raise ValueError("fp8_matmul needs FP8 weights, and this model has none; set weights to 'fp8'.")
    for layer in layers:
        require_fp8_matmul(device, layer.compute_dtype)
        layer.fp8_matmul = True
    return module


def require_fp8_matmul(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError when FP8 products with results in `dtype` cannot be computed on `device`."""
    if dtype != MATMUL_DTYPE:
        raise ValueError(f"fp8_matmul computes in {MATMUL_DTYPE}, not in {dtype}; set dtype to bf16 or turn it off.")
    if not supports_fp8_matmul(device):
        raise ValueError(
            f"fp8_matmul does not work on {device} with PyTorch {torch.__version__}: it needs an NVIDIA card of the "
            "Ada, Hopper or Blackwell generation, or an AMD card with FP8. Turn it off; FP8 weights work without it."
        )


@cache
def supports_fp8_matmul(device: torch.device) -> bool:
    """Whether `device` multiplies FP8 matrices with a scale per row; found out by trying once."""
    try:
        left, right = (torch.eye(32, device=device).to(FP8) for _ in range(2))
        scale = torch.ones(32, 1, device=device)
        bias = torch.zeros(32, device=device, dtype=MATMUL_DTYPE)
        out = torch._scaled_mm(left, right.T, scale_a=scale, scale_b=scale.T, bias=bias, out_dtype=MATMUL_DTYPE)
        return torch.equal(out.float().cpu(), torch.eye(32))
    except (AttributeError, RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError):
        return False
