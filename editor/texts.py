"""Every text of the nodes, in ComfyUI's layout of translations, from the node classes and a catalogue of Chinese."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CATALOGUE = Path(__file__).with_name("zh.json")
LANGUAGES = ("en", "zh")

KNOWN_CATEGORIES = ("loaders", "conditioning", "sampling")
"""Parts of a category's path that ComfyUI translates by itself."""


@dataclass(frozen=True)
class Text:
    """A text of a node: the section of the catalogue that translates it, its English, and where it stands."""

    section: str
    english: str
    where: str


Say = Callable[[Text], str]


@dataclass(frozen=True)
class Catalogue:
    """Chinese by English, in five sections: categories, types, nodes (display names), names (of slots), texts."""

    sections: Mapping[str, Mapping[str, str]]

    @classmethod
    def read(cls, path: Path = CATALOGUE) -> "Catalogue":
        """The catalogue in `path`, a JSON file."""
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def say(self, text: Text) -> str:
        """The Chinese of a text.

        Raises:
            ValueError: it is not in the catalogue.
        """
        try:
            return self.sections[text.section][text.english]
        except KeyError:
            raise ValueError(
                f"{text.where} has no Chinese: add {text.english!r} to {text.section!r} in {CATALOGUE.name}."
            ) from None


def english(text: Text) -> str:
    """The text as the class has it."""
    return text.english


def inputs(cls: type) -> Iterator[tuple[str, Any, dict[str, Any], bool]]:
    """(name, type or choices, options, is optional) of every input of a node, in order."""
    for section in ("required", "optional"):
        for name, (kind, *options) in cls.INPUT_TYPES().get(section, {}).items():
            yield name, kind, options[0] if options else {}, section == "optional"


def outputs(cls: type) -> Iterator[tuple[str, str, str]]:
    """(name, type, tooltip) of every output of a node."""
    names, tips = getattr(cls, "RETURN_NAMES", cls.RETURN_TYPES), getattr(cls, "OUTPUT_TOOLTIPS", ())
    for i, (name, kind) in enumerate(zip(names, cls.RETURN_TYPES, strict=True)):
        yield name, kind, tips[i] if i < len(tips) else ""


def node_text(node_id: str, cls: type, title: str) -> tuple[Text, Text]:
    """A node's display name and description."""
    return Text("nodes", title, node_id), Text("texts", cls.DESCRIPTION, f"{node_id}'s description")


def slot_text(node_id: str, name: str, tooltip: str) -> tuple[Text, Text]:
    """The name and the tooltip of one of a node's inputs or outputs."""
    where = f"{node_id}.{name}"
    return Text("names", name, where), Text("texts", tooltip, f"{where}'s tooltip")


def node_defs(classes: Mapping[str, type], titles: Mapping[str, str], say: Say) -> dict[str, Any]:
    """ComfyUI's nodeDefs.json."""
    return {node_id: _node_def(node_id, cls, titles[node_id], say) for node_id, cls in classes.items()}


def _node_def(node_id: str, cls: type, title: str, say: Say) -> dict[str, Any]:
    def slot(name: str, tooltip: str) -> dict[str, str]:
        label, tip = (quoted(say(text)) for text in slot_text(node_id, name, tooltip))
        return {"name": label, "tooltip": tip}

    name, description = (quoted(say(text)) for text in node_text(node_id, cls, title))
    return {
        "display_name": name,
        "description": description,
        "inputs": {name: slot(name, options.get("tooltip", "")) for name, _, options, _ in inputs(cls)},
        "outputs": {str(i): slot(name, tooltip) for i, (name, _, tooltip) in enumerate(outputs(cls))},
    }


def main_texts(classes: Mapping[str, type], say: Say) -> dict[str, Any]:
    """ComfyUI's main.json: the categories and the socket types that are the pack's own."""
    categories: dict[str, str] = {}
    types: dict[str, str] = {}
    for node_id, cls in classes.items():
        for part in cls.CATEGORY.split("/"):
            if part not in KNOWN_CATEGORIES:
                categories[part] = say(Text("categories", part, f"{node_id}'s category"))
        kinds = [kind for _, kind, _, _ in inputs(cls)] + list(cls.RETURN_TYPES)
        for kind in kinds:
            if isinstance(kind, str) and kind.startswith("WANCORE_"):
                types[kind] = say(Text("types", kind, f"a socket of {node_id}"))
    return {"nodeCategories": categories, "dataTypes": types}


def quoted(text: str) -> str:
    """The text with the signs written out that ComfyUI's translation library gives a meaning to."""
    return re.sub(r"[{}@|]", lambda sign: "{'" + sign[0] + "'}", text)
