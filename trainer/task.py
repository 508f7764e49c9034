"""Training in two commands, as the reference's `--task` splits it: `sft:data_process` encodes the data into its output
folder, `sft:train` names that folder as its data.

What is encoded is the cache that every run keeps. The record beside it says which data that was, and how it was read.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path

from wan_core.atomic import replacing

from .config import TrainConfig
from .flags import ConfigError, from_json, read_json

log = logging.getLogger("wancore")

RECORD = "data_process.json"

RECORDED = (
    "dataset_base_path", "dataset_metadata_path", "data_file_keys", "height", "width", "max_pixels", "num_frames",
    "fps", "frame_pick", "short_clip", "on_bad_sample", "cache_dir",
)  # fmt: skip
"""Settings of the second command that are those of the first: they decide what is in the cache."""


def record(config: TrainConfig) -> Path:
    """Write down, in the output folder of `config`, which data was encoded there. Returns the file."""
    told = {name: value for name, value in config.resolved().items() if name in RECORDED}
    told |= {"dataset_base_path": _absolute(config.dataset_base_path), "cache_dir": _absolute(config.cache_folder)}
    if config.dataset_metadata_path is not None:
        told["dataset_metadata_path"] = _absolute(config.dataset_metadata_path)
    file = Path(config.output_path) / RECORD
    with replacing(file) as partial:
        partial.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
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
    kept = {name: value for name, value in read_json(file).items() if name in RECORDED}
    told = from_json(TrainConfig, kept, str(file))
    log.info("Training on %s, as it was encoded in %s.", told.get("dataset_base_path"), file.parent)
    return replace(config, **told, task="sft")


def _absolute(path: str | Path) -> str:
    return str(Path(path).expanduser().resolve())
