"""`python -m editor.build`, from the pack's folder: write `locales/` and `web/docs/`."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pack import ROOT
from wancore.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, host
from workflows import build as workflows_build
from workflows.descriptions import WORKFLOWS

from . import pages, pictures, texts

WRITTEN = ("locales", "web/docs")
"""The folders that hold nothing but what this script writes."""


@contextmanager
def no_files() -> Iterator[None]:
    """Nodes list what is published and nothing that lies on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        host.configure(models_dir=Path(folder), input_dir=Path(folder))
        try:
            yield
        finally:
            host.configure()


def node_classes() -> dict[str, type]:
    """The pack's nodes by id."""
    return dict(NODE_CLASS_MAPPINGS)


def display_names() -> dict[str, str]:
    """The pack's display names by id."""
    return dict(NODE_DISPLAY_NAME_MAPPINGS)


def api_workflows() -> dict[str, dict[str, Any]]:
    """The shipped workflows in the API format by name."""
    built = workflows_build.files()
    return {name: built[Path("api", f"{name}.json")] for name in WORKFLOWS}


def files() -> dict[Path, str]:
    """The path of every written file, relative to the pack, and what it holds.

    Raises:
        ValueError: a text has no Chinese, or a node no prose.
    """
    catalogue = texts.Catalogue.read()
    with no_files():
        ours, titles, workflows = node_classes(), display_names(), api_workflows()
        core = workflows_build.core_classes()
        built: dict[Path, str] = {}
        for language, say in (("en", texts.english), ("zh", catalogue.say)):
            built[Path("locales", language, "nodeDefs.json")] = _json(texts.node_defs(ours, titles, say))
            built[Path("locales", language, "main.json")] = _json(texts.main_texts(ours, say))
            prose = pages.read_prose(language)
            shown_titles = {key: say(texts.node_text(key, cls, titles[key])[0]) for key, cls in ours.items()}
            names = catalogue.sections["names"] if language == "zh" else {}
            for node_id, cls in ours.items():
                if node_id not in prose:
                    raise ValueError(f"{node_id} has no help: add a section to editor/help/{language}.md.")
                used = [name for name, flow in workflows.items() if _uses(flow, node_id)]
                make = partial(pages.page, node_id, cls, titles[node_id], prose[node_id], used, language)
                # ComfyUI asks for the page in the user's language, then for the one without a language.
                path = Path(f"{node_id}.md") if language == "en" else Path(node_id, f"{language}.md")
                built[Path("web/docs") / path] = make(say)
                where = pictures.place(node_id, {**core, **ours}, workflows)
                picture = Path("web/docs/pictures", f"{node_id}.{language}.svg")
                built[picture] = pictures.draw(where, _short(shown_titles), names)
    return built


def _uses(workflow: dict[str, Any], node_id: str) -> bool:
    return any(node["class_type"] == node_id for node in workflow.values())


def _short(titles: dict[str, str]) -> dict[str, str]:
    return {node_id: title.removesuffix(" (WanCore)") for node_id, title in titles.items()}


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def write(folder: Path) -> None:
    """Write every file below `folder`, and remove pages of nodes that are no more."""
    built = files()
    for place in WRITTEN:
        for old in sorted((folder / place).rglob("*.*")):
            if old.is_file() and old.relative_to(folder) not in built:
                old.unlink()
    for path, content in built.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    write(ROOT)
