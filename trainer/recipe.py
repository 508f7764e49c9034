"""`python -m trainer.recipe ROW lora|full`: the arguments with which the reference trains each published checkpoint."""

import sys
from pathlib import Path
from runpy import run_path

if __name__ == "__main__":  # before the imports below, which need the names of the pack's packages
    run_path(str(Path(__file__).resolve().parents[1] / "pack.py"))["run_file"](__file__)

import argparse
import difflib
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wan_core.catalog import (
    CATALOG,
    DIT_PATTERN,
    IMAGE_ENCODER_PATTERN,
    TEXT_ENCODER_PATTERN,
    CatalogRow,
    Task,
)
from wan_core.loading.pairs import BOTH, EXPERTS

from .config import TrainConfig, parse
from .objective import expert_range

MODES = ("lora", "full")
DATA_FOLDER = "data/example_video_dataset"
LARGE_LAUNCHER = "zero2_offload"
"""The configuration of `trainer/accelerate` by which whole 14B models are trained."""

Flags = Mapping[str, Any]

SHARED: Flags = {"dataset_base_path": DATA_FOLDER, "height": 480, "width": 832, "num_frames": 81, "dataset_repeat": 100}

BY_MODE: Mapping[str, Flags] = {
    "full": {
        "learning_rate": 1e-5,
        "num_epochs": 2,
        "trainable_models": ("dit",),
        "remove_prefix_in_ckpt": "pipe.dit.",
    },
    "lora": {
        "learning_rate": 1e-4,
        "num_epochs": 5,
        "lora_base_model": "dit",
        "lora_target_modules": ("q", "k", "v", "o", "ffn.0", "ffn.2"),
        "lora_rank": 32,
        "remove_prefix_in_ckpt": "pipe.dit.",
    },
}


@dataclass(frozen=True, kw_only=True)
class TaskFlags:
    """What the checkpoints of one task are trained with.

    Attributes:
        metadata: the file of the reference's example data.
        inputs: what they take besides the prompt.
        columns: columns that hold files; empty for the default.
        flags: further flags of both modes.
        full, lora: flags of one mode.
    """

    metadata: str = "metadata.csv"
    inputs: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    flags: Flags = field(default_factory=dict)
    full: Flags = field(default_factory=dict)
    lora: Flags = field(default_factory=dict)


TASKS: Mapping[Task, TaskFlags] = {
    "text": TaskFlags(),
    "image": TaskFlags(inputs=("input_image",)),
    "first_last": TaskFlags(inputs=("input_image", "end_image")),
    "control": TaskFlags(
        metadata="metadata_control.csv", inputs=("control_video",), columns=("video", "control_video")
    ),
    "control_reference": TaskFlags(
        metadata="metadata_reference_control.csv",
        inputs=("control_video", "reference_image"),
        columns=("video", "control_video", "reference_image"),
    ),
    "camera": TaskFlags(
        metadata="metadata_camera_control.csv",
        inputs=("input_image", "camera_control_direction", "camera_control_speed"),
        lora={"learning_rate": 1e-5},
    ),
    "vace": TaskFlags(
        metadata="metadata_vace.csv",
        inputs=("vace_video", "vace_reference_image"),
        columns=("video", "vace_video", "vace_reference_image"),
        flags={"remove_prefix_in_ckpt": "pipe.vace.", "use_gradient_checkpointing_offload": True},
        full={"trainable_models": ("vace",), "learning_rate": 5e-5},
        lora={"lora_base_model": "vace"},
    ),
    "speed": TaskFlags(
        metadata="metadata_motion_bucket_id.csv",
        inputs=("motion_bucket_id",),
        full={"trainable_models": ("motion_controller",), "remove_prefix_in_ckpt": "pipe.motion_controller."},
    ),
}
"""By the task of a checkpoint. Exceptions of one checkpoint are in its catalog row."""


