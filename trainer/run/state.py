"""The saved states of a run, one folder for each saved step, and the check of which run may continue from them.

A state is complete or absent: a folder is filled under a temporary name, its files are flushed to the disk, a manifest
with their sizes and hashes is written last, and then the folder is renamed. Without a matching manifest it is no state.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_core.atomic import sync_file, sync_folder
from wan_core.checks import check_whole
from wan_core.files import errors_from, read_json
from wan_core.loading.detect import Component
from wan_core.loading.pairs import resolve_experts
from wan_core.loading.pickles import require_plain
from wan_core.loading.tensor_files import read_whole, write_safetensors
from wan_core.runtime import GIB, gigabytes

from ..config import TrainConfig

log = logging.getLogger("wancore")

MANIFEST, PROGRESS, WEIGHTS, OPTIMIZER = "manifest.json", "progress.json", "weights.safetensors", "optimizer.pt"
FORMAT = 1
LARGEST_STEP = 10**15
BLOCK = 2**22


LOCATION_SETTINGS = {
    "cache", "cache_dir", "confined", "dataset_base_path", "dataset_metadata_path", "local_model_path", "max_steps",
    "min_free_gb", "model_id_with_origin_paths", "model_paths", "num_epochs", "num_workers", "output_path",
    "preset_lora_path", "resume", "resume_force", "resume_from_checkpoint", "skip_download", "stop_file", "task",
    "tokenizer_path",
}  # fmt: skip
"""Settings about the places of files and the length of a run. They do not change how it trains or what it writes."""

FREE_SETTINGS = LOCATION_SETTINGS | {
    "find_unused_parameters", "gradient_checkpointing_keeps", "keep_last", "learning_rate", "log_with",
    "lora_checkpoint", "lora_format",
    "on_bad_sample", "preset_lora_model", "remove_prefix_in_ckpt", "sample_cfg_scale", "sample_count",
    "sample_inference_steps", "sample_negative_prompt", "sample_prompt", "sample_seed", "sample_steps", "save_steps",
    "stream_base", "use_gradient_checkpointing", "use_gradient_checkpointing_offload", "validate_steps", "vram_limit",
    "wandb_project",
}  # fmt: skip
"""Settings that may differ when a run is continued: they do not change what a step computes, except for the learning
rate, which users want to change. Data and models are compared by content, not by path."""


class StateError(ValueError):
    """A state that is damaged, or of another run."""


@dataclass(frozen=True)
class Progress:
    """How far a run is, and what identifies it.

    Attributes:
        step: optimizer steps that are done; data order, noise and dropout follow from it.
        run: what must be equal for the run to be continued exactly, see `run_identity`.
        config: all settings.
        world: processes.
    """

    step: int
    run: Mapping[str, Any]
    config: Mapping[str, Any]
    world: int


@dataclass(frozen=True)
class States:
    """The saved states of one run, in folders `step-<n>` of `folder`."""

    folder: Path

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:07}"

    def steps(self) -> list[int]:
        """Steps of the states that have a manifest, ascending."""
        found = (re.fullmatch(r"step-(\d{7,})", path.parent.name) for path in self.folder.glob(f"*/{MANIFEST}"))
        return sorted(int(match[1]) for match in found if match)

    def latest(self) -> Path | None:
        """The newest undamaged state; damaged ones are skipped with a warning. None where there is no state.

        Raises:
            StateError: there are states, but all of them are damaged.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                verify(self.path(step))
            except StateError as error:
                damaged.append(str(error))
            else:
                for problem in damaged:
                    log.warning("%s It is skipped.", problem)
                return self.path(step)
        damaged += [f"{folder} has no {MANIFEST}." for folder in self._without_manifest()]
        if damaged:
            raise StateError(
                f"{' '.join(damaged)} All saved states are damaged, and the training does not "
                "start over beside its weights. "
                f"Bring the files back, choose another --output_path, or remove {self.folder} to start over."
            )
        return None

    def _without_manifest(self) -> list[Path]:
        """Folders with the name of a state but without a manifest."""
        found = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        return [path for path in found if re.fullmatch(r"step-\d{7,}", path.name) and not (path / MANIFEST).is_file()]

    def partial(self, step: int) -> Path:
        """The folder into which a state is written before it is renamed."""
        return self.folder / f".{self.path(step).name}.draft"

    def begin(self, step: int) -> Path:
        """Make the empty partial folder of a state. Fill it, then call `commit`."""
        self.discard(step)
        self.partial(step).mkdir(parents=True)
        return self.partial(step)

    def discard(self, step: int) -> None:
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def commit(self, progress: Progress) -> Path:
        """Make the filled partial folder of that step a state.

        Raises:
            OSError: its files could not be flushed to the disk.
        """
        partial, target = self.partial(progress.step), self.path(progress.step)
        (partial / PROGRESS).write_text(json.dumps(asdict(progress), indent=1), encoding="utf-8")
        # Everything is on the disk before the name: after a power failure a state is never half there.
        _write_manifest(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        sync_folder(self.folder)
        return target

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` states, and the leftovers of killed runs."""
        for step in self.steps()[:-keep]:
            # The manifest first: a folder that is only partly removed is then no state.
            (self.path(step) / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(self.path(step), ignore_errors=True)
        self.tidy()

    def tidy(self) -> None:
        """Remove the leftovers of killed runs: partial folders, and states whose removal had begun."""
        partial = self.folder.glob(".step-*.draft")
        # Without any complete state, folders without a manifest are damaged states, which `latest` reports.
        for left in (*partial, *(self._without_manifest() if self.steps() else ())):
            shutil.rmtree(left, ignore_errors=True)


def write_weights_and_optimizer(folder: Path, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
    """Put trained weights and an optimizer's `state_dict` into a state's folder."""
    write_safetensors(folder / WEIGHTS, weights)
    torch.save(optimizer, folder / OPTIMIZER)


def read_weights_and_optimizer(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the optimizer's `state_dict` of a state, on the CPU.

    Raises:
        StateError: a file is missing or damaged, or the optimizer's holds more than numbers, texts and tensors.
    """
    with errors_from(f"The saved state {folder}", "cannot be read", error=StateError):
        require_plain(folder / OPTIMIZER)
        optimizer = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        return read_whole(folder / WEIGHTS)[0], optimizer


def read_progress(folder: Path) -> Progress:
    """The progress that is recorded in the state in `folder`.

    Raises:
        StateError: there is no state, or it is damaged.
    """
    verify(folder)
    with errors_from(folder / PROGRESS, "is not what a state holds", error=StateError):
        progress = Progress(**read_json(folder / PROGRESS))
        if not isinstance(progress.run, dict) or not isinstance(progress.config, dict):
            raise ValueError("run and config must be objects")
        check_whole("step", progress.step, low=0, high=LARGEST_STEP)
        check_whole("world", progress.world, low=1, high=LARGEST_STEP)
    return progress


def verify(folder: Path) -> None:
    """Raise StateError unless every file of the state in `folder` is as it was written."""
    with errors_from(folder, "is no saved state", error=StateError):
        files = read_json(folder / MANIFEST)["files"].items()
        entries = {name: (entry["size"], entry["sha256"]) for name, entry in files}
        if outside := next((name for name in entries if Path(name).is_absolute() or ".." in Path(name).parts), None):
            raise ValueError(f"it names {outside!r:.80}, which is none of its files")
    for name, (size, sha256) in entries.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size or digest(file) != sha256:
            raise StateError(f"The saved state {folder} is damaged: {name} is not as it was written.")


def run_identity(config: TrainConfig, fingerprint: str, components: Mapping[str, Component]) -> dict[str, Any]:
    """What must be equal for a run to be continued exactly: settings, data by its `fingerprint`, model files."""
    kept = {name: value for name, value in config.resolved().items() if name not in FREE_SETTINGS}
    files = {kind: _sizes(component.header.files) for kind, component in components.items()}
    for name in ("resume_from_checkpoint", "preset_lora_path"):
        path = getattr(config, name)
        if path is not None:
            files[name] = _sizes(file for model in resolve_experts(Path(path).expanduser()) for file in model)
    return {**kept, "data": fingerprint, "models": files}


def _sizes(files: Iterable[Path]) -> list[list[str | int]]:
    return [[file.name, file.stat().st_size] for file in files]


def find_state(
    states: States, config: TrainConfig, identity: Mapping[str, Any], world: int
) -> tuple[Path, Progress] | None:
    """The state to continue from, with its folder; None for a new run.

    Raises:
        ValueError: the named state is damaged, the states are those of another run, or there are states and
            `--resume never` is set.
    """
    if config.resume == "never":
        if states.steps():
            raise ValueError(
                f"{states.folder.parent} holds saved states of a run; choose another --output_path, or continue it "
                "with --resume auto."
            )
        return None
    place = states.latest() if config.resume == "auto" else Path(config.resume)
    if place is None:
        return None
    try:
        progress = read_progress(place)
    except StateError as error:
        raise StateError(f"--resume {config.resume}: {error}") from error
    require_same(progress, identity, world, config.resume_force)
    return place, progress


def require_same(progress: Progress, run: Mapping[str, Any], world: int, force: bool) -> None:
    """Refuse to continue a run with other data or settings that decide the result, unless forced.

    Raises:
        StateError: something differs; it is named.
    """
    before, now = {**progress.run, "processes": progress.world}, {**run, "processes": world}
    changed = [name for name in now | before if now.get(name) != before.get(name)]
    if not changed:
        return
    changes = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed)
    if not force:
        raise StateError(
            f"The run at step {progress.step} cannot be continued: {changes}. Set it back, choose another "
            "--output_path, or continue all the same with --resume_force."
        )
    log.warning("Continuing a run with other settings: %s.", changes)


def require_space(folder: Path, needed: int, keep_free: float) -> None:
    """Raise OSError when the disk of `folder` has not `needed` bytes and `keep_free` GB more."""
    free = shutil.disk_usage(folder).free
    if free < needed + keep_free * GIB:
        raise OSError(
            f"{folder} needs {gigabytes(needed, 2)} and {keep_free:g} GB besides (--min_free_gb), but its disk has "
            f"{gigabytes(free, 2)} free."
        )


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            total.update(block)
    return total.hexdigest()


def _write_manifest(folder: Path) -> None:
    """Flush all files of `folder` to the disk and describe them in a manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {}
    for file in files:
        sync_file(file)
        entries[file.relative_to(folder).as_posix()] = {"size": file.stat().st_size, "sha256": digest(file)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": entries}, indent=1), encoding="utf-8")
    sync_file(manifest)
    sync_folder(folder)
