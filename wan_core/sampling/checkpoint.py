"""The state of a sampling run between two steps, and its file, from which the run is continued."""

import contextlib
import dataclasses
import glob
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..atomic import clean, creating_first, numbered_paths, replacing
from ..files import errors_from, parse_json
from ..loading.tensor_files import read_header, read_whole, write_safetensors
from ..offload.weights import WeightProvider
from ..runtime import log
from ..settings import SamplerSettings
from ..types import Conditioning, LatentSize, VideoSize, map_tensors

WEIGHT_SAMPLE = 64
"""At least so many values of each weight, evenly spread, enter a digest; reading all would take as long as loading."""


class HasMemory(Protocol):
    """A part of a run that remembers tensors from step to step."""

    memory: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run after `step` steps of its schedule.

    Attributes:
        latents: normalised, (B, z, R + F, h, w) in float32 on the CPU, reference frames in front.
        prefix: R.
        memory: the tensors of solver and cache, as "solver.<name>" and "cache.<name>".
        run: digest of everything that decides the result; only a run with this digest continues exactly.
        schedule: digest of solver and noise levels; a run that shares only these can use the solver's memory.
        done: latents of finished clips, where the video is made in several.
        clip: number of the clip that `step` counts in.
        kernels: those that the run computed with, see `models.kernels.Choices`; others give other last bits.
    """

    latents: Tensor
    prefix: int
    step: int
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    run: str = ""
    schedule: str = ""
    done: Tensor | None = None
    clip: int = 0
    kernels: Mapping[str, str] = field(default_factory=dict)

    @property
    def video(self) -> Tensor:
        """The latents without reference frames."""
        return self.latents[:, :, self.prefix :]


def memory_of(parts: Mapping[str, HasMemory]) -> dict[str, Tensor]:
    """A copy of the parts' memory on the CPU, keys prefixed by the parts' names."""
    return {f"{name}.{key}": value.cpu() for name, part in parts.items() for key, value in part.memory.items()}


def restore(parts: Mapping[str, HasMemory], memory: Mapping[str, Tensor], device: torch.device) -> None:
    """The inverse of `memory_of`. Numbers (of no axis) stay on the CPU, where the caches read them without waiting."""
    for name, part in parts.items():
        own = {key.split(".", 1)[1]: value for key, value in memory.items() if key.startswith(f"{name}.")}
        part.memory = {key: value.to(device) if value.ndim else value for key, value in own.items()}


def digest_run(dit: nn.Module, cond: Conditioning, size: LatentSize, settings: SamplerSettings, *others: Any) -> str:
    """A digest of everything that decides a run's result: weights, conditioning, size, settings and `others`.

    It is independent of which steps are run now, and of where a cache keeps its tensors. Of each weight and buffer a
    sample is read: training and conversion change nearly every value and are noticed, a change of a few values by hand
    may not be.
    """
    cache = settings.cache and dataclasses.replace(settings.cache, residual_on_cpu=False)
    settings = dataclasses.replace(settings, start_step=0, end_step=None, cache=cache, keep_projections=False)
    return digest(*_samples(dit), cond, size, settings, *others)


def digest_weights(module: nn.Module) -> str:
    """A digest of a sample of each weight of `module`."""
    return digest(*_samples(module))


def _samples(module: nn.Module) -> tuple[Any, Any]:
    if origin := WeightProvider.of(module).origin:
        return (), origin  # a digest does not read weights that the run may not need
    weights = module.state_dict()
    names = tuple((name, tuple(weight.shape), str(weight.dtype)) for name, weight in weights.items())
    flat = (weight.detach().flatten() for weight in weights.values())
    return names, tuple(values[:: max(1, values.numel() // WEIGHT_SAMPLE)].float().cpu() for values in flat)


def manifest(
    settings: SamplerSettings, size: VideoSize, latents: Tensor, kernels: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The settings that made these normalised latents, and their digest, as values that JSON can hold."""
    return {
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
        "size": size.as_dict(),
        "kernels": dict(kernels or {}),
        "latents": {"shape": list(latents.shape), "sha256": digest(latents.float())},
    }


