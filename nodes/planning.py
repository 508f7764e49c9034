"""What sockets carry while a workflow is planned: sizes in place of tensors, known from headers and widgets alone.

A node class that has a part in what a run takes says it in a classmethod beside its FUNCTION:

    @classmethod
    def planned(cls, model, strength=1.0, **_) -> tuple: ...

It is called with the same inputs and gives one value per output: a value of this module, a `Part` for an encoder or a
VAE, or settings. It reads no weights. Outputs without meaning for memory are None. Where a node of another pack has no
such method, its outputs are `Unknown`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from wan_core.loading.detect import Component
from wan_core.lora.target import Target, use_lora
from wan_core.models.config import Geometry
from wan_core.offload.formats import WeightChoice
from wan_core.planning.job import InputSizes, Job
from wan_core.planning.modules import SizedExpert, SizedModule
from wan_core.runtime import DTYPES
from wan_core.tiling import Tiles
from wan_core.types import VideoSize
from wan_core.variants import Variant

Value = TypeVar("Value")


class PlanError(ValueError):
    """A node cannot be planned; the message names the input, and whoever walks the graph adds the node."""


@dataclass(frozen=True)
class Unknown:
    """The output of a node that cannot be planned; `source` is the node as the user knows it."""

    source: str

    def __repr__(self) -> str:
        return f"what comes from {self.source}"


def known(kind: type[Value], name: str, value: Any) -> Value:
    """`value` of the input `name`, which must be of `kind`.

    Raises:
        PlanError: it is not, or comes from a node that cannot be planned.
    """
    if isinstance(value, Unknown):
        raise PlanError(f"{name} comes from {value.source}, so that this run cannot be planned.")
    if not isinstance(value, kind):
        raise PlanError(f"{name} is of another kind, so that this run cannot be planned.")
    return value


def if_known(value: Any) -> Any:
    """`value`, or None where it comes from a node that cannot be planned."""
    return None if isinstance(value, Unknown) else value


class Settings:
    """A node that makes settings of its widgets: planning runs it."""

    FUNCTION: str

    @classmethod
    def planned(cls, **inputs: Any) -> tuple[Any, ...]:
        unknown = [value for value in inputs.values() if isinstance(value, Unknown)]
        return tuple(unknown[:1]) or getattr(cls(), cls.FUNCTION)(**inputs)


@dataclass(frozen=True)
class PlannedModel:
    """A MODEL."""

    name: str
    variant: Variant
    experts: tuple[SizedExpert, ...]
    motion_controller: SizedModule | None = None

    @property
    def geometry(self) -> Geometry:
        """Of its videos and latents."""
        return self.experts[0].module.config.geometry

    def with_lora(self, path: Path, strength: Any) -> "PlannedModel":
        """The model with the LoRA of a file, as `VideoModel.with_lora`; a strength that is not known counts as 1."""
        modules = [part.module for part in (self.experts[0], self.motion_controller) if part is not None]
        factor = 1.0 if isinstance(strength, Unknown) else float(strength)
        use = use_lora(path, Target.of_modules(self.name, modules), strength=factor)
        experts = tuple(replace(expert, loras=(*expert.loras, use)) for expert in self.experts)
        return replace(self, experts=experts)


@dataclass(frozen=True)
class PlannedConditioning:
    """A CONDITIONING.

    Attributes:
        names: of the user's inputs, as the models call them.
        size: of the video that they were made for.
        vae, image_encoder, tiles: what encoded them.
    """

    text_encoder: SizedModule | None
    names: tuple[str, ...] = ()
    size: VideoSize | None = None
    given: InputSizes = InputSizes()
    vae: SizedModule | None = None
    image_encoder: SizedModule | None = None
    tiles: Tiles = "auto"

    def adding(self, names: Iterable[str], size: VideoSize, **given: Any) -> "PlannedConditioning":
        """With further inputs, made for a video of `size`; `given` are the fields of `given` that they change.

        Raises:
            PlanError: the inputs so far were made for another size.
        """
        if self.size and self.size != size:
            raise PlanError(f"It is made for {size}, but {', '.join(self.names)} for {self.size}.")
        together = tuple(dict.fromkeys((*self.names, *names)))
        return replace(self, names=together, size=size, given=replace(self.given, **given))


@dataclass(frozen=True)
class PlannedLatent:
    """A LATENT that the VAE makes of frames."""

    vae: SizedModule
    tiles: Tiles


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """The LATENT of a sampler, or the frames that are decoded of it, with the job that makes them.

    Attributes:
        sampled: for frames, the LATENT that they are decoded of.
    """

    job: Job
    sampled: "PlannedRun | None" = None


def planned_part(
    component: Component,
    absent: str,
    dtype: str = "auto",
    weights: WeightChoice = "auto",
    rest: str = "memory",
    **_: Any,
) -> SizedModule:
    """The part that loading a component with these widgets would give; planned in bfloat16 where `dtype` is auto."""
    chosen = DTYPES.get(dtype, torch.bfloat16)
    return SizedModule.planned(component, chosen, weights=weights, mapped=rest == "disk", absent=absent)
