"""`python -m workflows.build`, from the pack's folder: write every workflow in both formats.

With `--thumbnails` every workflow also runs on the bundled tiny models, and a picture of its video is written, too.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from pack import NAME, ROOT
from wan_core import catalog
from wancore.headless.core_nodes import core_nodes
from wancore.headless.folders import Folders
from wancore.nodes import NODE_CLASS_MAPPINGS

from . import descriptions, training
from .graph import to_api, to_ui
from .thumbnails import thumbnail


def version() -> str:
    """The pack's version, from pyproject.toml."""
    return re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]


def core_classes() -> dict[str, type]:
    """The stand-ins of ComfyUI's own nodes that the workflows use."""
    return core_nodes(Folders())


def files() -> dict[Path, dict[str, Any]]:
    """Every workflow file's path, relative to this folder, and what it holds."""
    classes = {**core_classes(), **NODE_CLASS_MAPPINGS}
    built = {}
    described = [(descriptions, name) for name in descriptions.WORKFLOWS]
    described += [(training, name) for name in training.NAMES]
    for module, name in described:
        graph = module.describe(name, catalog.find_row)
        built[Path(f"{graph.name}.json")] = to_ui(graph, classes, NAME, version())
        built[Path("api", f"{graph.name}.json")] = to_api(graph, classes)
    return built


def write(folder: Path) -> None:
    for path, content in files().items():
        target = folder / path
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Write everything into this folder."""
    parser = argparse.ArgumentParser(prog="python -m workflows.build", description="Write the shipped workflows.")
    parser.add_argument("--thumbnails", action="store_true", help="also run each of them and write its picture")
    options, folder = parser.parse_args(), Path(__file__).resolve().parent
    write(folder)
    if options.thumbnails:
        for name in (*descriptions.WORKFLOWS, *training.NAMES):
            thumbnail(name, folder / f"{name}.jpg")


if __name__ == "__main__":
    main()
