"""The steps of a run in their order, from the settings and shapes alone."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..config import TrainConfig
from ..data.choices import batches


@dataclass(frozen=True)
class Step:
    """One optimizer step of one process.

    Attributes:
        number: of the step, from 1.
        epoch: from 0.
        batches: positions in the epoch, one group per forward pass.
        samples: how many samples all processes take in it together.
        ends_epoch: whether it is the last one of its epoch.
    """

    number: int
    epoch: int
    batches: tuple[tuple[int, ...], ...]
    samples: int
    ends_epoch: bool


@dataclass(frozen=True)
class Plan:
    """All steps of a run.

    Attributes:
        config: its settings.
        shapes: what must be equal within a batch, by position, for an epoch.
        rank, world: which of how many processes.
    """

    config: TrainConfig
    shapes: Callable[[int], Sequence[Hashable]]
    rank: int = 0
    world: int = 1

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Steps of each epoch. They differ only where inputs are drawn at random, which changes shapes."""
        if not self.config.condition_dropout and not self.config.random_mask:
            return (len(self._groups(0)),) * self.config.num_epochs
        return tuple(len(self._groups(epoch)) for epoch in range(self.config.num_epochs))

    @cached_property
    def total(self) -> int:
        """Steps of the run."""
        whole = sum(self.lengths)
        return whole if self.config.max_steps is None else min(whole, self.config.max_steps)

    def steps(self, done: int = 0) -> Iterator[Step]:
        """The steps after the first `done`."""
        number = 0
        for epoch, length in enumerate(self.lengths):
            if number + length > done:
                for index, group in enumerate(self._groups(epoch)):
                    step = number + index + 1
                    if done < step <= self.total:
                        samples = self.world * sum(map(len, group))
                        yield Step(step, epoch, group, samples, index == length - 1)
            number += length

    def _groups(self, epoch: int) -> list[tuple[tuple[int, ...], ...]]:
        """The batches of `epoch` by step; the last step of an epoch may have fewer."""
        config = self.config
        found = batches(self.shapes(epoch), config.seed, epoch, config.batch_size, self.rank, self.world)
        size = config.gradient_accumulation_steps
        return [tuple(map(tuple, found[start : start + size])) for start in range(0, len(found), size)]


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of step number `step` of `total`: it grows linearly over the warm-up, is exactly what was typed
    in the first step after it, and then stays (`constant`) or falls towards zero after the last step.
    """
    warmup = config.warmup_steps
    if step <= warmup:
        return config.learning_rate * step / (warmup + 1)
    share = (step - warmup - 1) / max(1, total - warmup)
    falls = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}
    return config.learning_rate * falls[config.lr_scheduler]
