"""The model, the optimizer and the processes of a run, as `accelerate` sets them up: one process, several, DeepSpeed or
FSDP."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, AutocastKwargs, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from wan_core.files import errors_from
from wan_core.offload.streaming import BlockStream
from wan_core.offload.weights import WeightProvider

from .. import optimizers
from ..config import TrainConfig
from ..model import sharding
from ..model.memory import frozen_weights_on
from ..model.trainable import Trainables
from .state import StateError, read_weights_and_optimizer, write_weights_and_optimizer

log = logging.getLogger("wancore")

PATIENCE = timedelta(hours=12)
"""How long processes wait for each other; encoding a large data set takes them different times."""


def start(config: TrainConfig) -> Accelerator:
    """The processes of this run.

    Raises:
        ValueError: they cannot do what `config` asks for.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=config.find_unused_parameters),
            InitProcessGroupKwargs(timeout=PATIENCE),
            # A pass uses each weight once, so a cache would only hold a second copy of all that are trained.
            AutocastKwargs(cache_enabled=False),
        ],
    )
    sharding.check(accelerator, config)
    return accelerator


def build_optimizer(config: TrainConfig, trainables: Trainables) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over everything that is trained.

    Raises:
        ValueError: its package is not installed, or it does not take these arguments.
    """
    cls = optimizers.load(config.optimizer)
    try:
        return cls(trainables.groups(config.weight_decay), lr=config.learning_rate, **(config.optimizer_args or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config.optimizer} refuses its settings ({error}); see --optimizer_args.") from error


class Engine:
    """One process's part in training. Losses and gradients are those of all processes together."""

    def __init__(self, accelerator: Accelerator, trainables: Trainables, config: TrainConfig) -> None:
        """Wrap the model and build the optimizer.

        Raises:
            ValueError: the optimizer cannot be built.
        """
        self.accelerator, self.trainables, self.config = accelerator, trainables, config
        self.stream: BlockStream | None = None
        moved = trainables.parameters().values() if config.streams else trainables.module.parameters()
        for tensor in (*moved, *(() if config.streams else trainables.module.buffers())):
            tensor.data = tensor.data.to(accelerator.device)
        trainables.module.train()
        sharding.set_up(accelerator, trainables, config)
        optimizer = build_optimizer(config, trainables)
        self.model, self.optimizer = accelerator.prepare(
            trainables.module, optimizer, device_placement=[False, True] if config.streams else None
        )
        self._sharded = sharding.sharded_model(accelerator, self.model, self.optimizer)
        self._checked = False

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Frozen weights on the device inside the block.

        Blocks of the DiT that `--vram_limit` has no room for are copied there when they are needed.
        """
        if not self.config.streams:
            with WeightProvider.of(self.trainables.model.dit).held():
                yield
            return
        with frozen_weights_on(self.trainables.module, self.config, self.device) as self.stream:
            yield
        self.stream = None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_sharded(self) -> bool:
        return self._sharded is not None

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        """Around one forward and backward pass; the last one of a step brings the processes' gradients together."""
        self.accelerator.sync_gradients = is_last
        with nullcontext() if is_last else self.accelerator.no_sync(self.model):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this process's share of the step's mean loss.

        Processes average their gradients and `accelerate` divides by the accumulation steps; both are undone here, as
        the share is divided by the number of samples of the whole step already.
        """
        self.accelerator.backward(loss * self.world * self.config.gradient_accumulation_steps)

    def clip(self) -> float:
        """Limit the gradient's norm and return what it was."""
        if not self._checked:
            self._warn_of_unused()
        limit = self.config.clip_norm or float("inf")
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        return 0.0 if norm is None else float(norm)

    def update(self) -> None:
        """One step of the optimizer; the gradients are then gone."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _warn_of_unused(self) -> None:
        self._checked = True
        unused = [name for name, p in self.trainables.parameters().items() if p.grad is None]
        if unused and not self.is_sharded:
            log.warning("The first step reached no gradient for %d parameters, such as %s.", len(unused), unused[0])

    def evaluating(self) -> AbstractContextManager[None]:
        """Around validation and sampling: no dropout, and the weights that an optimizer wants to be judged by."""
        return _evaluating(self.trainables.module, self.optimizer, self.accelerator.autocast())

    def sum(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "sum")

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def gather(self, values: Tensor) -> tuple[float, ...]:
        """The values of all processes, which have equally many."""
        return tuple(self.accelerator.gather(values).tolist())

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def trained(self) -> dict[str, Tensor]:
        """Every trained tensor, whole, by its name; every process must call this, only the main one gets all."""
        if self._sharded is not None:
            return self._sharded.whole()
        return {name: p.detach() for name, p in self.trainables.parameters().items()}

    def fill(self, folder: Path) -> None:
        """Put weights and optimizer into a state's folder; every process must call this."""
        if self._sharded is not None:
            self._sharded.save(folder)
        elif self.is_main:
            write_weights_and_optimizer(folder, self.trained(), self.optimizer.state_dict())

    def restore(self, folder: Path) -> None:
        """Take weights and optimizer from a state's folder.

        Raises:
            ValueError: they are those of another run.
        """
        if self._sharded is not None:
            self._sharded.load(folder)
            return
        weights, optimizer = read_weights_and_optimizer(folder)
        trained = self.trainables.parameters()
        wrong = [n for n in weights.keys() | trained.keys() if _shape(weights, n) != _shape(trained, n)]
        if wrong:
            raise ValueError(f"The state {folder} has other weights than this run, such as {min(wrong)}.")
        for name, parameter in trained.items():
            parameter.data.copy_(weights[name])
        with errors_from(f"The optimizer of {folder}", "does not fit this run", error=StateError):
            self.optimizer.load_state_dict(optimizer)


def _shape(tensors: dict[str, Any], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


@contextmanager
def _evaluating(module: nn.Module, optimizer: Any, autocast: AbstractContextManager[Any]) -> Iterator[None]:
    module.eval()
    optimizer.eval()
    try:
        with torch.no_grad(), autocast:
            yield
    finally:
        optimizer.train()
        module.train()
