"""The values of sockets while a workflow is planned: sizes in place of tensors, from headers and widgets alone.

A node class whose outputs matter for the memory of a run has a classmethod beside its FUNCTION:

    @classmethod
    def plan_outputs(cls, model, strength=1.0, **_) -> tuple: ...

It is called with the inputs of FUNCTION and returns one value per output: a value of this module, a `SizedModule` for
an encoder or a VAE, settings, or None for an output that takes no memory. It reads no weights. The outputs of a node
without this method are `Unknown`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from wan_core.catalog import CatalogRow
from wan_core.loading.detect import Component
from wan_core.lora.target import Target, use_lora
from wan_core.models.config import Geometry
from wan_core.offload.formats import WeightChoice
from wan_core.planning.job import InputSizes, Job
from wan_core.planning.modules import SizedExpert, SizedModule
from wan_core.recommend import few_steps_for, few_steps_of, recommended_settings
from wan_core.runtime import DTYPES
from wan_core.settings import SamplerSettings, WindowSettings
from wan_core.tiling import Tiles
from wan_core.types import VideoSize
from wan_core.variants import Variant

from ..trainer.config import TrainConfig

Value = TypeVar("Value")


class PlanError(ValueError):
    """A node cannot be planned; the message names the input, and the caller adds the node."""


@dataclass(frozen=True)
class Unknown:
    """The output of a node that cannot be planned; `source` is the node as the user knows it."""

    source: str

    def __repr__(self) -> str:
        return f"what comes from {self.source}"


def require(kind: type[Value], name: str, value: Any) -> Value:
    """`value` of the input `name`, which must be of `kind`.

    Raises:
        PlanError: it is not, or comes from a node that cannot be planned.
    """
    if isinstance(value, Unknown):
        raise PlanError(f"{name} comes from {value.source}, so that this run cannot be planned.")
    if not isinstance(value, kind):
        raise PlanError(f"{name} is of another kind, so that this run cannot be planned.")
    return value


def or_none(value: Any) -> Any:
    """`value`, or None where it comes from a node that cannot be planned."""
    return None if isinstance(value, Unknown) else value


class Settings:
    """A node that turns widgets into settings. That takes no memory, so its FUNCTION runs while planning."""

    FUNCTION: str

    @classmethod
    def plan_outputs(cls, **inputs: Any) -> tuple[Any, ...]:
        unknown = [value for value in inputs.values() if isinstance(value, Unknown)]
        return tuple(unknown[:1]) or getattr(cls(), cls.FUNCTION)(**inputs)


@dataclass(frozen=True)
class PlannedModel:
    """A MODEL; so many `ranks` share its runs."""

    name: str
    variant: Variant
    experts: tuple[SizedExpert, ...]
    motion_controller: SizedModule | None = None
    row: CatalogRow | None = None
    ranks: int = 1

    @property
    def geometry(self) -> Geometry:
        """Of its videos and latents."""
        return self.experts[0].module.config.geometry

    def recommended(self, choice: Any, settings: SamplerSettings, more_motion: Any) -> SamplerSettings:
        """As `VideoModel.recommended`, without the change of LoRAs, which takes no memory."""
        if isinstance(choice, Unknown) or isinstance(more_motion, Unknown):
            return settings
        loras = [use for expert in self.experts for use in expert.loras]
        few_steps = few_steps_for(choice, few_steps_of(loras, [self.name]))
        return recommended_settings(choice, settings, few_steps, self.row, self.name, more_motion)

    def with_lora(self, path: Path, strength: Any, expert: int | None = None) -> "PlannedModel":
        """The model with the LoRA of a file, as `VideoModel.with_lora`; a strength that is not known counts as 1."""
        modules = [part.module for part in (self.experts[0], self.motion_controller) if part is not None]
        factor = 1.0 if isinstance(strength, Unknown) else float(strength)
        use = use_lora(path, Target.of_modules(self.name, modules), strength=factor)
        experts = tuple(
            replace(each, loras=(*each.loras, use)) if expert in (None, number) else each
            for number, each in enumerate(self.experts)
        )
        return replace(self, experts=experts)


@dataclass(frozen=True)
class PlannedConditioning:
    """A CONDITIONING.

    Attributes:
        names: the user's inputs, by the models' names.
        size: the video that they are for.
        sizes: what they add to a run.
        vae, image_encoder, tiles: the models and tiles that encode them.
        windows, num_frames: of the clips that continue a film; its size may only be known when it is read.
    """

    text_encoder: SizedModule | None
    names: tuple[str, ...] = ()
    size: VideoSize | None = None
    sizes: InputSizes = InputSizes()
    vae: SizedModule | None = None
    image_encoder: SizedModule | None = None
    tiles: Tiles = "auto"
    windows: WindowSettings | None = None
    num_frames: int | None = None

    def with_inputs(self, names: Iterable[str], size: VideoSize, **changes: Any) -> "PlannedConditioning":
        """With further inputs for a video of `size`; `changes` are fields of `sizes`.

        Raises:
            PlanError: the earlier inputs are for another size.
        """
        if self.size and self.size != size:
            raise PlanError(f"It is for a video of {size}, but {', '.join(self.names)} for {self.size}.")
        all_names = tuple(dict.fromkeys((*self.names, *names)))
        return replace(self, names=all_names, size=size, sizes=replace(self.sizes, **changes))


@dataclass(frozen=True)
class PlannedLatent:
    """A LATENT that the VAE makes of frames."""

    vae: SizedModule
    tiles: Tiles


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """The LATENT of a sampler, or the frames decoded from it, with the job that makes them.

    Attributes:
        sampled: for frames, the LATENT that they are decoded from.
    """

    job: Job
    sampled: "PlannedRun | None" = None


@dataclass(frozen=True, eq=False)
class PlannedTraining:
    """The path of weights that are still to be trained.

    Attributes:
        config: settings of the run.
        model: on the meta device, as the run would load it.
    """

    config: TrainConfig
    model: PlannedModel

    @property
    def name(self) -> str:
        return self.model.name


def plan_module(
    component: Component,
    absent: str,
    dtype: str = "auto",
    weights: WeightChoice = "auto",
    rest: str = "memory",
    **_: Any,
) -> SizedModule:
    """The module that a loader makes of a component with these widgets; bfloat16 where `dtype` is auto."""
    chosen = DTYPES.get(dtype, torch.bfloat16)
    return SizedModule.planned(component, chosen, weights=weights, mapped=rest == "disk", absent=absent)