@dataclass(frozen=True)
class Recipe:
    """One way to train one checkpoint.

    Attributes:
        row: the checkpoint.
        mode: "lora" or "full".
        expert: of a pair, the one that is trained, of `EXPERTS`, or both; else None.
        flags: settings of `config.TrainConfig` by name; what is left out has its default.
        launcher: configuration of `trainer/accelerate` that it is launched with; None is one process.
    """

    row: CatalogRow
    mode: str
    expert: str | None
    flags: Flags
    launcher: str | None

    def words(self) -> list[str]:
        """The flags as words of a command line."""
        found = []
        for name, value in self.flags.items():
            found.append(f"--{name}")
            if value is not True:
                found.append(",".join(value) if isinstance(value, tuple) else str(value))
        return found


def find_row(name: str) -> CatalogRow:
    """The published checkpoint called `name`, with or without its organisation.

    Raises:
        ValueError: there is none; the nearest is named.
    """
    known = {spelling.lower(): row for row in CATALOG for spelling in (row.model_id, row.short_name)}
    row = known.get(name.lower())
    if row is None:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        meant = f"Did you mean {known[near[0]].short_name}?" if near else "Known are:"
        rows = "" if near else f" {', '.join(row.short_name for row in CATALOG)}."
        raise ValueError(f"There is no recipe for {name!r}. {meant}{rows}")
    return row


def recipes(name: str, mode: str, expert: str | None = None) -> tuple[Recipe, ...]:
    """How the checkpoint called `name` is trained as `mode`, "lora" or "full": of a pair one recipe for each expert,
    that for high noise first, or only that for `expert`, or one for both in a single run.

    Raises:
        ValueError: there is no such checkpoint, mode or expert.
    """
    if mode not in MODES:
        raise ValueError(f"A recipe is one of {', '.join(MODES)}; got {mode!r}.")
    row = find_row(name)
    if expert is not None and not row.is_pair:
        raise ValueError(f"{row.short_name} is one model, not a pair of experts; leave --expert out.")
    if expert not in (None, *EXPERTS, BOTH):
        raise ValueError(f"An expert is one of {', '.join((*EXPERTS, BOTH))}; got {expert!r}.")
    if not row.is_pair or expert == BOTH:
        return (_recipe(row, mode, expert),)
    return tuple(_recipe(row, mode, one) for one in EXPERTS if expert in (None, one))


def _recipe(row: CatalogRow, mode: str, expert: str | None) -> Recipe:
    task = TASKS[row.task]
    kind = f"{expert}_noise_{mode}" if expert in EXPERTS else mode
    flags = {
        **SHARED,
        "dataset_metadata_path": f"{DATA_FOLDER}/{task.metadata}",
        **({"data_file_keys": task.columns} if task.columns else {}),
        **({"extra_inputs": task.inputs} if task.inputs else {}),
        "model_id_with_origin_paths": _files(row, expert),
        "output_path": f"./models/train/{row.short_name}_{kind}",
        **BY_MODE[mode],
        **task.flags,
        **getattr(task, mode),
        **row.training.get(mode, {}),
        **_range(row, expert),
    }
    is_sharded = row.size == "14B" and mode == "full" and expert != BOTH
    return Recipe(row, mode, expert, flags, LARGE_LAUNCHER if is_sharded else None)


def _range(row: CatalogRow, expert: str | None) -> Flags:
    """The timesteps of one expert, split where its authors do when they sample."""
    if row.boundary is None or expert == BOTH:
        return {}
    low, high = expert_range(expert == EXPERTS[0], row.boundary, TrainConfig.timestep_shift)
    return {"min_timestep_boundary": low, "max_timestep_boundary": high}


