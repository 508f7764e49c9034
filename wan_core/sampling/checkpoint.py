"""Unfinished runs and finished latents on disk."""

import contextlib
import glob
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic import clean, creating_first, numbered, replacing
from ..checkpoints.header import read_header
from ..checkpoints.read import read_whole
from ..checkpoints.write import write_safetensors
from ..reading import blamed_on, parse_json
from ..runtime import log
from .state import RunState

LATENT_FORMAT = "latent_tensor"
"""The key of raw latents in a file, as ComfyUI's own SaveLatent and LoadLatent use it."""

FORMAT_MARK = "latent_format_version_0"
"""An empty tensor that tells ComfyUI's LoadLatent not to rescale."""


class Checkpoint:
    """The place where unfinished runs are kept, one file per run, named after its digest.

    A disk that does not take them costs a warning, never the run.
    """

    def __init__(self, folder: Path, every: int = 0) -> None:
        """`every` this many steps a run is written down, and after its last one; 0 only when it runs out of memory."""
        self._folder, self.every = folder, every
        self.resumed, self._warned = False, False

    @property
    def in_use(self) -> bool:
        """Whether runs are written down regularly, or one is kept from before."""
        return bool(self.every) or any(self._folder.glob("unfinished_*.safetensors"))

    def path(self, run: str) -> Path:
        return self._folder / f"unfinished_{run[:16]}.safetensors"

    def save(self, state: RunState) -> Path | None:
        """Write `state` down in place of what is there of the same run; None where the disk does not take it."""
        tensors = {f"memory.{key}": value for key, value in state.memory.items()} | {"latents": state.latents}
        if state.done is not None:
            tensors["done"] = state.done
        numbers = {"prefix": state.prefix, "step": state.step, "clip": state.clip}
        metadata = {key: str(value) for key, value in numbers.items()} | {"run": state.run, "schedule": state.schedule}
        metadata["kernels"] = json.dumps(dict(state.kernels))
        path = self.path(state.run)
        try:
            with replacing(path, sync=True) as partial:
                write_safetensors(partial, tensors, metadata)
        except OSError as error:
            if not self._warned:
                log.warning(
                    "The unfinished run cannot be kept in %s (%s). It goes on, but after a kill it starts over.",
                    path, error,
                )  # fmt: skip
            self._warned = True
            return None
        return path

    def load(self, run: str) -> RunState | None:
        """The kept state of the run with this digest, or None; a file that cannot be read counts as none. `resumed`
        tells from then on whether there was one.
        """
        if not self.path(run).is_file():
            return None
        try:
            with blamed_on(self.path(run), "is no unfinished run"):
                state = _state(*read_whole(self.path(run)))
        except ValueError as error:
            log.warning("%s Starting from the beginning.", error)
            return None
        if state.run != run:
            return None
        self.resumed = True
        return state

    def remove(self, run: str) -> None:
        """Forget the run, once what it made is saved, with what killed processes left unwritten."""
        try:
            self.path(run).unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s is not needed any more, but cannot be removed (%s).", self.path(run), error)
        clean(self._folder)


def _state(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> RunState:
    """The run in a file that `Checkpoint.save` wrote."""
    memory = {key.removeprefix("memory."): value for key, value in tensors.items() if key.startswith("memory.")}
    numbers = {key: int(metadata[key]) for key in ("prefix", "step", "clip")}
    return RunState(
        latents=tensors["latents"], memory=memory, done=tensors.get("done"), run=metadata["run"],
        schedule=metadata["schedule"], kernels=dict(json.loads(metadata.get("kernels", "{}"))), **numbers,
    )  # fmt: skip


def save_latents(folder: Path, name: str, raw: Tensor, manifest: Mapping[str, Any]) -> Path:
    """Write raw latents (B, 16, F, h, w) and a manifest into a new file `<name>_00001_.latent` and return its path.

    The file is the one that ComfyUI's own LoadLatent reads. The manifest is JSON in its metadata, under "wancore".

    Raises:
        ValueError: the folder cannot be written to.
        OSError: the disk is full or fails.
    """
    tensors = {LATENT_FORMAT: raw, FORMAT_MARK: torch.zeros(0)}
    with creating_first(numbered(folder, name, "_.latent")) as file:
        write_safetensors(file.partial, tensors, {"wancore": json.dumps(manifest)})
    return file.path


def find_latents(folder: Path, name: str, manifest: Mapping[str, Any]) -> Path | None:
    """The newest file that `save_latents` wrote with this name and manifest, or None."""
    for path in sorted(folder.glob(f"{glob.escape(name)}_*_.latent"), reverse=True):
        with contextlib.suppress(ValueError):
            if _manifest(path, read_header([path]).metadata) == manifest:
                return path
    return None


def load_latents(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """The raw latents (B, 16, F, h, w) and the manifest of a file that `save_latents` or ComfyUI wrote.

    Raises:
        ValueError: the file is missing, broken, or holds no video latents.
    """
    tensors, metadata = read_whole(path)
    raw = tensors.get(LATENT_FORMAT)
    if raw is None or raw.ndim != 5:
        raise ValueError(f"{path} holds no video latents; expected {LATENT_FORMAT!r} of shape (B, 16, F, h, w).")
    return raw.float(), _manifest(path, metadata)


def _manifest(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    return dict(parse_json(metadata.get("wancore", "{}"), path, "has a manifest that is no JSON"))
