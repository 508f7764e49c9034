"""`python -m workflows.build`, from the pack's folder: write every workflow in both formats."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

from pack import NAME, ROOT, load_pack

from . import descriptions, training
from .graph import to_api, to_ui


def version() -> str:
    """The pack's version, from pyproject.toml."""
    return re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]


def files() -> dict[Path, dict[str, Any]]:
    """Every workflow file's path, relative to this folder, and what it holds."""
    pack = load_pack()
    parts = ("headless.core_nodes", "headless.folders", "wan_core.catalog")
    core, folders, catalog = (importlib.import_module(f"{NAME}.{part}") for part in parts)
    classes = {**core.core_nodes(folders.Folders()), **pack.NODE_CLASS_MAPPINGS}
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


if __name__ == "__main__":
    write(Path(__file__).resolve().parent)
