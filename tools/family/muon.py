"""The optimizer of the bundled models: Muon for matrices and convolutions, AdamW for everything else."""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

NEWTON = (3.4445, -4.775, 2.0315)
"""Coefficients of the iteration that makes the singular values of a matrix about 1 (Jordan et al. 2024, Muon)."""


class Muon(torch.optim.Optimizer):
    """Steps of equal size in every direction of a weight, which learn several times as fast as Adam's here.

    A convolution counts as a matrix of its output channels. `torch.optim.Muon` takes matrices only.
    """

    def __init__(self, weights: Iterable[Tensor], lr: float, momentum: float = 0.9) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is needed
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            changes = []
            for index, weight in enumerate(weights):
                memory = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                memory.lerp_(weight.grad, 1 - group["momentum"])
                if index % world() == rank():
                    change = orthogonal(weight.grad.lerp(memory, group["momentum"]).flatten(1))
                    # An update as large as Adam's, whatever the shape (Liu et al. 2025, Moonlight).
                    changes.append(change.mul_(0.2 * max(change.shape) ** 0.5).reshape(weight.shape))
                else:
                    changes.append(torch.zeros_like(weight))
            add_up(changes)
            torch._foreach_add_(weights, changes, alpha=-group["lr"])


def rank() -> int:
    """Of this process among those that train together."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes."""
    if world() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """The matrix (n, m) with all its singular values between about 0.7 and 1.2."""
    a, b, c = NEWTON
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Both:
    """Two optimizers of one module under one learning rate, and an average of its weights over the last steps."""

    def __init__(self, module: nn.Module, lr: float, by_adam: Iterable[str] = ()) -> None:
        """`by_adam` are prefixes of the names of weights that are no matrices to Muon: embeddings and heads."""
        named = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
        prefixes = tuple(by_adam)
        matrices = {n: w for n, w in named.items() if w.ndim in (2, 4, 5) and not n.startswith(prefixes or ("\0",))}
        others = [weight for name, weight in named.items() if name not in matrices]
        self.lr = lr
        self.weights = list(named.values())
        self.average = {name: weight.detach().clone() for name, weight in named.items()}
        self._parts = [Muon(matrices.values(), lr), torch.optim.AdamW(others, lr, betas=(0.9, 0.97), weight_decay=0.0)]
        self._steps = 0

    def step(self, loss: Tensor, share: float) -> None:
        """One step down `loss`; `share` of the run, 0 to 1, sets the learning rate: a short rise, then a cosine."""
        self._steps += 1
        rise = min(1.0, self._steps / 50)
        factor = rise * (0.02 + 0.98 * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * min(share, 1.0))))))
        for part in self._parts:
            part.zero_grad()
            for group in part.param_groups:
                group["lr"] = self.lr * factor
        (loss / world()).backward()  # type: ignore[no-untyped-call]
        add_up([weight.grad for weight in self.weights if weight.grad is not None])
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for part in self._parts:
            part.step()
        keep = min(0.995, self._steps / (self._steps + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), self.weights, 1 - keep)

    def averaged(self, module: nn.Module) -> Mapping[str, Tensor]:
        """The state dict of `module` with the averaged weights."""
        return {**module.state_dict(), **self.average}
