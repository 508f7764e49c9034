"""A node's help page: what its class says, in tables, around prose that explains it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import texts

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

MANY = 13
"""Lists with more choices are not printed."""


def read_prose(language: str) -> dict[str, str]:
    """What the page of every node explains, by node id, from `help/<language>.md`: one `## <node id>` section each."""
    text = Path(__file__).with_name("help").joinpath(f"{language}.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (\S+)$", text, flags=re.MULTILINE)[1:]
    return {node_id: prose.strip() for node_id, prose in zip(parts[::2], parts[1::2], strict=True)}


def page(
    node_id: str, cls: type, title: str, prose: str, workflows: Sequence[str], language: str, say: texts.Say
) -> str:
    """The page in Markdown. Pictures are named relative to the folder that ComfyUI serves pages from."""
    words = HEADINGS[language]
    name, description = (say(text) for text in texts.node_text(node_id, cls, title))
    picture = f"pictures/{node_id}.{language}.svg"
    lines = [f"# {name}", "", description, "", f"![{name} {words['picture']}]({picture})", "", prose, ""]
    if workflows:
        lines += [f"{words['workflows']} {', '.join(f'`{w}`' for w in workflows)}", ""]
    rows = [_input_row(node_id, entry, words, say) for entry in texts.inputs(cls)]
    if rows:
        lines += [f"## {words['inputs']}", "", words["input_row"], "| --- | --- | --- | --- |", *rows, ""]
    rows = [_output_row(node_id, *entry, say) for entry in texts.outputs(cls)]
    if rows:
        lines += [f"## {words['outputs']}", "", words["output_row"], "| --- | --- | --- |", *rows, ""]
    return "\n".join(lines)


def _input_row(node_id: str, entry: tuple, words: Mapping[str, str], say: texts.Say) -> str:
    name, kind, options, optional = entry
    label, tooltip = (say(text) for text in texts.slot_text(node_id, name, options.get("tooltip", "")))
    shown = f"`{name}`" if label == name else f"`{name}` {label}"
    kind_shown = "COMBO" if isinstance(kind, list) else kind
    if optional:
        kind_shown += f", {words['optional']}"
    return _row([shown, kind_shown, _default(kind, options), tooltip])


def _output_row(node_id: str, name: str, kind: str, tooltip: str, say: texts.Say) -> str:
    label, tip = (say(text) for text in texts.slot_text(node_id, name, tooltip))
    return _row([f"`{name}`" if label == name else f"`{name}` {label}", kind, tip])


def _default(kind: Any, options: Mapping[str, Any]) -> str:
    default = options.get("default", kind[0] if isinstance(kind, list) and kind else "")
    if isinstance(kind, list) and 1 < len(kind) <= MANY:
        return ", ".join(f"**{choice}**" if choice == default else str(choice) for choice in kind)
    text = str(default)
    return text if len(text) <= 40 else text[:37] + "…"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;').replace(chr(10), ' ') for cell in cells)} |"
