"""The output folder of a run: what `--task sft:data_process` records there, and how other runs are kept out."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from wan_core.atomic import clean, locked, replacing

from ..config import TrainConfig
from ..export import WEIGHTS, Exporter
from ..flags import ConfigError, from_json, read_json
from .events import read_events
from .validate import CHART, EVENTS, SAMPLES

log = logging.getLogger("wancore")

RECORD = "data_process.json"

CACHE_SETTINGS = (
    "dataset_base_path", "dataset_metadata_path", "data_file_keys", "height", "width", "max_pixels", "num_frames",
    "fps", "frame_pick", "short_clip", "on_bad_sample", "cache_dir",
)  # fmt: skip
"""Settings that the second command takes from the first, because they decide what is in the cache."""


def record_data(config: TrainConfig) -> Path:
    """Write down, in the output folder of `config`, which data was encoded there. Returns the file."""
    recorded = {name: value for name, value in config.resolved().items() if name in CACHE_SETTINGS}
    recorded |= {"dataset_base_path": _absolute(config.dataset_base_path), "cache_dir": _absolute(config.cache_folder)}
    if config.dataset_metadata_path is not None:
        recorded["dataset_metadata_path"] = _absolute(config.dataset_metadata_path)
    file = Path(config.output_path) / RECORD
    with replacing(file) as partial:
        partial.write_text(json.dumps(recorded, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def with_recorded_data(config: TrainConfig) -> TrainConfig:
    """`config` with the data of its first command, where it is the second of two; else as it is.

    Raises:
        ConfigError: no data was encoded in its `--dataset_base_path`.
    """
    if config.task != "sft:train":
        return config
    file = Path(config.dataset_base_path).expanduser() / RECORD
    if not file.is_file():
        raise ConfigError(
            f"--task sft:train: no data was encoded in {config.dataset_base_path or 'the current folder'}; name the "
            "--output_path of a run with --task sft:data_process, or leave out --task to do both at once."
        )
    kept = {name: value for name, value in read_json(file).items() if name in CACHE_SETTINGS}
    recorded = from_json(TrainConfig, kept, str(file))
    log.info("Training on %s, as it was encoded in %s.", recorded.get("dataset_base_path"), file.parent)
    return replace(config, **recorded, task="sft")


def _absolute(path: str | Path) -> str:
    return str(Path(path).expanduser().resolve())


FIRST_SAMPLES, CONFIG = "first_samples", "config.json"

RUN_SETTINGS = frozenset({"output_path", "dataset_base_path", "learning_rate", "lora_base_model", "trainable_models"})
"""Settings by which a file of settings is recognised as ours."""


@contextmanager
def locked_output(folder: Path) -> Iterator[None]:
    """Make `folder`, keep other trainings out of it, and remove the unfinished files of killed ones.

    Raises:
        ValueError: another training is running there, or the folder cannot be written to.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mine = stack.enter_context(locked(folder / EVENTS))
        except OSError as error:
            raise ValueError(f"--output_path {folder} cannot be made or written to ({error}).") from error
        if not mine:
            raise ValueError(
                f"Another training is at work in --output_path {folder}. Wait for its end, stop it, or choose another "
                "--output_path."
            )
        for place in (folder, folder / SAMPLES, folder / FIRST_SAMPLES):
            clean(place)
        yield


def record_settings(config: TrainConfig, file: Path) -> None:
    """Write all settings for the user to read. On a full disk this only logs a warning."""
    try:
        config.save_json(file)
    except OSError as error:
        log.warning("The settings cannot be written to %s (%s).", file, error)


def run_id(identity: Mapping[str, Any]) -> str:
    """A name for a run that files can carry."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def require_own_outputs(folder: Path, identity: Mapping[str, Any]) -> None:
    """Raise ValueError when `folder` holds files of another run, or of another kind, under names that this one uses."""
    if os.path.lexists(folder / CONFIG) and not _is_record(folder / CONFIG):
        raise ValueError(
            f"{folder / CONFIG} exists already and is not the record of a training; nothing is overwritten. Choose "
            "another --output_path or move it away."
        )
    chart = folder / CHART
    # A record alone is enough, because events may be damaged.
    is_ours = (folder / CONFIG).exists() or any(event["event"] == "step" for event in read_events(folder / EVENTS))
    if chart.is_file() and not is_ours:
        raise ValueError(
            f"{chart} exists already and no training was in {folder}; nothing is overwritten. Choose another "
            "--output_path or move it away."
        )
    for file in sorted(folder.glob("*.safetensors")):
        if WEIGHTS.fullmatch(file.name):
            Exporter.require_own(file, run_id(identity))


def _is_record(file: Path) -> bool:
    """Whether a training of ours wrote its settings into `file`."""
    try:
        found = read_json(file)
    except ValueError:
        return False
    return isinstance(found, dict) and found.keys() >= RUN_SETTINGS
