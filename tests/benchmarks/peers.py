"""What contestants of a measurement share: the job that each is given, and how its weights reach a module.

A contestant is a module `peers_<name>` with a table `KINDS`: from what is to be done to a function that builds it for a
`Job`. The result does the work once per call and returns what came out, so that all of them can be compared.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

Work = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Job:
    """What is to be done, in words that every contestant understands.

    Attributes:
        kind: a key of `KINDS`.
        config: the model's sizes, by our names; of a whole run one such table per model, and its call.
        dtype: the compute dtype's name.
        weights: file with the weights in float32, under the published names.
        inputs: file with the tensors that enter.
    """

    kind: str
    config: dict[str, Any]
    dtype: str
    weights: str
    inputs: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def read_weights(self, prefix: str = "") -> dict[str, Tensor]:
        """The weights whose names start with `prefix`, without it; tensors of their own, not views of the file."""
        found = {name: tensor for name, tensor in _read(self.weights) if name.startswith(prefix)}
        return {name.removeprefix(prefix): tensor.clone() for name, tensor in found.items()}

    def read_inputs(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in _read(self.inputs)}


def _read(path: str) -> Iterable[tuple[str, Tensor]]:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


def filled(module: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype, float32: Iterable[str] = ()) -> nn.Module:
    """`module` with `weights` in `dtype`, those with a word of `float32` in their name in float32; for inference."""
    kept = tuple(float32)
    cast = {name: w if any(word in name for word in kept) else w.to(dtype) for name, w in weights.items()}
    missing, unexpected = module.load_state_dict(cast, strict=False, assign=True)
    if unexpected or missing:
        raise ValueError(
            f"Weights do not fit {type(module).__name__}: {missing[:3]} missing, {unexpected[:3]} unknown."
        )
    return module.requires_grad_(False).eval()


def training_step(module: nn.Module, forward: Callable[[], Tensor], target: Tensor, probes: dict[str, str]) -> Work:
    """Forward and backward through all weights; `probes` names, as the module does, the gradients to compare."""
    module.requires_grad_(True).train()

    def work() -> dict[str, Tensor]:
        module.zero_grad(set_to_none=True)
        loss = torch.nn.functional.mse_loss(forward().float(), target)
        loss.backward()
        weights = dict(module.named_parameters())
        gradients = {name: weights[theirs].grad.float() for name, theirs in probes.items()}
        return {"loss": loss.detach()[None], **gradients}

    return work
