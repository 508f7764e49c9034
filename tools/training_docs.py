"""`python -m tools.training_docs`: write the tables of docs/training.md from the settings and the recipes."""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from pack import ROOT
from wan_core.catalog import CATALOG
from wancore.trainer.config import TrainConfig
from wancore.trainer.data.clips import INPUTS
from wancore.trainer.flags import REFERENCE_FLAGS, REFUSED_FLAGS, flag_type
from wancore.trainer.optimizers import PACKAGES
from wancore.trainer.recipe import MODES, TASKS
from wancore.trainer.recipe import recipes as recipes_of

SECTIONS = {
    "Data": "dataset_base_path",
    "Models": "model_paths",
    "What is trained": "trainable_models",
    "How": "learning_rate",
    "Writing and watching": "output_path",
}
"""Heading to the first setting under it, in the order of the settings."""


FILE = ROOT / "docs" / "training.md"


def fill_tables(text: str) -> str:
    """`text` with each table between `<!-- NAME -->` and `<!-- end -->` written again."""
    tables = {"flags": flags, "inputs": inputs, "optimizers": optimizers, "recipes": recipes, "reference": reference}

    def table(match: re.Match[str]) -> str:
        lines = "\n".join(tables[match[1]]())
        return f"<!-- {match[1]} -->\n{lines}\n<!-- end -->"

    return re.sub(rf"<!-- ({'|'.join(tables)}) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def flags() -> Iterator[str]:
    """Every setting of a run: its flag, its default, what it does."""
    begins = {first: heading for heading, first in SECTIONS.items()}
    for field in dataclasses.fields(TrainConfig):
        if field.name in begins:
            yield from ("", f"**{begins[field.name]}**", "", *_head("Flag", "Default", "Meaning"))
        names = ", ".join(f"`--{name}`" for name in (field.name, *field.metadata["aliases"]))
        choices = field.metadata["choices"] if flag_type(field)[0] is str else ()
        meaning = f"{field.metadata['help']}{': ' if choices else ''}{', '.join(f'`{c}`' for c in choices)}"
        yield _row(names, _value(field.default), meaning)


def reference() -> Iterator[str]:
    """Every flag of the reference that is no setting: what it stands for, or why it is refused."""
    yield from _head("Flag", "Here")
    for name, flag in REFERENCE_FLAGS.items():
        yield _row(f"`--{name}`", flag.note)
    for name, instead in REFUSED_FLAGS.items():
        yield _row(f"`--{name}`", f"refused: {instead}")


def inputs() -> Iterator[str]:
    """Every extra input, and where it is read from."""
    yield from _head("Input", "From", "What it is")
    for row in INPUTS.values():
        yield _row(f"`{row.name}`", f"column `{row.column}`" if row.column else "the clip itself", row.help)


def optimizers() -> Iterator[str]:
    """Every optimizer that a run may name, by the package that it comes from."""
    yield from _head("Module", "Package", "Classes")
    for module, (package, names) in PACKAGES.items():
        yield _row(f"`{module}`", f"`{package}`", ", ".join(f"`{name}`" for name in names))


def recipes() -> Iterator[str]:
    """Every published checkpoint: what is trained and with what."""
    yield from _head("Row", "Extra inputs", "Mode", "Trained", "Learning rate", "Epochs", "Frames", "Launched with")
    for row in CATALOG:
        names = ", ".join(f"`{name}`" for name in TASKS[row.task].inputs) or "none"
        for mode in MODES:
            found = recipes_of(row.model_id, mode)[0]
            trained = found.flags.get("lora_base_model") or found.flags["trainable_models"][0]
            rate, epochs, frames = (found.flags[name] for name in ("learning_rate", "num_epochs", "num_frames"))
            first = mode == MODES[0]
            yield _row(
                f"`{row.short_name}`" if first else "", names if first else "", mode, f"`{trained}`", f"{rate:g}",
                str(epochs), str(frames), f"`{found.launcher}`" if found.launcher else "one process",
            )  # fmt: skip


def _head(*titles: str) -> list[str]:
    return [_row(*titles), "|-" * len(titles) + "|"]


def _row(*cells: str) -> str:
    escaped: Sequence[str] = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _value(value: object) -> str:
    if value is None or value == () or value == "":
        return ""
    return f"`{','.join(value) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    FILE.write_text(fill_tables(FILE.read_text(encoding="utf-8")), encoding="utf-8")