def digest(*values: Any) -> str:
    """SHA-256 of values, as hexadecimal digits; tensors inside them count by dtype, shape and bytes."""
    total = hashlib.sha256()

    def marked(tensor: Tensor) -> str:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        return f"{tensor.dtype} {tuple(tensor.shape)}"

    for value in values:
        total.update(repr(map_tensors(value, marked)).encode())
    return total.hexdigest()


LATENT_FORMAT = "latent_tensor"
"""The key of raw latents in a file, that of ComfyUI's SaveLatent and LoadLatent."""

FORMAT_MARK = "latent_format_version_0"
"""The key of an empty tensor; without it ComfyUI's LoadLatent rescales the latents."""


class Checkpoint:
    """A folder of unfinished runs, one file each, named by its digest.

    When they cannot be written, a warning is logged and the run goes on.
    """

    def __init__(self, folder: Path, every: int = 0) -> None:
        """A run is saved `every` so many steps and after its last one; with 0 only when it runs out of memory."""
        self.folder, self.every = folder, every
        self.resumed, self._warned = False, False

    @property
    def in_use(self) -> bool:
        """Whether runs are saved regularly, or one is left from before."""
        return bool(self.every) or any(self.folder.glob("unfinished_*.safetensors"))

    def path(self, run: str) -> Path:
        return self.folder / f"unfinished_{run[:16]}.safetensors"

    def save(self, state: RunState) -> Path | None:
        """Save `state` in place of an earlier one of the same run; None when it cannot be written."""
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
                    "The unfinished run cannot be kept in %s (%s). It goes on, but if it is killed it will start over.",
                    path, error,
                )  # fmt: skip
            self._warned = True
            return None
        return path

    def load(self, run: str) -> RunState | None:
        """The saved state of the run with this digest; None when there is none or its file cannot be read. `resumed`
        becomes true when there is one.
        """
        if not self.path(run).is_file():
            return None
        try:
            with errors_from(self.path(run), "is no unfinished run"):
                state = _state(*read_whole(self.path(run)))
        except ValueError as error:
            log.warning("%s Starting from the beginning.", error)
            return None
        if state.run != run:
            return None
        self.resumed = True
        return state

    def remove(self, run: str) -> None:
        """Delete the saved run, once its video is written, and what killed processes left half-written."""
        try:
            self.path(run).unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s is not needed any more, but cannot be removed (%s).", self.path(run), error)
        clean(self.folder)


def _state(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> RunState:
    """The run in a file that `Checkpoint.save` wrote."""
    memory = {key.removeprefix("memory."): value for key, value in tensors.items() if key.startswith("memory.")}
    numbers = {key: int(metadata[key]) for key in ("prefix", "step", "clip")}
    return RunState(
        latents=tensors["latents"], memory=memory, done=tensors.get("done"), run=metadata["run"],
        schedule=metadata["schedule"], kernels=dict(json.loads(metadata.get("kernels", "{}"))), **numbers,
    )  # fmt: skip


def save_latents(folder: Path, name: str, raw: Tensor, manifest: Mapping[str, Any]) -> Path:
    """Write raw latents (B, z, F, h, w) and a manifest into a new file `<name>_00001_.latent` and return its path.

    The file is the one that ComfyUI's own LoadLatent reads. The manifest is JSON in its metadata, under "wancore".

    Raises:
        ValueError: the folder cannot be written to.
        OSError: the disk is full or fails.
    """
    tensors = {LATENT_FORMAT: raw, FORMAT_MARK: torch.zeros(0)}
    with creating_first(numbered_paths(folder, name, "_.latent")) as file:
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
    """The raw latents (B, z, F, h, w) and the manifest of a file that `save_latents` or ComfyUI wrote.

    Raises:
        ValueError: the file is missing, broken, or holds no video latents.
    """
    tensors, metadata = read_whole(path)
    raw = tensors.get(LATENT_FORMAT)
    if raw is None or raw.ndim != 5:
        raise ValueError(f"{path} holds no video latents; expected {LATENT_FORMAT!r} of five axes.")
    return raw.float(), _manifest(path, metadata)


def _manifest(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    return dict(parse_json(metadata.get("wancore", "{}"), path, "has a manifest that is no JSON"))
