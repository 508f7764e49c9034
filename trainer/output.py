"""The output folder of a run: one run at a time, and nothing of anybody else's is overwritten in it."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from wan_core.atomic import clean, locked

from .config import TrainConfig
from .events import read_events
from .export import WEIGHTS, Exporter
from .watching import CHART, EVENTS, SAMPLES

log = logging.getLogger("wancore")

FIRST_SAMPLES, CONFIG = "first_samples", "config.json"

RECORDED = frozenset({"output_path", "dataset_base_path", "learning_rate", "lora_base_model", "trainable_models"})
"""Settings by which a file of all settings is known."""


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """Make `folder`, keep other trainings out of it, and remove what killed ones were writing there.

    Raises:
        ValueError: one is at work there, or the folder cannot be written to.
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
    """Write all settings down. They are there for people: a disk that is full costs a warning."""
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
    if chart.is_file() and not any(event["event"] == "step" for event in read_events(folder / EVENTS)):
        raise ValueError(
            f"{chart} exists already and no training was in {folder}; nothing is overwritten. Choose another "
            "--output_path or move it away."
        )
    for file in sorted(folder.glob("*.safetensors")):
        if WEIGHTS.fullmatch(file.name):
            Exporter.require_own(file, run_id(identity))


def _is_record(file: Path) -> bool:
    """Whether a training of ours wrote its settings into `file`."""
    if not file.is_file():
        return False
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.keys() >= RECORDED
