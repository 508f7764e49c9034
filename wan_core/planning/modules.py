"""The models of a run on the meta device, which have the sizes of the loaded ones before anything is loaded."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from .. import bundled, catalog
from ..loading.detect import Component, detect
from ..loading.load import CLASSES, build
from ..loading.names import ModelKind
from ..loading.tensor_files import Header, TensorInfo
from ..lora.apply import LoraUse
from ..models.config import (
    GEOMETRIES,
    WAN_22,
    ImageEncoderConfig,
    MotionControllerConfig,
    PreviewDecoderConfig,
    TextEncoderConfig,
    VAEConfig,
)
from ..models.dit import WanDiT
from ..models.ops import on_meta
from ..models.preview_decoder import NAMES
from ..offload.blocks import weights_of
from ..offload.formats import WeightChoice
from ..offload.quant import QuantisedLinear, big_linears, quantise
from ..offload.streaming import SLOTS, Inventory
from ..offload.weights import WeightProvider
from ..sampling.experts import Expert
from .estimate import meta_twin

PUBLISHED: dict[ModelKind, tuple[str, Any]] = {
    "text_encoder": (catalog.TEXT_ENCODER_PATTERN, TextEncoderConfig()),
    "vae": (catalog.VAE_PATTERN, VAEConfig()),
    "image_encoder": (catalog.IMAGE_ENCODER_PATTERN, ImageEncoderConfig()),
    "motion_controller": (catalog.MOTION_CONTROLLER_PATTERN, MotionControllerConfig()),
}
"""File and sizes of the models that all video models share."""

BUNDLED: dict[ModelKind, Any] = {
    "text_encoder": bundled.TEXT_ENCODER,
    "vae": bundled.VAE,
    "image_encoder": bundled.IMAGE_ENCODER,
    "motion_controller": bundled.MOTION_CONTROLLER,
}
"""Sizes of the same models among the bundled ones."""


VAE_22 = VAEConfig(base_dim=160, decoder_dim=256, geometry=WAN_22, patch=2, shortcuts=True)
"""The VAE of the 5B models, which their own rows bring (`CatalogRow.vae`)."""

Model = TypeVar("Model", bound=nn.Module, covariant=True)
Sized = TypeVar("Sized", bound="SizedModule[Any]")


@dataclass(frozen=True, eq=False)
class SizedModule(Generic[Model]):
    """One model of a run, whose sizes are known: the loaded module, or its twin on the meta device.

    Attributes:
        absent: the files of a published model that are not on this machine; the twin is made from what is published.
    """

    module: Model
    absent: str = ""

    @classmethod
    def planned(
        cls: type[Sized],
        component: Component,
        dtype: torch.dtype,
        *,
        weights: WeightChoice = "auto",
        mapped: bool = False,
        absent: str = "",
    ) -> Sized:
        """What loading `component` with these settings (`loading.load`) would give; no weight is read.

        Raises:
            ValueError: loading would refuse it.
        """
        module = build(component, dtype=dtype, device="meta", weights=weights, mapped=mapped)
        return cls(module, absent)

    @property
    def provider(self) -> WeightProvider:
        return WeightProvider.of(self.module)

    @property
    def inventory(self) -> Inventory:
        return self.provider.inventory()

    @property
    def file_bytes(self) -> int:
        """Bytes that stay in the model's file."""
        return sum(self._weights[name].nbytes for name in self.provider.mapped)

    @property
    def ram_bytes(self) -> int:
        """Bytes of the weights in host memory, and of the buffers that blocks are read into which are not kept there as
        they work.
        """
        kept = sum(w.nbytes for name, w in self._weights.items() if name not in self.provider.mapped)
        reread = self.provider.mapped or self.provider.work_dtypes
        return kept + (SLOTS * max((b.bytes for b in self.inventory.blocks.values()), default=0) if reread else 0)

    @property
    def _weights(self) -> dict[str, torch.Tensor]:
        return weights_of(self.module)

    def quantised(self: Sized) -> Sized | None:
        """The same model with the layers of its blocks as FP8; None where they are quantised already, or are used as
        their file has them.
        """
        done = all(isinstance(layer, QuantisedLinear) for layer in big_linears(self.module).values())
        if done or self.provider.mapped or self.provider.work_dtypes:
            return None
        return replace(self, module=quantise(meta_twin(self.module)))


@dataclass(frozen=True, eq=False)
class SizedExpert(SizedModule[WanDiT]):
    """A transformer of a video model with the noise levels and the LoRAs of an `Expert`."""

    lowest: float = 0.0
    loras: tuple[LoraUse, ...] = ()

    @classmethod
    def of(cls, expert: Expert) -> "SizedExpert":
        """A loaded expert."""
        return cls(expert.dit, lowest=expert.lowest, loras=expert.loras)

    @property
    def expert(self) -> Expert:
        return Expert(self.module, self.lowest, self.loras)


def published_dit(row: catalog.CatalogRow, expert: int = 0) -> Component:
    """The video model of a catalog row, of a pair the expert of that number, whether or not its file is here."""
    folder = (catalog.EXPERT_FOLDERS[expert],) if row.is_pair else ()
    file = Path(row.base or row.model_id, *folder, catalog.DIT_FILE)
    if row.size == "tiny":
        return _unread("dit", bundled.DITS[row.variant], file, torch.float32)
    return _unread("dit", catalog.published_config(row), file)


def published_component(kind: ModelKind, model_id: str) -> Component:
    """The model of that kind that video models share, published or bundled as `model_id`."""
    file, config = PUBLISHED[kind]
    tiny = BUNDLED[kind]
    row = catalog.find_row(model_id)
    if kind == "vae" and row is not None and row.vae == (model_id, catalog.VAE_22_PATTERN):
        file, config, tiny = catalog.VAE_22_PATTERN, VAE_22, bundled.VAE_22
    if model_id in (catalog.TINY, catalog.TINY_TI2V):
        return _unread(kind, tiny, Path(model_id, file), torch.float32)
    return _unread(kind, config, Path(model_id, file))


def published_tiny(channels: int) -> Component:
    """The tiny autoencoder of that name as published, for latents of so many channels."""
    config = PreviewDecoderConfig(latent_channels=channels, patch=GEOMETRIES[channels].spatial_stride // 8)
    return _unread("preview_decoder", config, Path(f"{NAMES[channels]}.safetensors"), torch.float32)


def _unread(kind: ModelKind, config: Any, file: Path, dtype: torch.dtype = torch.bfloat16) -> Component:
    """What a file of these sizes would be detected as. Published repositories differ in dtype; bfloat16 is usual."""
    with on_meta():
        shapes = CLASSES[kind](config).state_dict()
    infos = {name: TensorInfo(tuple(tensor.shape), dtype, file) for name, tensor in shapes.items()}
    return detect(Header(MappingProxyType(infos), (file,), MappingProxyType({})))
