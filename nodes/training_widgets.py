"""What the training nodes share: flags of the trainer as widgets, and where runs are."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from wan_core.media import frames_to_tensor
from wan_core.settings import check_number

from ..trainer.config import TrainConfig
from ..trainer.flags import flag_type
from . import host, sockets
from .places import plain_name

RUNS = "training"
"""Below the output folder: a folder for each run."""

LARGEST = 10**9

WIDER = ("batch_size", "dataset_repeat", "gradient_accumulation_steps", "lora_rank", "num_epochs")
"""Flags whose widgets keep the range that they were published with; the trainer refuses what is above its own."""

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def widget(name: str, default: Any = None, tooltip: str = "") -> sockets.Declaration:
    """The flag `name` of the trainer as a widget. What may be left out on the command line is 0 or empty here."""
    options = FIELDS[name].metadata
    kind, optional = flag_type(FIELDS[name])
    value = FIELDS[name].default if default is None else default
    text = tooltip or f"{options['help'][:1].upper()}{options['help'][1:]}."
    if optional and not tooltip:
        text += " 0: none." if kind in (int, float) else " Empty: none."
    if kind is bool:
        return sockets.flag(value, text)
    if options["choices"] and kind is str:
        return sockets.choice(list(options["choices"]), value, text)
    if kind in (int, float):
        low = 0 if optional or not options["low"] else options["low"]
        high = LARGEST if name in WIDER else min(options["high"], LARGEST)
        if kind is int:
            return sockets.whole(value or 0, int(low), int(high), text)
        declared = sockets.number(float(value or 0), float(low), float(high), text, step=1e-5)
        return declared[0], {**declared[1], "round": 1e-9}
    return sockets.line(",".join(value) if isinstance(value, tuple) else value or "", text)


def settings_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the widgets' values that are flags; 0 or empty stands for none where a flag may be left out."""
    found = {}
    for name, value in values.items():
        if name in FIELDS and value is not None:
            optional = flag_type(FIELDS[name])[1]
            found[name] = None if optional and value in (0, "") else value
    return found


def check_widgets(cls: type, values: Mapping[str, Any]) -> None:
    """Raise ValueError when a value is outside of its widget's range or list.

    ComfyUI leaves this to a node whose VALIDATE_INPUTS takes every input, and never checks values of links.
    """
    declared = cls.INPUT_TYPES()
    for name, (kind, options) in {**declared["required"], **declared.get("optional", {})}.items():
        value = values.get(name)
        if isinstance(kind, list) and value is not None:
            if value not in kind:
                raise ValueError(f"Value not in list: {name}: {value!r:.200}. Known: {', '.join(kind)}")
        elif kind in ("INT", "FLOAT") and value is not None:
            check_number(name, value, low=options["min"], high=options["max"])


def defaults(cls: type) -> dict[str, Any]:
    """The default of every widget of a node."""
    declared = cls.INPUT_TYPES()
    rows = {**declared["required"], **declared.get("optional", {})}
    return {name: options["default"] for name, (_, options) in rows.items() if "default" in options}


def run_folder(name: str) -> Path:
    """The folder of the run called `name`.

    Raises:
        ValueError: the name is none.
    """
    return host.output_dir().absolute() / RUNS / plain_name("name", name)


def image(pictures: Sequence[Image.Image]) -> Tensor:
    """IMAGE (T, H, W, 3)."""
    return frames_to_tensor(pictures)


def true_or_message(check: Callable[[], object]) -> bool | str:
    """What VALIDATE_INPUTS returns: True, or why `check` refuses."""
    try:
        check()
    except ValueError as error:
        return str(error)
    return True
