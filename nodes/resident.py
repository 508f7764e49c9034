"""A model whose weights wait on the device for its next use, in the form in which ComfyUI keeps account of models."""

import weakref

import torch
from torch import nn

from wan_core.offload.blocks import weight_bytes
from wan_core.offload.weights import Residency


class ResidentModel:
    """What ComfyUI's model management asks of a model that it may evict (`comfy.model_management.LoadedModel`).

    It refers to the module weakly: nothing is held once the graph drops it.
    """

    parent = None

    def __init__(self, module: nn.Module, load_device: torch.device, offload_device: torch.device) -> None:
        self._module = weakref.ref(module)
        self.load_device, self.offload_device = load_device, offload_device

    @property
    def model(self) -> nn.Module | None:
        return self._module()

    @property
    def _residency(self) -> Residency:
        return Residency.of(self._module())

    def model_size(self) -> int:
        """Bytes of all weights."""
        return weight_bytes(self._module())

    def loaded_size(self) -> int:
        """Bytes that are on the device."""
        return self._residency.kept_bytes

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.loaded_size() else self.offload_device

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0) -> int:
        """Free at least so many bytes of the device; the bytes that were freed."""
        return self._residency.evict(memory_to_free)

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Bytes loaded: none, weights come back when the model is used."""
        return 0

    def detach(self, unpatch_all: bool = True) -> nn.Module | None:
        """Free everything."""
        self._residency.evict()
        return self._module()

    def model_patches_models(self) -> list["ResidentModel"]:
        return []

    def model_patches_to(self, target: torch.device | torch.dtype) -> None: ...

    def model_dtype(self) -> torch.dtype | None:
        return None

    def lowvram_patch_counter(self) -> int:
        return 0

    def is_clone(self, other: object) -> bool:
        """Whether `other` stands for the same module."""
        return getattr(other, "model", None) is self._module()
