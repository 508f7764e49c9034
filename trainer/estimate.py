"""What a run will need: memory of the device and room on the disk, estimated from shapes before it starts."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from torch import Tensor

from wan_core.memory.residency import Residency
from wan_core.models.config import DiTConfig

from .config import TrainConfig
from .placing import placement_within
from .trainable import Trainables

BYTES_PER_TRAINED = 16
"""A float32 weight, its gradient and the two moments of Adam."""

BYTES_PER_SAVED = 12
"""A float32 weight and the two moments of Adam."""


@dataclass(frozen=True)
class Estimate:
    """Bytes: of frozen weights, of what is trained with its optimizer, of activations; and of one save on the disk."""

    frozen: int
    trained: int
    activations: int
    saved: int
    tokens: int

    @property
    def device(self) -> int:
        return self.frozen + self.trained + self.activations

    def __str__(self) -> str:
        return (
            f"Estimated device memory {_gb(self.device)}: frozen weights {_gb(self.frozen)}, trained weights with "
            f"optimizer {_gb(self.trained)}, activations of {self.tokens} tokens {_gb(self.activations)}. One save "
            f"takes {_gb(self.saved)}."
        )


def estimate(trainables: Trainables, shapes: Iterable[tuple[int, ...]], config: TrainConfig) -> Estimate:
    """The needs of a run whose latents (16, R + F, h, w) have these `shapes`; the largest counts.

    Activations are the inputs of every block, which checkpointing keeps, and the inside of one block, of which about
    twelve tensors as wide as the model and three as wide as its feed-forward layer live at once.
    """
    dit = trainables.module.dit.config
    tokens = max(_tokens(shape, dit) for shape in shapes) * config.batch_size
    width = 2 if config.mixed_precision == "bf16" else 4
    blocks = len(trainables.module.blocks)
    inside = tokens * (12 * dit.dim + 3 * dit.ffn_dim) * width
    if config.use_gradient_checkpointing:
        kept = 0 if config.use_gradient_checkpointing_offload else tokens * dit.dim * width * blocks
    else:
        kept = inside * (blocks - 1)
    trained = sum(p.numel() for p in trainables.parameters().values())
    frozen = sum(_bytes(p) for p in trainables.module.parameters() if not p.requires_grad)
    if config.streams:
        inventory = Residency.of(trainables.module.dit).inventory()
        frozen += placement_within(inventory, config).device_bytes - inventory.bytes
    return Estimate(
        frozen=frozen,
        trained=trained * BYTES_PER_TRAINED,
        activations=kept + inside,
        saved=trained * (BYTES_PER_SAVED + width),
        tokens=tokens,
    )


def _tokens(shape: tuple[int, ...], dit: DiTConfig) -> int:
    return prod(n // p for n, p in zip(shape[1:], dit.patch_size, strict=True))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 5e7 else f"{count / 1e6:.1f} MB"
