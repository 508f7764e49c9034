"""`python -m trainer.recipe ROW lora|full`: train a published checkpoint as the reference does.

Every flag of `trainer.train` may follow and wins over the recipe's.
"""

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import parse
from .recipes import CATALOG, MODES, Recipe, recipe, short_name

LAUNCHERS = Path(__file__).parent / "accelerate"
TRAIN = Path(__file__).parent / "train.py"
NONE = "none"


def command(found: Recipe, overrides: Sequence[str] = (), launcher: str | None = None) -> list[str]:
    """The command that trains by a recipe.

    Args:
        overrides: further flags of `trainer.train`.
        launcher: the name of a file in `trainer/accelerate`, or "none" for one process; None is the recipe's own.

    Raises:
        ValueError: a flag is unknown or cannot be used.
    """
    words = [*found.words(), *overrides]
    parse(words)
    chosen = found.launcher if launcher is None else launcher
    begin = [sys.executable]
    if chosen and chosen != NONE:
        begin += ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCHERS / f"{chosen}.yaml")]
    return [*begin, str(TRAIN), *words]


def run(words: Sequence[str]) -> int:
    """Run a command to its end and return its exit code; Ctrl-C and SIGTERM are the command's to obey."""
    child = subprocess.Popen(words)
    handlers = {
        # A terminal sends Ctrl-C to the child as well.
        signal.SIGINT: lambda number, frame: None,
        signal.SIGTERM: lambda number, frame: child.terminate(),
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """The command: the exit code of the training, 2 when it could not begin."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.recipe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="rows: " + ", ".join(map(short_name, CATALOG)), allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("row", help="a published checkpoint, with or without its organisation")
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--dry-run", action="store_true", help="print the command and do not run it")
    parser.add_argument(
        "--launcher",
        choices=(NONE, *sorted(file.stem for file in LAUNCHERS.glob("*.yaml"))),
        help="configuration of trainer/accelerate to launch with; without it 14B full takes zero2_offload, others none",
    )
    given, overrides = parser.parse_known_args(argv)
    try:
        words = command(recipe(given.row, given.mode), overrides, given.launcher)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{shlex.join(words)}\n")
    sys.stdout.flush()
    return 0 if given.dry_run else run(words)
