"""Trained weights as files that inference loads, each read again and compared after it is written."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from wan_core.atomic import replacing, sync_folder
from wan_core.loading.detect import detect_files
from wan_core.loading.pairs import Side
from wan_core.loading.tensor_files import read_header, write_safetensors
from wan_core.lora.convert import LoraFormat, lora_metadata, write_lora
from wan_core.lora.target import Target, bind_to, open_lora
from wan_core.lora.write import Merged
from wan_core.runtime import DTYPES

from .config import TrainConfig
from .model.trainable import Trainable, Trainables, lora_patches

log = logging.getLogger("wancore")

WEIGHTS = re.compile(r"(epoch|step)-\d+(\.\w+)*\.safetensors")
"""The names of files of weights."""

STEP = "ss_steps"
"""Metadata key of the step after which a file was written."""

RUN = "wancore.run"
"""Metadata key of the run that wrote a file; only that run may replace it."""


class ExportError(RuntimeError):
    """A file differs from what was written when it is read again."""


@dataclass(frozen=True)
class Exporter:
    """Writes the parts of a run into its output folder.

    Attributes:
        config: settings of the run.
        trainables: what is trained.
        run: identity of the run, as files carry it.
    """

    config: TrainConfig
    trainables: Trainables
    run: str

    @property
    def folder(self) -> Path:
        return Path(self.config.output_path)

    def paths(self, stem: str) -> dict[Path, tuple[Trainable, ...]]:
        """The files of a save, and the parts in each.

        One file for each part, because other programs load one thing from a file. One file for all parts with
        `--lora_format diffsynth`, as the reference does. A single file has the plain name `stem`. The two files of a
        pair end with the expert that each is for, by which they are read as a pair again.
        """
        parts = self.trainables.parts
        together = self.config.lora_format == "diffsynth" and any(part.is_lora for part in parts)
        kinds = {(part.name, part.is_lora) for part in parts}
        files: dict[Path, tuple[Trainable, ...]] = {}
        for part in parts:
            kind = "" if len(kinds) == 1 or together else ".lora" if part.is_lora else f".{part.name}"
            side = f".{part.expert}_noise" if part.expert else ""
            path = self.folder / f"{stem}{kind}{side}.safetensors"
            files[path] = (*files.get(path, ()), part)
        return files

    def write(self, stem: str, tensors: Mapping[str, Tensor], more: Mapping[str, str]) -> list[Path]:
        """Write every part under `stem` and return the files.

        Args:
            tensors: the trained parameters by their names in `Trainables.module`.
            more: further metadata, such as the step.

        Raises:
            OSError: the disk is full or fails; a file of that name that was there before still is.
            ExportError: what is read again differs.
            ValueError: a file of that name was not written by this run.
        """
        paths = self.paths(stem)
        for path in paths:
            self.require_own(path, self.run)
        self.folder.mkdir(parents=True, exist_ok=True)
        for path, parts in paths.items():
            metadata = {**self._metadata(parts[0].expert), **more}
            with replacing(path, sync=True) as partial:
                self._write(parts, partial, path.stem, tensors, metadata)
        sync_folder(self.folder)
        return list(paths)

    def prune(self, keep: int) -> None:
        """Remove the weights of all but the newest `keep` saves of this run."""
        steps: dict[Path, int] = {}
        for path in self.folder.glob("*.safetensors"):
            metadata = _metadata_of(path) if WEIGHTS.fullmatch(path.name) else {}
            if metadata.get(RUN) == self.run and metadata.get(STEP, "").isdigit():
                steps[path] = int(metadata[STEP])
        kept = sorted(set(steps.values()))[-keep:]
        for path, step in steps.items():
            if step not in kept:
                path.unlink()

    @staticmethod
    def require_own(path: Path, run: str) -> None:
        """Raise ValueError when there is a file at `path` that the run of that identity did not write."""
        if path.exists() and _metadata_of(path).get(RUN) != run:
            raise ValueError(
                f"{path} exists already and is not of this run; nothing is overwritten. Choose another --output_path "
                "or move it away."
            )

    def _metadata(self, expert: Side | None) -> dict[str, str]:
        boundary = self.trainables.model.boundary
        config = self.config if expert is None or boundary is None else self.config.for_expert(expert, boundary)
        metadata = {
            RUN: self.run,
            "ss_learning_rate": str(config.learning_rate),
            "ss_seed": str(config.seed),
            "modelspec.timestep_range": ",".join(str(_timestep(config, f)) for f in (
                config.max_timestep_boundary, config.min_timestep_boundary)),
        }  # fmt: skip
        if config.lora_base_model:
            alpha = config.lora_alpha or config.lora_rank
            metadata["ss_network_args"] = json.dumps(
                {"rank": config.lora_rank, "alpha": alpha, "targets": config.lora_target_modules}
            )
        return metadata

    def _write(
        self,
        parts: Sequence[Trainable],
        partial: Path,
        title: str,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
    ) -> None:
        whole = [part for part in parts if not part.is_lora]
        loras = [part for part in parts if part.is_lora]
        for part in loras:
            self._write_lora(part, partial, title, tensors, metadata)
        if whole and loras:
            self._add_whole(whole, partial, tensors)
        for part in () if loras else whole:
            self._write_whole(part, partial, title, tensors, metadata)

    def _write_lora(
        self,
        part: Trainable,
        partial: Path,
        title: str,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
    ) -> None:
        config = self.config
        patches = tuple(lora_patches(part, tensors, config.lora_alpha or config.lora_rank))
        everything = {**lora_metadata(patches, title), **metadata}
        form = LoraFormat(config.lora_format, _lora_dtype(config))
        write_lora(partial, Merged(patches), title, form, everything, {"trained": True})
        self._check_lora(part, partial, dict(patches))

    def _check_lora(self, part: Trainable, partial: Path, patches: Mapping[str, Any]) -> None:
        shapes = {name: patch.shape for name, patch in patches.items()}
        bound = bind_to(open_lora(partial), Target(self.trainables.model.name, shapes))
        found = dict(bound.patches)
        if bound.skipped or found.keys() != patches.keys():
            lacking = sorted(patches.keys() - found.keys())[:3]
            raise ExportError(f"{partial.name} lacks {lacking} when it is read again.")
        tolerance = {"bf16": 2**-7, "fp16": 2**-9, "fp32": 1e-6}[_lora_dtype(self.config)]
        for name, patch in patches.items():
            size = max(patch.norm(), 1e-30)
            if torch.linalg.vector_norm(found[name].delta() - patch.delta().cpu()) > 2 * tolerance * size:
                raise ExportError(f"{partial.name} changes {name} in another way than what was trained.")
        if not any(patch.up.any() for patch in patches.values()):
            log.warning("Every up factor of the LoRA on %s is zero: the file will change nothing.", part.name)

    def _write_whole(
        self,
        part: Trainable,
        partial: Path,
        title: str,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
    ) -> None:
        prefix = "" if self.config.remove_prefix_in_ckpt else f"pipe.{part.name}."
        everything = {"format": "pt", "modelspec.sai_model_spec": "1.0.1", "modelspec.title": title, **metadata}
        _save_checked(self._whole(part, tensors, prefix), partial, everything)
        found = detect_files(partial)
        if found.kind != part.name:
            raise ExportError(f"{partial.name} is read as a {found.kind}, not as a {part.name}.")

    def _add_whole(self, parts: Sequence[Trainable], partial: Path, tensors: Mapping[str, Tensor]) -> None:
        """Put whole weights beside the LoRA in `partial`, under the names that the reference gives them there."""
        removed = self.config.remove_prefix_in_ckpt
        # Read, not mapped: the file is written again.
        together = load(partial.read_bytes())
        for part in parts:
            named = self._whole(part, tensors, f"pipe.{part.name}.")
            together |= {name.removeprefix(removed): tensor for name, tensor in named.items()}
        _save_checked(together, partial, _metadata_of(partial))

    def _whole(self, part: Trainable, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        dtype = DTYPES["bf16" if self.config.mixed_precision == "bf16" else "fp32"]
        return {
            f"{prefix}{name}": tensors[f"{part.owner}.{name}"].detach().to("cpu", dtype).contiguous()
            for name in part.names
        }


def _save_checked(tensors: Mapping[str, Tensor], partial: Path, metadata: Mapping[str, str]) -> None:
    """Write `tensors` and read them again.

    Raises:
        ExportError: they are not what was written.
    """
    write_safetensors(partial, tensors, metadata)
    with safe_open(partial, "pt") as file:
        if set(file.keys()) != tensors.keys():
            raise ExportError(f"{partial.name} has other names than what was written.")
        for name, tensor in tensors.items():
            if not torch.equal(file.get_tensor(name), tensor):
                raise ExportError(f"{partial.name}: {name} is not what was written.")


def _metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a file; none where it cannot be read."""
    try:
        return dict(read_header([path]).metadata)
    except ValueError:
        return {}


def _lora_dtype(config: TrainConfig) -> str:
    return "bf16" if config.mixed_precision == "bf16" else "fp32"


def _timestep(config: TrainConfig, fraction: float) -> int:
    """The timestep at a fraction of the training schedule's index range."""
    place = 1 - fraction
    return round(1000 * config.timestep_shift * place / (1 + (config.timestep_shift - 1) * place))
