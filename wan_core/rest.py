"""How a model's weights are held between uses."""

from dataclasses import dataclass

import torch
from torch import nn

from .checkpoints.detect import Component
from .checkpoints.load import build
from .memory.formats import FP8_DTYPES, WEIGHTS, Weights
from .memory.residency import Residency
from .settings import check_choice

DISK = "disk"


@dataclass(frozen=True, kw_only=True)
class Rest:
    """Where and how weights rest.

    Attributes:
        device: where they lie.
        mapped: leave the weights of blocks in the model's file and read a block when its turn comes.
        dtype: of the weights of blocks while they rest; None is the one they work in.
        weights: `auto` holds the big linear layers as the file has them, `fp8` as FP8, `plain` in the compute dtype
            (`checkpoints.load.load_into`).
    """

    device: torch.device = torch.device("cpu")
    mapped: bool = False
    dtype: torch.dtype | None = None
    weights: Weights = "auto"

    def __post_init__(self) -> None:
        check_choice("weights", self.weights, WEIGHTS)

    @classmethod
    def on(
        cls, device: "torch.device | str | Rest", *, dtype: torch.dtype | None = None, weights: Weights = "auto"
    ) -> "Rest":
        """Weights that rest on `device`, which may be "disk", in `dtype`; an FP8 dtype makes big layers scaled FP8.

        Raises:
            ValueError: `dtype` is no floating-point type, or weights that stay in their file cannot have it.
        """
        if isinstance(device, Rest):
            return device
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"Weights can rest in floating-point dtypes only; got {dtype}.")
        if dtype in FP8_DTYPES:
            dtype, weights = None, "fp8"
        if str(device) != DISK:
            return cls(device=torch.device(device), dtype=dtype, weights=weights)
        if dtype is not None:
            raise ValueError(f"Weights on disk have the dtype of their file; leave out offload_dtype {dtype}.")
        return cls(mapped=True, weights=weights)

    def load(self, component: Component, dtype: torch.dtype) -> nn.Module:
        """The module of `component`, whose weights rest this way and work in `dtype`.

        Raises:
            ValueError: its tensors do not fit it, or cannot rest this way.
        """
        module = build(component, dtype=dtype, device=self.device, weights=self.weights, mapped=self.mapped)
        if self.dtype not in (None, dtype):
            Residency.of(module).rest_as(self.dtype, dtype)
        return module
