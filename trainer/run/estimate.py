"""What training takes, counted before it starts, and the settings that fit.

A text encoder or VAE that is trained counts with its weights, not with its activations.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wan_core.offload.weights import WeightProvider
from wan_core.planning.run import allowance_for
from wan_core.runtime import GIB, gigabytes

from ..config import TrainConfig
from ..model import trainable
from ..model.memory import placement_within
from ..model.trainable import Trainables
from .counting import Pass, latent_size, whole_pass

BYTES_PER_TRAINED = 16
"""A float32 weight, its gradient and the two moments of Adam."""

BYTES_PER_UPDATED = 20
"""The same while Adam's loop over all weights together holds one temporary as large as they are."""

BYTES_PER_SAVED = 12
"""A float32 weight and the two moments of Adam."""


@dataclass(frozen=True)
class Estimate:
    """What a run takes.

    Attributes:
        frozen: bytes on the device of weights that are not trained.
        trained: bytes of weights that are, with gradients and optimizer.
        activations: bytes at the peak of a forward and backward pass beside those; None where they were not counted.
        updating: bytes beside frozen weights while the optimizer works, after activations are gone.
        host: bytes that the pass keeps in host memory for its way back.
        copied: bytes that a pass copies between host and device: those, there and back, and streamed blocks, which
            the way back needs again.
        flops: of a pass; 0 where they were not counted.
        saved: bytes of one save on the disk.
        tokens: in a batch.
    """

    frozen: int
    trained: int
    activations: int | None
    updating: int
    host: int
    copied: int
    flops: int
    saved: int
    tokens: int

    @property
    def device(self) -> int:
        """Bytes of the device at the most, with an allowance for what cannot be counted."""
        activations = self.activations or 0
        passing = self.trained + activations + allowance_for(activations)
        return self.frozen + max(passing, self.updating)

    def __str__(self) -> str:
        activations = "not counted" if self.activations is None else gigabytes(self.activations)
        kept = f" Host memory keeps {gigabytes(self.host)} of them." if self.host else ""
        return (
            f"Device memory by count {gigabytes(self.device)}: frozen weights {gigabytes(self.frozen)}, trained "
            f"weights with gradients and optimizer {gigabytes(self.trained)}, activations of {self.tokens} tokens "
            f"{activations}.{kept} One save takes {gigabytes(self.saved)}."
        )


WAYS: Mapping[str, Mapping[str, Any]] = {
    "no checkpointing": {"use_gradient_checkpointing": False, "use_gradient_checkpointing_offload": False},
    "checkpointing that keeps attention": {"gradient_checkpointing_keeps": "attention"},
    "checkpointing": {"gradient_checkpointing_keeps": "auto"},
    "checkpointing into host memory": {
        "gradient_checkpointing_keeps": "auto", "use_gradient_checkpointing_offload": True,
    },
    "checkpointing into host memory, frozen blocks streamed": {
        "gradient_checkpointing_keeps": "auto", "use_gradient_checkpointing_offload": True, "stream_base": True,
    },
}  # fmt: skip
"""Ways to spend less memory, each slower than the one before, as settings that compute the same."""


SMALLER = "take fewer frames or a smaller size, a LoRA in place of whole weights, or several cards"


class Estimator:
    """The memory of a run whose latents (z, R + F, h, w) have these `shapes`, of which the largest counts.

    `trainables` may be on the meta device. A kind of pass is counted once, in a few seconds.
    """

    def __init__(self, trainables: Trainables, shapes: Iterable[tuple[int, ...]]) -> None:
        self._module = trainables.module
        self._trained = list(trainables.parameters().values())
        self._shape = max(shapes, key=self._tokens)
        self._passes: dict[tuple[object, ...], tuple[Pass, Pass]] = {}

    def needs(self, config: TrainConfig, *, counts: bool = True) -> Estimate:
        """What the run takes with the settings `config`; without `counts`, of the activations nothing is known."""
        numbers = sum(p.numel() for p in self._trained)
        whole, first = self._pass(config) if counts else (None, None)
        activations = None
        if whole and first:
            # Gradients appear on the way back: in the last block, where the most is kept, the others have none yet.
            early = {id(p) for block in self._module.dit.blocks[:-1] for p in block.parameters()}
            missing = 4 * sum(p.numel() for p in self._trained if id(p) in early)
            activations = max(whole.peak - missing, first.peak)
        inventory = WeightProvider.of(self._module.dit).inventory()
        placement = placement_within(inventory, config) if config.streams else None
        # Experts are alike, and where weights are streamed one at a time is on the device.
        others = self._module.experts[1:] if placement else ()
        absent = {id(p) for dit in others for p in dit.parameters()}
        frozen = sum(p.nbytes for p in self._module.parameters() if not p.requires_grad and id(p) not in absent)
        host = whole.host if whole else 0
        return Estimate(
            frozen=frozen + (placement.device_bytes - inventory.bytes if placement else 0),
            trained=numbers * BYTES_PER_TRAINED,
            activations=activations,
            updating=numbers * BYTES_PER_UPDATED,
            host=host,
            copied=2 * host + 2 * (placement.streamed_bytes if placement else 0),
            flops=whole.flops if whole else 0,
            saved=numbers * (BYTES_PER_SAVED + config.compute_dtype.itemsize),
            tokens=self._tokens(self._shape) * config.batch_size,
        )

    def fastest(self, config: TrainConfig, budget: float) -> tuple[str, TrainConfig] | None:
        """The first of `WAYS` that fits into `budget` bytes, and `config` with it; None where none does.

        Where frozen blocks are streamed, as many of them stay as there is memory for.
        """
        for name, changes in WAYS.items():
            changed = dataclasses.replace(config, **changes)
            try:
                trainable.check(changed)
            except ValueError:
                continue  # whole weights are trained, which cannot be streamed
            needs = self.needs(changed)
            if needs.device <= budget:
                if changed.stream_base:
                    limit = (budget - needs.device + needs.frozen) / GIB
                    changed = dataclasses.replace(changed, vram_limit=math.floor(10 * limit) / 10)
                return name, changed
        return None

    def verdict(self, config: TrainConfig, limit: float | None) -> tuple[str, bool]:
        """What the run takes in words, and whether that fits into `limit` bytes; if not, with the settings that do."""
        needs = self.needs(config)
        if limit is None:
            return str(needs), True
        if needs.device <= limit:
            return f"{needs} That fits into {gigabytes(limit)}.", True
        found = self.fastest(config, limit)
        advice = f"No setting makes it fit: {SMALLER}."
        if found is not None:
            advice = f"With {found[0]} it fits: {_flags(config, found[1])}."
        return f"{needs} That does not fit into {gigabytes(limit)}. {advice}", False

    def _tokens(self, shape: tuple[int, ...]) -> int:
        return latent_size(shape, self._module.dit.config.geometry).tokens

    def _pass(self, config: TrainConfig) -> tuple[Pass, Pass]:
        key = (
            config.batch_size, config.mixed_precision, config.use_gradient_checkpointing,
            config.use_gradient_checkpointing_offload, config.gradient_checkpointing_keeps == "attention",
        )  # fmt: skip
        if key not in self._passes:
            self._passes[key] = whole_pass(self._module, self._shape, config)
        return self._passes[key]


def _flags(before: TrainConfig, after: TrainConfig) -> str:
    """What changed, as it is typed."""
    values = {field.name: getattr(after, field.name) for field in dataclasses.fields(after)}
    changed = {name: value for name, value in values.items() if value != getattr(before, name)}
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in changed.items())
