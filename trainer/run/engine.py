"""The model, the optimizer and the processes of a run, as `accelerate` sets them up: one process, several, DeepSpeed or
FSDP."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, AutocastKwargs, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor

from wan_core.files import errors_from
from wan_core.offload.streaming import BlockStream

from .. import optimizers
from ..config import TrainConfig
from ..model import sharding
from ..model.memory import FrozenWeights
from ..model.trainable import Trainables
from .state import StateError, read_weights_and_optimizer, write_weights_and_optimizer

log = logging.getLogger("wancore")

PATIENCE = timedelta(hours=12)
"""How long processes wait for each other: their shares of a large data set take different times to encode."""


def start(config: TrainConfig) -> Accelerator:
    """Join the processes of this run.

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
    """The optimizer that `config` names, for everything that is trained.

    Raises:
        ValueError: its package is not installed, or it does not take these arguments.
    """
    cls = optimizers.load(config.optimizer)
    try:
        return cls(trainables.groups(config.weight_decay), lr=config.learning_rate, **(config.optimizer_args or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config.optimizer} does not take its arguments ({error}); see --optimizer_args.") from error


class Engine:
    """One process's part in training. Losses and gradients are those of all processes together."""

    def __init__(self, accelerator: Accelerator, trainables: Trainables, config: TrainConfig) -> None:
        """Wrap the model and build the optimizer.

        Raises:
            ValueError: the optimizer cannot be built.
        """
        self.accelerator, self.trainables, self.config = accelerator, trainables, config
        self._frozen: FrozenWeights | None = None
        # Streamed frozen weights stay in host memory, see `weights_on_device`.
        module = trainables.module
        moved = trainables.parameters().values() if config.streams else (*module.parameters(), *module.buffers())
        for tensor in moved:
            tensor.data = tensor.data.to(accelerator.device)
        trainables.module.train()
        sharding.set_up(accelerator, trainables, config)
        if trainables.module.dit2 is not None and accelerator.ddp_handler is not None:
            # A step trains one expert or both.
            accelerator.ddp_handler.find_unused_parameters = True
        optimizer = build_optimizer(config, trainables)
        self.model, self.optimizer = accelerator.prepare(
            trainables.module, optimizer, device_placement=[False, True] if config.streams else None
        )
        self._sharded = sharding.sharded_model(accelerator, self.model, self.optimizer)
        self._checked = False

    @contextmanager
    def weights_on_device(self) -> Iterator[None]:
        """Frozen weights on the device inside the block; what `--vram_limit` excludes is streamed there by block."""
        if not self.config.streams:
            # Marked as in use where they are, so that sampling between steps neither moves nor copies them.
            with self.trainables.model.in_place():
                yield
            return
        with FrozenWeights(self.trainables.module, self.config, self.device) as self._frozen:
            yield
        self._frozen = None

    def bring(self, expert: int) -> BlockStream | None:
        """Have the frozen weights of that expert on the device; what brings its blocks, if they are streamed."""
        return None if self._frozen is None else self._frozen.bring(expert)

    def evaluate(self, *inputs: Any, expert: int) -> Tensor:
        """`Denoiser` with the weights of that expert on the device."""
        self.bring(expert)
        return self.model(*inputs, expert=expert)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Around sampling: a pair's streamed weights leave the device, for the sampler to plan anew."""
        if self._frozen is not None and self.trainables.module.dit2 is not None:
            self._frozen.leave()
        with self.evaluating():
            yield

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
        """Around one forward and backward pass. Processes exchange gradients in the last one of a step only."""
        self.accelerator.sync_gradients = is_last
        with nullcontext() if is_last else self.accelerator.no_sync(self.model):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this process's share of the step's mean loss."""
        # The loss is divided by all samples of the step already. The factors undo two further divisions: processes
        # average their gradients, and accelerate divides by the accumulation steps.
        self.accelerator.backward(loss * self.world * self.config.gradient_accumulation_steps)

    def clip_gradients(self) -> float:
        """Limit the gradient's norm to `--clip_norm` and return the norm before."""
        if not self._checked and not self.is_sharded:
            # An expert of which no sample of the step was gets no gradient.
            trained = self.trainables.parameters().items()
            reached = {name.partition(".")[0] for name, p in trained if p.grad is not None}
            idle = {"dit", "dit2"} - reached if reached & {"dit", "dit2"} else set()
            unused = [n for n, p in trained if p.grad is None and n.partition(".")[0] not in idle]
            if unused:
                log.warning("%d parameters got no gradient in the first step, such as %s.", len(unused), unused[0])
        self._checked = True
        limit = self.config.clip_norm or float("inf")
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        return 0.0 if norm is None else float(norm)

    def update(self) -> None:
        """One step of the optimizer. Frees the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around validation, sampling and saving: no gradients and no dropout."""
        module, optimizer = self.trainables.module, self.optimizer
        module.eval()
        # Schedule-free optimizers keep averaged weights for evaluation and others for training.
        optimizer.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                yield
        finally:
            optimizer.train()
            module.train()

    def sum(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "sum")

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def gather(self, values: Tensor) -> tuple[float, ...]:
        """The values of all processes, which must have the same number each."""
        return tuple(self.accelerator.gather(values).tolist())

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def trained(self) -> dict[str, Tensor]:
        """The trained tensors by name. Every process must call this; only the main one gets complete tensors."""
        if self._sharded is not None:
            return self._sharded.full_weights()
        return {name: p.detach() for name, p in self.trainables.parameters().items()}

    def save_state(self, folder: Path) -> None:
        """Write weights and optimizer into the folder of a state. Every process must call this."""
        if self._sharded is not None:
            self._sharded.save(folder)
        elif self.is_main:
            write_weights_and_optimizer(folder, self.trained(), self.optimizer.state_dict())

    def load_state(self, folder: Path) -> None:
        """Read weights and optimizer from the folder of a state.

        Raises:
            ValueError: they are those of another run.
        """
        if self._sharded is not None:
            self._sharded.load(folder)
            return
        weights, optimizer = read_weights_and_optimizer(folder)
        trained = self.trainables.parameters()
        saved_shapes, shapes = ({name: t.shape for name, t in found.items()} for found in (weights, trained))
        wrong = [n for n in saved_shapes.keys() | shapes.keys() if saved_shapes.get(n) != shapes.get(n)]
        if wrong:
            raise ValueError(f"The state {folder} has other weights than this run, such as {min(wrong)}.")
        for name, parameter in trained.items():
            parameter.data.copy_(weights[name])
        with errors_from(f"The optimizer of {folder}", "does not fit this run", error=StateError):
            self.optimizer.load_state_dict(optimizer)
