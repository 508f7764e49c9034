"""`python -m tools.pages`: write `locales/` and the help pages in `web/docs/`."""

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pack import ROOT
from tools import pictures
from tools import workflows as workflows_build
from tools.graph import inputs, outputs
from tools.templates import CATEGORY, FOLDERS, TEMPLATES, template
from tools.workflow_texts import WORKFLOWS
from wancore.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, host

CATALOGUE = Path(__file__).with_name("texts") / "zh.json"
LANGUAGES = ("en", "zh")

KNOWN_CATEGORIES = ("loaders", "conditioning", "sampling")
"""Parts of a category's path that ComfyUI translates by itself."""


@dataclass(frozen=True)
class Text:
    """A text of a node: the section of the catalogue that translates it, its English, and its place for messages."""

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
        label, tip = (escape(say(text)) for text in slot_text(node_id, name, tooltip))
        return {"name": label, "tooltip": tip}

    name, description = (escape(say(text)) for text in node_text(node_id, cls, title))
    return {
        "display_name": name,
        "description": description,
        "inputs": {name: slot(name, options.get("tooltip", "")) for name, _, options, _ in inputs(cls)},
        "outputs": {str(i): slot(name, tooltip) for i, (name, _, tooltip) in enumerate(outputs(cls))},
    }


def main_texts(classes: Mapping[str, type], say: Say, language: str) -> dict[str, Any]:
    """ComfyUI's main.json: the categories and the socket types that are the pack's own, its templates' category."""
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
    category = dict.fromkeys(FOLDERS, CATEGORY[language])
    return {"nodeCategories": categories, "dataTypes": types, "templateWorkflows": {"category": category}}


def escape(text: str) -> str:
    """The text with the characters escaped that have a meaning in ComfyUI's translation library."""
    return re.sub(r"[{}@|]", lambda match: "{'" + match[0] + "'}", text)


HEADINGS = {
    "en": {
        "picture": "in a graph",
        "inputs": "Inputs",
        "outputs": "Outputs",
        "input_row": "| input | type | default | what it is |",
        "output_row": "| output | type | what it is |",
        "optional": "optional",
        "workflows": "Workflows with this node, in the template browser under the pack's name:",
        "example": "**Example.**",
    },
    "zh": {
        "picture": "在工作流中的位置",
        "inputs": "输入",
        "outputs": "输出",
        "input_row": "| 输入 | 类型 | 默认值 | 说明 |",
        "output_row": "| 输出 | 类型 | 说明 |",
        "optional": "可选",
        "workflows": "使用此节点的工作流（在模板浏览器中本节点包的名称下）：",
        "example": "**示例。**",
    },
}

LONGEST_LIST = 13
"""Lists with more choices are not printed."""


def read_prose(language: str) -> dict[str, str]:
    """The explanations of the pages by node id, from `help/<language>.md`: one `## <node id>` section each."""
    text = Path(__file__).with_name("texts").joinpath("help").joinpath(f"{language}.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (\S+)$", text, flags=re.MULTILINE)[1:]
    return {node_id: prose.strip() for node_id, prose in zip(parts[::2], parts[1::2], strict=True)}


def page(node_id: str, cls: type, title: str, prose: str, workflows: Sequence[str], language: str, say: Say) -> str:
    """The page in Markdown. Pictures are named relative to the folder that ComfyUI serves pages from."""
    words = HEADINGS[language]
    name, description = (say(text) for text in node_text(node_id, cls, title))
    picture = f"pictures/{node_id}.{language}.svg"
    lines = [f"# {name}", "", description, "", f"![{name} {words['picture']}]({picture})", "", prose, ""]
    if workflows:
        lines += [f"{words['workflows']} {', '.join(f'`{w}`' for w in workflows)}", ""]
    rows = [_input_row(node_id, entry, words, say) for entry in inputs(cls)]
    if rows:
        lines += [f"## {words['inputs']}", "", words["input_row"], "| --- | --- | --- | --- |", *rows, ""]
    rows = [_output_row(node_id, *entry, say) for entry in outputs(cls)]
    if rows:
        lines += [f"## {words['outputs']}", "", words["output_row"], "| --- | --- | --- |", *rows, ""]
    return "\n".join(lines)


def _input_row(node_id: str, entry: tuple, words: Mapping[str, str], say: Say) -> str:
    name, kind, options, optional = entry
    label, tooltip = (say(text) for text in slot_text(node_id, name, options.get("tooltip", "")))
    shown = f"`{name}`" if label == name else f"`{name}` {label}"
    kind_shown = "COMBO" if isinstance(kind, list) else kind
    if optional:
        kind_shown += f", {words['optional']}"
    return _row([shown, kind_shown, _default(kind, options), tooltip])


def _output_row(node_id: str, name: str, kind: str, tooltip: str, say: Say) -> str:
    label, tip = (say(text) for text in slot_text(node_id, name, tooltip))
    return _row([f"`{name}`" if label == name else f"`{name}` {label}", kind, tip])


def _default(kind: Any, options: Mapping[str, Any]) -> str:
    default = options.get("default", kind[0] if isinstance(kind, list) and kind else "")
    if isinstance(kind, list) and 1 < len(kind) <= LONGEST_LIST:
        return ", ".join(f"**{choice}**" if choice == default else str(choice) for choice in kind)
    text = str(default)
    return text if len(text) <= 40 else text[:37] + "…"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;').replace(chr(10), ' ') for cell in cells)} |"


WRITTEN = ("locales", "web/docs")
"""The folders in which this script writes all files."""


@contextmanager
def no_files() -> Iterator[None]:
    """Inside the block, nodes list published models and no files of this machine."""
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
    catalogue = Catalogue.read()
    with no_files():
        ours, titles, workflows = node_classes(), display_names(), api_workflows()
        core = workflows_build.core_classes()
        order = [template(name) for name in TEMPLATES]
        built = {Path("web/docs/templates.json"): json.dumps(order, ensure_ascii=False, indent=2) + "\n"}
        for language, say in (("en", english), ("zh", catalogue.say)):
            built[Path("locales", language, "nodeDefs.json")] = _json(node_defs(ours, titles, say))
            built[Path("locales", language, "main.json")] = _json(main_texts(ours, say, language))
            prose = read_prose(language)
            shown_titles = {
                key: say(node_text(key, cls, titles[key])[0]).removesuffix(" (WanCore)") for key, cls in ours.items()
            }
            names = catalogue.sections["names"] if language == "zh" else {}
            for node_id, cls in ours.items():
                if node_id not in prose:
                    raise ValueError(f"{node_id} has no help: add a section to tools/texts/help/{language}.md.")
                used = [
                    template(w)
                    for w, nodes in workflows.items()
                    if any(n["class_type"] == node_id for n in nodes.values())
                ]
                make = partial(page, node_id, cls, titles[node_id], prose[node_id], used, language)
                # ComfyUI asks for the page in the user's language, then for the one without a language.
                path = Path(f"{node_id}.md") if language == "en" else Path(node_id, f"{language}.md")
                built[Path("web/docs") / path] = make(say)
                where = pictures.place(node_id, {**core, **ours}, workflows)
                picture = Path("web/docs/pictures", f"{node_id}.{language}.svg")
                built[picture] = pictures.draw(where, shown_titles, names)
    return built


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def write(folder: Path) -> None:
    """Write every file below `folder`, and remove pages of nodes that do not exist any more."""
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
