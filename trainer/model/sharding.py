"""Sharded training by FSDP or DeepSpeed: each process holds a part of the weights, gradients or optimizer state.

A step computes the same as in one process. In a state each process writes its own part.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..config import TrainConfig
from .trainable import Trainables

TAG = "deepspeed"
"""The folder of DeepSpeed's files within a state."""


class ShardedModel(Protocol):
    """A model and its optimizer of which each process holds a part. Every process must call each of these."""

    def full_weights(self) -> dict[str, Tensor]:
        """The trained tensors in float32 on the CPU, by name; complete in the main process only."""

    def save(self, folder: Path) -> None:
        """Write weights and optimizer."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""


def check(accelerator: Accelerator, config: TrainConfig) -> None:
    """Raise ValueError when `config` asks for what the processes of this run cannot do."""
    if config.streams and accelerator.num_processes > 1:
        raise ValueError("--stream_base and --vram_limit are for one process; launch one, or leave them out.")
    if accelerator.distributed_type not in SHARDED_MODELS:
        return
    if config.sample_steps is not None:
        raise ValueError("Sharded weights cannot draw samples; leave out --sample_steps, or launch without sharding.")
    if config.fp8_base:
        raise ValueError("--fp8_base is for whole weights; leave it out, or launch without sharding.")
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError("Only version 2 of FSDP is supported: set fsdp_version: 2, as trainer/accelerate/fsdp.yaml.")


def set_up(accelerator: Accelerator, trainables: Trainables, config: TrainConfig) -> None:
    """Configure FSDP or DeepSpeed for this run, before accelerate wraps the model."""
    if accelerator.distributed_type not in SHARDED_MODELS:
        return
    # accelerate adds autocast itself only where each process holds the complete model.
    bf16 = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16")
    trainables.module.forward = bf16(trainables.module.forward)  # type: ignore[method-assign]  # as accelerate does
    if trainables.module.dit2 is not None:
        raise ValueError(
            "Both experts of a pair are not trained with FSDP or DeepSpeed: name one of them, or launch without these."
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin = accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in trainables.module.blocks})
        # FSDP's own mixed precision would round latents, noise and timesteps on their way in; autocast does not.
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
    else:
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "gradient_clipping": config.clip_norm,
        }


def sharded_model(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> ShardedModel | None:
    """How `model` and `optimizer`, as `accelerator` prepared them, are saved. None when every process holds all."""
    kind = SHARDED_MODELS.get(accelerator.distributed_type)
    return None if kind is None else kind(model, optimizer)


@dataclass(frozen=True, eq=False)
class FSDPModel:
    """FSDP: `model` and `optimizer` hold a part of each tensor."""

    model: nn.Module
    optimizer: Any

    TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)

    def full_weights(self) -> dict[str, Tensor]:
        options = StateDictOptions(ignore_frozen_params=True, full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.model, options=options)
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def save(self, folder: Path) -> None:
        """
        Raises:
            OSError: a process could not write its part.
        """
        try:
            dcp.save(self._parts(), checkpoint_id=folder)
        except dcp.CheckpointException as error:
            raise OSError(f"a process could not write its part of the state ({error})") from error

    def load(self, folder: Path) -> None:
        """
        Raises:
            ValueError: a part is missing, or is of another run.
        """
        parts = self._parts()
        try:
            dcp.load(parts, checkpoint_id=folder)
        except dcp.CheckpointException as error:
            raise ValueError(f"The state {folder} does not fit this run ({error}).") from error
        set_model_state_dict(self.model, parts["weights"], options=self.TRAINED)
        set_optimizer_state_dict(self.model, self._plain, parts["optimizer"], options=self.TRAINED)

    @property
    def _plain(self) -> Any:
        return self.optimizer.optimizer

    def _parts(self) -> dict[str, dict[str, Any]]:
        return {
            "weights": get_model_state_dict(self.model, options=self.TRAINED),
            "optimizer": get_optimizer_state_dict(self.model, self._plain, options=self.TRAINED),
        }


@dataclass(frozen=True, eq=False)
class DeepSpeedModel:
    """DeepSpeed: `model` is its engine, which holds the optimizer too."""

    model: Any
    optimizer: Any

    def full_weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        trained = ((name, p) for name, p in self.model.module.named_parameters() if p.requires_grad)
        return {name: safe_get_full_fp32_param(parameter).cpu() for name, parameter in trained}

    def save(self, folder: Path) -> None:
        self.model.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """
        Raises:
            ValueError: `folder` holds no parts of DeepSpeed.
        """
        found, _ = self.model.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        if found is None:
            raise ValueError(f"The state {folder} was not written by a run that was launched with DeepSpeed.")


SHARDED_MODELS: dict[DistributedType, Callable[[Any, Any], ShardedModel]] = {
    DistributedType.FSDP: FSDPModel,
    DistributedType.DEEPSPEED: DeepSpeedModel,
}
"""By the kind of distribution in which a process does not hold everything."""
