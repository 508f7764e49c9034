"""The inputs of a run, and the transformers that take its steps: each for a range of noise levels, one at a time with
its weights on the device.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..lora.apply import LoraUse
from ..models.dit import WanDiT
from ..models.layers import MotionController
from ..offload.streaming import Placement
from ..settings import SamplerSettings
from ..types import Conditioning, LatentSize


@dataclass(frozen=True)
class RunInputs:
    """The inputs of a run, besides its settings.

    Attributes:
        cond: fitted to the model (`VideoModel.fit`); its tensors may be on any device.
        size: of the video, without the reference frames that conditioning puts in front of it.
        start: normalised latents of that size: a clean video when the first noise level is below 1, partly denoised
            latents when `start_step` is above 0; ignored otherwise.
        prompts: conditioning with the text of each window, in place of that of `cond`; the last one for all after it.
    """

    cond: Conditioning
    size: LatentSize
    start: Tensor | None = None
    prompts: tuple[Conditioning, ...] = ()

    def to(self, device: torch.device) -> "RunInputs":
        """A copy with all conditioning on `device`."""
        return replace(self, cond=self.cond.to(device), prompts=tuple(prompt.to(device) for prompt in self.prompts))


@dataclass(frozen=True, eq=False)
class Expert:
    """A transformer and the noise levels that it was trained for.

    Attributes:
        dit: the transformer.
        lowest: the lowest timestep (0 to 1000) of its range. The experts of a model are in falling order of it; the
            last one has 0.
        loras: applied to it during a run.
        files: that its weights are read from.
    """

    dit: WanDiT
    lowest: float = 0.0
    loras: tuple[LoraUse, ...] = ()
    files: tuple[Path, ...] = ()


ROUNDING = 1e-3
"""A timestep this far below the lowest one of an expert still counts as on it: 1000 times a noise level is rounded."""


def expert_at(experts: Sequence[Expert], timestep: float) -> int:
    """The number of the expert that takes a step from `timestep`."""
    reached = (number for number, expert in enumerate(experts) if timestep >= expert.lowest - ROUNDING)
    return next(reached, len(experts) - 1)


@dataclass(frozen=True)
class Active:
    """An expert whose weights are ready to compute.

    Attributes:
        dit: its transformer.
        settings: those of the run, as the plan for this expert has them.
        before_step: called as (index, total) before every step that it takes.
        placement: of its weights, as the plan has it.
    """

    dit: WanDiT
    settings: SamplerSettings
    before_step: Callable[[int, int], None] = lambda index, total: None
    placement: Placement | None = None


Activate = Callable[[int, SamplerSettings, Placement | None], AbstractContextManager[Active]]
"""Brings the weights of the expert of that number to the device, for the length of the context; placed as another rank
has planned, if there is a placement.
"""


class RunModel:
    """A model during one run. Between two steps the expert may change; the one before is released first."""

    def __init__(
        self,
        experts: Sequence[Expert],
        motion_controller: MotionController | None = None,
        activate: Activate | None = None,
        announce: Callable[[int], None] = lambda number: None,
        task: Any = None,
    ) -> None:
        """Without `activate`, the weights must be on the run's device already.

        Args:
            announce: called before the last step of an expert with the number of the one that follows.
            task: what other ranks are told at the start of the run, if they do not follow it already.
        """
        self.announce, self.task = announce, task
        self.experts, self.motion_controller = tuple(experts), motion_controller
        self._activate = activate or self._in_place
        self._stack, self._current = ExitStack(), -1
        self._active: Active | None = None

    @property
    def first(self) -> WanDiT:
        """The transformer whose structure and dtype all experts share."""
        return self.experts[0].dit

    @property
    def number(self) -> int:
        """That of the active expert."""
        return self._current

    def shares(self, timesteps: Sequence[float], steps: range) -> list[tuple[int, range]]:
        """`steps` by the expert that takes them: its number, and consecutive steps."""
        groups = groupby(steps, lambda index: expert_at(self.experts, timesteps[index]))
        found = [(number, list(group)) for number, group in groups]
        return [(number, range(group[0], group[-1] + 1)) for number, group in found]

    def active(self, number: int, settings: SamplerSettings, placement: Placement | None = None) -> Active:
        """The expert of that number, ready until another one is asked for or the run ends; `settings` are those of the
        run, `placement` is that of another rank.
        """
        if self._active is None or self._current != number:
            self.release()
            self._active = self._stack.enter_context(self._activate(number, settings.of_expert(number), placement))
            self._current = number
        return self._active

    def release(self, error: BaseException | None = None) -> None:
        """Move the weights back to where they are between runs; after an error none stay on the device."""
        self._active = None
        if error is None:
            self._stack.close()
        else:
            self._stack.__exit__(type(error), error, error.__traceback__)

    def __enter__(self) -> "RunModel":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.release(error)

    @contextmanager
    def _in_place(self, number: int, settings: SamplerSettings, placement: Placement | None) -> Iterator[Active]:
        yield Active(self.experts[number].dit, settings)
