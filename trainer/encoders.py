"""The frozen encoders of a run: each loaded when it is first needed, freed when its work is done."""

import gc
from typing import Any

import torch

from wan_core import catalog, prepare
from wan_core.conditioning.encoders import LatentEncoder
from wan_core.conditioning.text import TextEncoder
from wan_core.models.image_encoder import ImageEncoder
from wan_core.models.vae import WanVAE

from .cache import LatentCache
from .models import FoundModels

TOKENIZER_SUFFIXES = (".json", ".model", ".txt")


class Encoders:
    """Text encoder, VAE and image encoder of `models`, computing in `dtype` on `device`."""

    def __init__(self, models: FoundModels, dtype: torch.dtype, device: torch.device | str) -> None:
        self.models, self.dtype, self.device = models, dtype, torch.device(device)
        self._loaded: dict[str, Any] = {}

    @property
    def text(self) -> TextEncoder:
        return self._get("text_encoder")

    @property
    def vae(self) -> WanVAE:
        return self._get("vae")

    @property
    def image(self) -> ImageEncoder | None:
        """The CLIP image encoder; None when none was named."""
        return self._get("image_encoder") if "image_encoder" in self.models.components else None

    @property
    def latents(self) -> LatentEncoder:
        return LatentEncoder(vae=self.vae)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The kinds that take memory now."""
        return tuple(self._loaded)

    def free(self) -> None:
        """Give the memory of all encoders back; the next use loads them again."""
        self._loaded.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def identity(self, kind: str, cache: LatentCache) -> dict[str, Any] | None:
        """What the outputs of an encoder depend on: its files' content and its dtype. None when none was named."""
        component = self.models.components.get(kind)
        if component is None:
            return None
        files = list(component.header.files)
        if kind == "text_encoder":
            folder = self.models.tokenizer or files[0].parent / catalog.TOKENIZER_PATTERN
            files += sorted(file for file in folder.glob("*") if file.suffix in TOKENIZER_SUFFIXES)
        return {"files": [cache.file_hash(file) for file in files], "dtype": str(self.dtype)}

    def _get(self, kind: str) -> Any:
        if kind not in self._loaded:
            component = self.models.components[kind]
            if kind == "text_encoder":
                loaded = prepare.load_text_encoder(component, self.models.tokenizer, self.dtype, self.device)
            elif kind == "vae":
                loaded = prepare.load_vae(component, self.dtype, self.device)
            else:
                loaded = prepare.load_image_encoder(component, self.dtype, self.device)
            self._loaded[kind] = loaded
        return self._loaded[kind]
