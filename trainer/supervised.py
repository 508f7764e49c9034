"""A training run that ends when the program that started it does.

It is `trainer.train` with one difference: its standard input is a pipe from that program. When the pipe closes, the run
finishes its step, saves and ends, so that nothing is left behind that holds the GPU."""

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from . import train
from .config import TrainConfig, parse
from .flags import ConfigError

PATIENCE = 600
"""Seconds that a run which is left alone has for its step and its save."""

ABANDONED = 3


def stop_file(config: TrainConfig) -> Path:
    """The file whose appearance ends the run of `config`."""
    return Path(config.stop_file or Path(config.output_path) / "stop")


def main(argv: Sequence[str]) -> int:
    """The command; exit codes are those of `train`."""
    try:
        file = stop_file(parse(argv))
    except ConfigError:
        return train.main(argv)
    threading.Thread(target=_end_with, args=(sys.stdin.fileno(), file), daemon=True).start()
    return train.main(argv)


def _end_with(pipe: int, file: Path) -> None:
    """Ask the run to stop when `pipe` closes, and leave when it does not."""
    # Not through sys.stdin, whose lock a thread that waits for it would hold when the interpreter ends.
    while os.read(pipe, 1024):
        pass
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    time.sleep(PATIENCE)
    os._exit(ABANDONED)
