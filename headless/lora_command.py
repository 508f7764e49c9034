"""`python -m headless lora`: what a LoRA is and does, converting, merging, extracting, fusing into a model."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_core.loading.detect import detect_files, require_kind
from wan_core.lora.apply import LoraUse
from wan_core.lora.convert import LoraFormat, convert, extract_lora, fuse
from wan_core.lora.report import LoraReport
from wan_core.lora.target import REPLACING_KINDS, Target, lora_file_report, lora_report, open_lora, use_lora
from wan_core.lora.write import FORMATS
from wan_core.runtime import DTYPES

HELP = "Say what LoRA files are and what they do to a model; convert, merge or extract them, or fuse them into it."
DEFAULT_RANK = 32

LORA_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
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


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    for flag, options in LORA_ARGUMENTS.items():
        parser.add_argument(flag, **options)


def answer(arguments: argparse.Namespace) -> str:
    """Do what was asked; returns what to print.

    Raises:
        ValueError: a file cannot be used, or arguments do not go together.
    """
    files = [with_strength(text) for text in arguments.files]
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
        return str(convert(files, arguments.out, form, rank=arguments.rank))
    if arguments.rank is not None:
        raise ValueError("--rank is for files that are written; name one with --out.")
    if arguments.base:
        return "\n".join(map(str, _reports(files, arguments.base)))
    return "\n".join(str(lora_file_report(open_lora(path))) for path, _ in files)


def with_strength(text: str) -> tuple[str, float]:
    """`FILE` or `FILE=STRENGTH`; a name that exists is taken whole.

    Raises:
        ValueError: what follows the sign is no number.
    """
    path, sign, strength = text.rpartition("=")
    if not sign or Path(text).exists():
        return text, 1.0
    try:
        return path, float(strength)
    except ValueError:
        raise ValueError(f"{text!r}: a strength is a number, as in style.safetensors=0.8.") from None


def _reports(files: list[tuple[str, float]], base: str) -> list[LoraReport]:
    """What each file does to the model at `base`, on top of those before it."""
    component = require_kind(detect_files(base, REPLACING_KINDS), REPLACING_KINDS)
    stacked: list[LoraUse] = []
    reports = []
    with Target.of_file(component) as target:
        for path, strength in files:
            use = use_lora(path, target, strength=strength)
            reports.append(lora_report(use, target, stacked))
            stacked.append(use)
    return reports
