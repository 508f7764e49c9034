"""`python -m headless info FILE...`: what model files are."""

import argparse
from pathlib import Path

from wan_core.inspection import report

HELP = "Say what model files are, what they need and which settings are recommended, from their headers."


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="a file, a folder or one shard")


def answer(arguments: argparse.Namespace) -> str:
    """The reports of all files, one after the other."""
    return "\n\n".join(str(report(path)) for path in arguments.files)
