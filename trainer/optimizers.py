"""The optimizers that a run may name. Only these classes are imported: a name in a settings file, in a workflow or on
the command line is looked up here first, so that none of them can load another module.
"""

import importlib
import re
from collections.abc import Mapping
from typing import Any

PACKAGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "torch.optim": (
        "torch",
        ("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "Muon", "NAdam", "RAdam", "RMSprop",
         "Rprop", "SGD"),
    ),
    "bitsandbytes.optim": (
        "bitsandbytes",
        ("Adam", "Adam8bit", "Adam32bit", "PagedAdam", "PagedAdam8bit", "PagedAdam32bit", "AdamW", "AdamW8bit",
         "AdamW32bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit", "AdEMAMix", "AdEMAMix8bit",
         "PagedAdEMAMix8bit", "Lion", "Lion8bit", "PagedLion", "PagedLion8bit", "RMSprop8bit", "SGD8bit"),
    ),
    "torchao.optim": ("torchao", ("Adam8bit", "Adam4bit", "AdamFp8", "AdamW8bit", "AdamW4bit", "AdamWFp8")),
    "deepspeed.ops.adam": ("deepspeed", ("DeepSpeedCPUAdam", "FusedAdam")),
    "schedulefree": ("schedulefree", ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")),
    "prodigyopt": ("prodigyopt", ("Prodigy",)),
    "lion_pytorch": ("lion-pytorch", ("Lion",)),
    "came_pytorch": ("came-pytorch", ("CAME",)),
    "dadaptation": ("dadaptation", ("DAdaptAdam", "DAdaptLion", "DAdaptSGD")),
}  # fmt: skip
"""By module: the package to install for it, and its classes."""

OPTIMIZERS: Mapping[str, str] = {
    f"{module}.{name}": package for module, (package, names) in PACKAGES.items() for name in names
}
"""Dotted names of the classes, and the package that each comes from."""

WORD = re.compile(r"[A-Za-z0-9_-]{1,32}")
LARGEST = 1e30
"""Numbers beyond it, and those that are none, are no argument of an optimizer."""
GIVEN = ("params", "lr", "weight_decay")
"""Arguments that have flags of their own or come from the run."""


def check(name: str, arguments: Mapping[str, Any] | None) -> None:
    """Look at an optimizer's name and arguments, and import nothing.

    Raises:
        ValueError: the class is none of OPTIMIZERS, or an argument is no number, true, false, null, short word, or list
            of numbers.
    """
    if name not in OPTIMIZERS:
        modules = "; ".join(f"{module}.{{{', '.join(names)}}}" for module, (_, names) in PACKAGES.items())
        raise ValueError(f"--optimizer {name!r} is not one of the optimizers that can be named: {modules}.")
    for key, value in (arguments or {}).items():
        if not isinstance(key, str) or not key.isidentifier() or key in GIVEN:
            raise ValueError(
                f"--optimizer_args: {key!r} is no further argument of an optimizer; parameters come from the run, "
                "the others from --learning_rate and --weight_decay."
            )
        items = value if isinstance(value, (list, tuple)) else [value]
        if len(items) > 16 or not all(_is_plain(item, word=items is not value) for item in items):
            raise ValueError(
                f"--optimizer_args: {key} must be a number up to 1e30, true, false, null, a short word or a list of "
                f"numbers; got {value!r:.200}."
            )


def load(name: str) -> type:
    """The class of that name.

    Raises:
        ValueError: it is none of OPTIMIZERS, or its package is not installed or has no such class.
    """
    check(name, None)
    module, _, cls = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"--optimizer {name} is not in this Python ({error}): pip install -U {OPTIMIZERS[name]}."
        ) from error


def _is_plain(value: Any, *, word: bool) -> bool:
    if isinstance(value, (int, float)):
        return abs(value) <= LARGEST
    return value is None or (word and bool(WORD.fullmatch(str(value))))
