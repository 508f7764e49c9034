"""The frozen encoders of a run, and what they made of the data, kept on disk."""

import gc
import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_core import catalog, model_files
from wan_core.atomic import replacing
from wan_core.conditioning.image import LatentEncoder
from wan_core.conditioning.text import TextEncoder
from wan_core.files import read_json
from wan_core.loading.tensor_files import read_whole, write_safetensors
from wan_core.media import frame_files
from wan_core.models.image_encoder import ImageEncoder
from wan_core.models.vae import WanVAE

from ..model.load import FoundModels

log = logging.getLogger("wancore")

HASHES = "hashes.json"
HASHES_BYTES = 2**28
"""A million files with long names."""
READ_BYTES = 2**22
DIGEST = "sha256"
"""Name of the tensor with the checksum of the others in a file."""


class LatentCache:
    """A folder of tensors under content keys: a changed file or option is another key, so nothing in it can be stale.

    Several processes may use one folder. A file appears under its name only when it is complete.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open the folder, and make it if it is not there.

        Raises:
            ValueError: it cannot be written to.
        """
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ValueError(f"The cache folder {folder} cannot be written to: {error}. Name another one.") from error
        self._hashes = _read_hashes(self.folder / HASHES)

    def key(self, parts: Mapping[str, Any]) -> str:
        """The name of what was made from `parts`, which must be JSON."""
        text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def file_hash(self, path: str | Path) -> str:
        """The SHA-256 of a file's content, or of the frames in a folder; remembered by path, size and time."""
        path = Path(path).resolve()
        if path.is_dir():
            named = [[file.name, self.file_hash(file)] for file in frame_files(path)]
            return hashlib.sha256(json.dumps(named).encode()).hexdigest()
        stat = path.stat()
        identity = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
        if identity not in self._hashes:
            self._hashes |= _read_hashes(self.folder / HASHES)
        if identity not in self._hashes:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(READ_BYTES):
                    digest.update(chunk)
            self._hashes[identity] = digest.hexdigest()
            text = json.dumps(self._hashes, indent=0, ensure_ascii=False)
            with replacing(self.folder / HASHES, sync=True) as partial:
                partial.write_text(text, encoding="utf-8")
        return self._hashes[identity]

    def __contains__(self, key: str) -> bool:
        return self._path(key).is_file()

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors under `key`; None when there are none, or when their file is damaged, which is logged."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            # Read, not mapped: what a run holds must not change with the file.
            tensors = read_whole(path)[0]
            if tensors.pop(DIGEST, torch.empty(0)).tolist() != _digest(tensors):
                raise ValueError("its tensors are not those that were written")
            return tensors
        except ValueError as error:
            log.warning("The cached file %s is damaged (%s); it is made again.", path, error)
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep `tensors` under `key`.

        Raises:
            OSError: the disk is full or fails; nothing appears under the key.
        """
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        stored[DIGEST] = torch.tensor(_digest(stored), dtype=torch.uint8)
        with replacing(self._path(key), sync=True) as partial:
            write_safetensors(partial, stored)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _digest(tensors: Mapping[str, Tensor]) -> list[int]:
    """The 32 bytes of a SHA-256 over names, shapes and values of `tensors`."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.contiguous().view(torch.uint8).reshape(-1).numpy().data if tensor.numel() else b"")
    return list(total.digest())


def _read_hashes(path: Path) -> dict[str, str]:
    """The hashes in `path`; none where it is no such file."""
    try:
        found = read_json(path, limit=HASHES_BYTES)
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


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
            loaded: Any
            if kind == "text_encoder":
                loaded = model_files.load_text_encoder(component, self.models.tokenizer, self.dtype, self.device)
            elif kind == "vae":
                loaded = model_files.load_vae(component, self.dtype, self.device)
            else:
                loaded = model_files.load_image_encoder(component, self.dtype, self.device)
            self._loaded[kind] = loaded
        return self._loaded[kind]