def _files(row: CatalogRow, expert: str | None) -> tuple[str, ...]:
    """`--model_id_with_origin_paths`: the row's own files, of a pair those of the experts that are trained, after those
    of the model that it is an adapter for.
    """
    home = row.base or row.model_id
    dits = [row.files[number] for number, one in enumerate(EXPERTS) if expert in (one, BOTH)] or [DIT_PATTERN]
    patterns = [*dits, TEXT_ENCODER_PATTERN, row.vae[1]]
    patterns += [IMAGE_ENCODER_PATTERN] * row.needs_image_encoder
    own = [f"{row.model_id}:{pattern}" for pattern in row.files] if row.base else []
    return (*(f"{home}:{pattern}" for pattern in patterns), *own)


LAUNCHERS = Path(__file__).parent / "accelerate"
TRAIN = Path(__file__).parent / "train.py"
NONE = "none"
ONE_EXPERT = (
    "--output_path", "--resume", "--min_timestep_boundary", "--max_timestep_boundary", "--model_paths",
    "--model_id_with_origin_paths", "--lora_checkpoint", "--resume_from_checkpoint",
)  # fmt: skip
"""Flags that cannot be the same for both experts of a pair."""


def command(found: Recipe, overrides: Sequence[str] = (), launcher: str | None = None) -> list[str]:
    """The command that trains by a recipe.

    Args:
        overrides: further flags of `trainer.train`.
        launcher: the name of a file in `trainer/accelerate`, or "none" for one process; None is the recipe's own.

    Raises:
        ValueError: a flag is unknown or cannot be used.
    """
    words = [*found.words(), *overrides]
    parse(words)
    chosen = found.launcher if launcher is None else launcher
    begin = [sys.executable]
    if chosen and chosen != NONE:
        begin += ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCHERS / f"{chosen}.yaml")]
    return [*begin, str(TRAIN), *words]


def run(words: Sequence[str]) -> tuple[int, bool]:
    """Run a command to its end. Returns its exit code, and whether it was asked to stop: by Ctrl-C or SIGTERM, which
    are the command's to obey.
    """
    child = subprocess.Popen(words)
    asked = []

    def stop(number: int, frame: object) -> None:
        asked.append(number)
        # A terminal sends Ctrl-C to the child as well.
        if number == signal.SIGTERM:
            child.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return child.wait(), bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None, prog: str = "python -m trainer.recipe") -> int:
    """The command, which its help calls `prog`: the exit code of the training, 2 when it could not begin."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="rows: " + ", ".join(row.short_name for row in CATALOG), allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("row", help="a published checkpoint, with or without its organisation")
    parser.add_argument("mode", choices=MODES)
    parser.add_argument(
        "--expert",
        choices=(*EXPERTS, BOTH),
        help="of a pair, train this one only, or both in one run; without it both, one after the other",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and do not run it")
    parser.add_argument(
        "--launcher",
        choices=(NONE, *sorted(file.stem for file in LAUNCHERS.glob("*.yaml"))),
        help="configuration of trainer/accelerate to launch with; without it 14B full takes zero2_offload, others none",
    )
    arguments, overrides = parser.parse_known_args(argv)
    try:
        found = recipes(arguments.row, arguments.mode, arguments.expert)
        commands = [command(each, overrides, arguments.launcher) for each in found]
        _check_apart(found, overrides)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for words in commands:
        sys.stdout.write(f"{shlex.join(words)}\n")
        sys.stdout.flush()
        code, stopped = (0, False) if arguments.dry_run else run(words)
        if code or stopped:
            return code
    return 0


def _check_apart(found: Sequence[Recipe], overrides: Sequence[str]) -> None:
    """Raise ValueError when two experts would be trained with flags that belong to one."""
    mixed = [flag for flag in ONE_EXPERT if any(word.partition("=")[0] == flag for word in overrides)]
    if len(found) > 1 and mixed:
        raise ValueError(
            f"{found[0].row.short_name} is a pair, and {mixed[0]} would be that of both experts; train one after the "
            f"other with --expert {EXPERTS[0]} and --expert {EXPERTS[1]}."
        )
