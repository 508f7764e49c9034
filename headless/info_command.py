"""`python -m headless info FILE...`: what model files are."""

import argparse
from pathlib import Path

from ..wan_core.inspection import report


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", metavar="FILE", type=Path, nargs="+", help="a file, a folder, or one shard of a series"
    )


def execute(arguments: argparse.Namespace) -> int:
    print("\n\n".join(str(report(path)) for path in arguments.files))
    return 0
