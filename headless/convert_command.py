"""`python -m headless convert`: model files to one safetensors file, in FP8 or in another dtype."""

import argparse
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_core.loading.detect import detect_files
from wan_core.loading.save import save_plain, save_quantised
from wan_core.runtime import DTYPES, gigabytes

log = logging.getLogger("wancore")

HELP = "Write a model as one safetensors file, in FP8 or in another dtype, from any file this library reads."
KINDS = ("dit", "text_encoder", "vae", "image_encoder")
LINE_INTERVAL = 2.0
"""Seconds between two lines of progress."""

FP8_HELP = (
    "the linear layers of the blocks as scaled FP8 (e4m3), the rest as bf16: half the size of bf16; ComfyUI and "
    "WanCore compute with it as it is; for video models and text encoders"
)
CONVERT_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "file": {"metavar": "FILE", "help": "the model: a file, a folder, or one shard of a series; .pth is fine"},
    "--part": {"choices": KINDS, "help": "which model of an all-in-one file (default: the video model)"},
    "out": {"metavar": "OUT", "type": Path, "help": "the new .safetensors file; nothing is overwritten"},
}
FORM_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "--fp8": {"action": "store_true", "help": FP8_HELP},
    "--dtype": {"choices": tuple(DTYPES), "help": "all weights in this dtype"},
}


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    for flag, options in CONVERT_ARGUMENTS.items():
        parser.add_argument(flag, **options)
    form = parser.add_mutually_exclusive_group(required=True)
    for flag, options in FORM_ARGUMENTS.items():
        form.add_argument(flag, **options)


def answer(arguments: argparse.Namespace) -> str:
    """Write the file; returns its path and size.

    Raises:
        ValueError: the model cannot be read, or the file cannot be written.
    """
    component = detect_files(arguments.file, (arguments.part,) if arguments.part else ())
    report = Report()
    if arguments.fp8:
        path = save_quantised(component, arguments.out, report)
    else:
        path = save_plain(component, arguments.out, DTYPES[arguments.dtype], report)
    return f"{path} ({gigabytes(path.stat().st_size, 2)})"


class Report:
    """Tells how much is written, a line every few seconds."""

    def __init__(self) -> None:
        self.shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.shown >= LINE_INTERVAL:
            self.shown = now
            log.info("    %s of %s", gigabytes(done, 2), gigabytes(total, 2))
