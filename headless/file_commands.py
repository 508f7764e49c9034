"""The commands `info`, `convert` and `lora`: what model files are, and new files from them."""

import argparse
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_core import inspection
from wan_core.files import is_there
from wan_core.loading.detect import detect_files, require_kind
from wan_core.loading.save import save_plain, save_quantised
from wan_core.loading.save_gguf import MADE_TYPES, save_gguf
from wan_core.lora.apply import LoraUse
from wan_core.lora.convert import LoraFormat, extract_lora, fuse
from wan_core.lora.convert import convert as convert_loras
from wan_core.lora.target import REPLACING_KINDS, Target, lora_file_report, lora_report, open_lora, use_lora
from wan_core.lora.write import FORMATS
from wan_core.runtime import DTYPES, gigabytes

log = logging.getLogger("wancore")

Arguments = Mapping[str, Mapping[str, Any]]
"""Of a command: by name what `argparse.ArgumentParser.add_argument` is given."""

INFO_ARGUMENTS: Arguments = {
    "files": {"metavar": "FILE", "type": Path, "nargs": "+", "help": "a file, a folder or one shard"},
}

CONVERT_ARGUMENTS: Arguments = {
    "file": {"metavar": "FILE", "help": "the model: a file, a folder, or one shard of a series; .pth is fine"},
    "--part": {
        "choices": ("dit", "text_encoder", "vae", "image_encoder"),
        "help": "which model of an all-in-one file (default: the video model)",
    },
    "out": {"metavar": "OUT", "type": Path, "help": "the new file, .safetensors or .gguf; nothing is overwritten"},
}
FORM_ARGUMENTS: Arguments = {
    "--fp8": {
        "action": "store_true",
        "help": "the linear layers of the blocks as scaled FP8 (e4m3), everything else as bf16: half the size of bf16; "
        "ComfyUI and WanCore compute with it as it is; for video models and text encoders",
    },
    "--gguf": {
        "choices": MADE_TYPES,
        "help": "a GGUF file with the linear layers of the blocks packed in this type, whose name says how many bits a "
        "number takes; ComfyUI-GGUF and WanCore compute with it as it is; for video models and text encoders",
    },
    "--dtype": {"choices": tuple(DTYPES), "help": "all weights in this dtype"},
}
"""The forms that `convert` writes, exactly one of which is chosen."""

LINE_INTERVAL = 2.0
"""Seconds between two lines of progress of `convert`."""

DEFAULT_RANK = 32

LORA_ARGUMENTS: Arguments = {
    "files": {
        "metavar": "FILE[=STRENGTH]",
        "nargs": "+",
        "help": "LoRA or trained checkpoint; several are seen as stacked, or merged",
    },
    "--base": {"metavar": "FILE", "help": "the model to match with, and to extract from"},
    "--out": {"metavar": "FILE", "type": Path, "help": "write one new LoRA made of the files; nothing is overwritten"},
    "--format": {"choices": tuple(FORMATS), "default": "comfyui", "help": "whose names to write (default: comfyui)"},
    "--dtype": {"choices": tuple(DTYPES), "help": "how to store it (default: bf16; with --fuse as the model is)"},
    "--rank": {"type": int, "help": f"cut the result to this rank (default: exact; {DEFAULT_RANK} for --extract)"},
    "--fuse": {
        "metavar": "FILE",
        "help": "write this model with the LoRAs in its weights to --out, as ComfyUI loads it; a quantised one as FP8",
    },
    "--extract": {
        "action": "store_true",
        "help": "FILE is a fine-tuned checkpoint; write its difference from --base as a LoRA to --out",
    },
}


def info(arguments: argparse.Namespace) -> str:
    """The reports of all files, one after the other."""
    return "\n\n".join(str(inspection.report(path)) for path in arguments.files)


def convert(arguments: argparse.Namespace) -> str:
    """Write a model as one file; returns its path and size.

    Raises:
        ValueError: the model cannot be read, or the file cannot be written.
    """
    component = detect_files(arguments.file, (arguments.part,) if arguments.part else ())
    shown = time.monotonic()

    def report_written(done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown >= LINE_INTERVAL:
            shown = time.monotonic()
            log.info("    %s of %s", gigabytes(done, 2), gigabytes(total, 2))

    if arguments.fp8:
        path = save_quantised(component, arguments.out, report_written)
    elif arguments.gguf:
        path = save_gguf(component, arguments.out, arguments.gguf, report_written)
    else:
        path = save_plain(component, arguments.out, DTYPES[arguments.dtype], report_written)
    return f"{path} ({gigabytes(path.stat().st_size, 2)})"


def lora(arguments: argparse.Namespace) -> str:
    """Explain, convert, merge, extract or fuse LoRAs, as the flags ask; returns what to print.

    Raises:
        ValueError: a file cannot be used, or arguments do not go together.
    """
    files = [path_and_strength(text) for text in arguments.files]
    if arguments.fuse:
        if not arguments.out or arguments.extract or arguments.base or arguments.rank is not None:
            raise ValueError("--fuse takes LoRAs, a model and a new file to write, --out; it goes with --dtype alone.")
        return str(fuse(files, arguments.fuse, arguments.out, arguments.dtype))
    form = LoraFormat(arguments.format, arguments.dtype or "bf16")
    if arguments.extract:
        if len(files) != 1 or not arguments.base or not arguments.out:
            raise ValueError("--extract takes one fine-tuned checkpoint, its --base and a new file to write, --out.")
        rank = DEFAULT_RANK if arguments.rank is None else arguments.rank
        return str(extract_lora(arguments.base, files[0][0], arguments.out, form, rank=rank))
    if arguments.out:
        return str(convert_loras(files, arguments.out, form, rank=arguments.rank))
    if arguments.rank is not None:
        raise ValueError("--rank is for files that are written; name one with --out.")
    if not arguments.base:
        return "\n".join(str(lora_file_report(open_lora(path))) for path, _ in files)
    component = require_kind(detect_files(arguments.base, REPLACING_KINDS), REPLACING_KINDS)
    stacked: list[LoraUse] = []
    reports = []
    with Target.of_file(component) as target:
        for path, strength in files:
            # Each is reported on top of those before it.
            use = use_lora(path, target, strength=strength)
            reports.append(str(lora_report(use, target, stacked)))
            stacked.append(use)
    return "\n".join(reports)


def path_and_strength(text: str) -> tuple[str, float]:
    """`FILE` or `FILE=STRENGTH`; a name that exists is taken whole.

    Raises:
        ValueError: what follows the sign is no number.
    """
    path, sign, strength = text.rpartition("=")
    if not sign or is_there(Path(text)):
        return text, 1.0
    try:
        return path, float(strength)
    except ValueError:
        raise ValueError(f"{text!r}: a strength is a number, as in style.safetensors=0.8.") from None
