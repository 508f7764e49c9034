"""Linear layers whose weights stay in the format that they are stored in, at half the bytes of bfloat16 or fewer.

A scale brings the numbers into the range of the weights (`formats`). Layers compute in their compute dtype, or multiply
FP8 numbers where that is switched on and the hardware can.
"""

from collections.abc import Callable
from functools import cache
from math import prod
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import formats
from .blocks import blocks_of, weights_of
from .formats import FP8_MADE, WeightFormat, format_of, fp8_scale

Module = TypeVar("Module", bound=nn.Module)

MATMUL_DTYPE = torch.bfloat16
"""The dtype of the result of an FP8 product with a scale per row; cuBLAS has no other."""


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` (..., n) as FP8 numbers and the float32 scale that each row is to be multiplied with, (..., 1).

    The largest number of a row becomes the largest of the format; rows of zeros stay zeros. Arithmetic is in the dtype
    of `x`.
    """
    scale = fp8_scale(x.abs().amax(-1, keepdim=True)).to(x.dtype)
    return (x / scale).to(FP8_MADE), scale.float()


class QuantisedLinear(nn.Linear):
    """A linear layer whose weight is held as its format stores it; inference only: gradients reach its input alone.

    Attributes:
        weight: the stored numbers, in the shape that the format gives them; `weight_shape` is that of the weight.
        scale: float32 factor of the weight, see `WeightFormat.scale_shape`; None where there is none.
        format: how weight and scale make the weight.
        compute_dtype: of inputs, bias and outputs.
        fp8_matmul: multiply in FP8 where no gradient is asked for, with a scale per row of the input.
    """

    scale: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        compute_dtype: torch.dtype | None = None,
        form: WeightFormat | None = None,
    ) -> None:
        """Keeps the tensors themselves. Without `compute_dtype` it is that of `bias`, without `form` the format of the
        dtype of `weight`.
        """
        found = form or format_of(weight.dtype)
        if found is None:
            raise ValueError(f"Weights are not held as {weight.dtype}.")
        self.format = found
        out_features, in_features = self.format.weight_shape(tuple(weight.shape))
        # On the meta device, so that the weight which nn.Linear draws takes neither time nor memory.
        super().__init__(in_features, out_features, bias is not None, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.register_buffer("scale", scale)
        self.compute_dtype = compute_dtype or (torch.bfloat16 if bias is None else bias.dtype)
        self.fp8_matmul = False

    @classmethod
    def of(cls, linear: nn.Linear) -> "QuantisedLinear":
        """A layer in FP8 with a scale per row, on the device where it is."""
        weight, scale = formats.FP8.quantise(weight_of(linear).detach())
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(weight, scale, bias, getattr(linear, "compute_dtype", linear.weight.dtype))

    def set_weight(self, weight: Tensor) -> None:
        """Hold `weight` from now on, as FP8 with a scale per row."""
        stored, self.scale = formats.FP8.quantise(weight)
        self.weight, self.format = nn.Parameter(stored, requires_grad=False), formats.FP8

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def words(self) -> str:
        """The format in words."""
        return self.format.describe(None if self.scale is None else tuple(self.scale.shape), tuple(self.weight.shape))

    @property
    def multiplies_fp8(self) -> bool:
        """Whether the format is one of FP8 products: a scale per row or for all."""
        return self.format == formats.FP8 and (self.scale is None or self.scale.shape[1] == 1)

    def forward(self, x: Tensor) -> Tensor:
        # FP8 products have no backward pass.
        if self.fp8_matmul and not (torch.is_grad_enabled() and x.requires_grad):
            return self._multiply_fp8(x)
        return F.linear(x, self.format.dequantise(self.weight, self.scale, self.compute_dtype), self.bias)

    def dequantised(self) -> Tensor:
        """The weight that this layer stands for, in float32."""
        return self.format.dequantise(self.weight, self.scale)

    def rows(self, start: int, end: int) -> Tensor:
        """The rows from `start` to `end` of that weight."""
        return self.format.rows(self.weight, self.scale, start, end)

    def some_rows(self, count: int) -> Tensor:
        """At least `count` evenly spaced rows of that weight, or all."""
        step = max(1, self.out_features // count)
        return torch.cat([self.rows(index, index + 1) for index in range(0, self.out_features, step)])

    def _multiply_fp8(self, x: Tensor) -> Tensor:
        rows, row_scale = to_fp8(x.reshape(-1, self.in_features))
        scale = x.new_ones(1, 1, dtype=torch.float32) if self.scale is None else self.scale
        # `_scaled_mm` takes scales per row only together with scales per column, so one for all is repeated.
        column_scale = scale.expand(self.out_features, 1).contiguous().T
        out = torch._scaled_mm(
            rows, self.weight.T, scale_a=row_scale, scale_b=column_scale, bias=self.bias, out_dtype=MATMUL_DTYPE
        )
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        product = ", product=FP8" if self.fp8_matmul else ""
        return f"{super().extra_repr()}, weight={self.words}, compute={self.compute_dtype}{product}"


def weight_of(layer: nn.Module) -> Tensor:
    """The weight that `layer` computes with: in float32 where it is quantised, else its parameter."""
    return layer.dequantised() if isinstance(layer, QuantisedLinear) else layer.get_parameter("weight")


def quantised_layers(module: nn.Module) -> dict[str, QuantisedLinear]:
    """The quantised layers of `module` by path."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, QuantisedLinear)}


def parameter_counts(module: nn.Module) -> dict[str, int]:
    """How many numbers each parameter and buffer of `module` stands for, whatever bytes they take."""
    counts = {name: tensor.numel() for name, tensor in weights_of(module).items()}
    return counts | {f"{path}.weight": prod(layer.weight_shape) for path, layer in quantised_layers(module).items()}


def weight_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter and buffer that a file of `module` holds; of quantised layers that of the weight
    itself, without the scale beside it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict(keep_vars=True).items()}
    for path, layer in quantised_layers(module).items():
        shapes[f"{path}.weight"] = layer.weight_shape
        shapes.pop(f"{path}.scale", None)
    return shapes


def big_linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside of the blocks of `module` by path, quantised or not.

    Nearly all weights of a transformer are in them. Those outside (embedders, heads, time paths) are few, and every
    token depends on their precision.
    """
    return {
        f"{path}.{name}": layer
        for path, block in blocks_of(module).items()
        for name, layer in block.named_modules()
        if name and isinstance(layer, nn.Linear)
    }


def quantise(module: Module, should: Callable[[str, nn.Linear], bool] = lambda path, layer: True) -> Module:
    """Replace the big plain layers that `should` names by FP8 ones, one after the other. Returns `module`.

    The projections at the ends of VACE blocks are among them: they are as large as those of attention, and their output
    is added to the tokens like that of any other layer.
    """
    for path, layer in big_linears(module).items():
        if not isinstance(layer, QuantisedLinear) and should(path, layer):
            replace_layer(module, path, QuantisedLinear.of(layer))
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
    quantised = list(quantised_layers(module).values())
    layers = [layer for layer in quantised if layer.multiplies_fp8]
    if not layers:
        held = f"this model has {quantised[0].words}" if quantised else "this model has none"
        way = "turn it off" if any(layer.format == formats.FP8 for layer in quantised) else "set weights to 'fp8'"
        raise ValueError(f"fp8_matmul needs FP8 weights with a scale per row or tensor, and {held}; {way}.")
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
    """Whether `device` multiplies FP8 matrices with a scale per row, by one trial product."""
    try:
        left, right = (torch.eye(32, device=device).to(FP8_MADE) for _ in range(2))
        scale = torch.ones(32, 1, device=device)
        bias = torch.zeros(32, device=device, dtype=MATMUL_DTYPE)
        out = torch._scaled_mm(left, right.T, scale_a=scale, scale_b=scale.T, bias=bias, out_dtype=MATMUL_DTYPE)
        return torch.equal(out.float().cpu(), torch.eye(32))
    except (AttributeError, RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError):
        return False
