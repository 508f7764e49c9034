"""What ComfyUI serves of each node is a promise: saved workflows are read by it.

`tests/data/object_info.json` holds each entry without lists of files. After a node, an output at the end or an optional
input at the end was added: `python -m tests.tools.test_object_info` adds it to the file. A change of what is there
already breaks the workflows that users have saved; make it an addition instead."""

import json
from pathlib import Path
from typing import Any

import pytest

from pack import register
from tools.pages import display_names, no_files, node_classes

register()


GOLDEN = Path(__file__).parents[1] / "data" / "object_info.json"
KEPT = ("default", "min", "max", "step", "multiline", "control_after_generate", "forceInput")
UPDATE = "see the head of tests/tools/test_object_info.py"


def entry(cls: type) -> dict[str, Any]:
    """The part of a node's /object_info entry that saved workflows rest on."""
    inputs = []
    for section in ("required", "optional"):
        for name, (kind, *options) in cls.INPUT_TYPES().get(section, {}).items():
            kept = {key: options[0][key] for key in KEPT if options and key in options[0]}
            inputs.append([name, section, kind, kept])
    names = getattr(cls, "RETURN_NAMES", cls.RETURN_TYPES)
    return {
        "input": inputs,
        "output": [list(pair) for pair in zip(names, cls.RETURN_TYPES, strict=True)],
        "output_node": bool(getattr(cls, "OUTPUT_NODE", False)),
    }


def served() -> dict[str, Any]:
    """Every node's entry, with the lists of models that are published and without files."""
    with no_files():
        return json.loads(json.dumps({node_id: entry(cls) for node_id, cls in node_classes().items()}))


def broken(kept: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of a kept entry no longer holds. Inputs may be added as optional after the last one, outputs at the end."""
    found = [] if kept["output_node"] == now["output_node"] else ["output_node changed"]
    if now["output"][: len(kept["output"])] != kept["output"]:
        found.append(f"outputs were {kept['output']}, are {now['output']}")
    for was, is_now in zip(kept["input"], now["input"], strict=False):
        if isinstance(was[2], list) and isinstance(is_now[2], list):
            gone = [choice for choice in was[2] if choice not in is_now[2]]
            was, is_now = [*was[:2], gone, was[3]], [*is_now[:2], [], is_now[3]]
        if was != is_now:
            found.append(f"input {was} is now {is_now}")
    if len(now["input"]) < len(kept["input"]):
        found.append(f"inputs are gone: {[was[0] for was in kept['input'][len(now['input']) :]]}")
    found += [f"new input {new[0]!r} is required" for new in now["input"][len(kept["input"]) :] if new[1] == "required"]
    return found


KEPT_ENTRIES = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}


@pytest.fixture(scope="module")
def now() -> dict[str, Any]:
    return served()


@pytest.mark.parametrize("node_id", KEPT_ENTRIES)
def test_a_node_keeps_its_promise(node_id, now):
    assert node_id in now, f"{node_id} is gone: workflows name it; keep the id"
    assert broken(KEPT_ENTRIES[node_id], now[node_id]) == [], f"{node_id} breaks saved workflows; {UPDATE}"


def test_additions_are_written_down(now):
    new = [node_id for node_id in now if now[node_id] != KEPT_ENTRIES.get(node_id)]
    assert new == [], f"new or grown: {new}; {UPDATE}"


def test_ids_need_no_quoting():
    for node_id, title in display_names().items():
        assert node_id.isidentifier() and node_id.isascii() and node_id.startswith("WanCore")
        assert title.endswith(" (WanCore)")


SAMPLE = {
    "input": [["a", "required", "INT", {"default": 1}], ["m", "optional", ["x", "y"], {}]],
    "output": [["o", "IMAGE"]],
    "output_node": False,
}
MORE = ["z", "optional", "FLOAT", {}]


@pytest.mark.parametrize(
    ("change", "breaks"),
    [
        ({}, False),
        ({"input": [*SAMPLE["input"], MORE]}, False),
        ({"input": [SAMPLE["input"][0], ["m", "optional", ["x", "new", "y"], {}]]}, False),
        ({"output": [["o", "IMAGE"], ["p", "MASK"]]}, False),
        ({"input": [*SAMPLE["input"], ["z", "required", "FLOAT", {}]]}, True),
        ({"input": [MORE, *SAMPLE["input"]]}, True),
        ({"input": SAMPLE["input"][:1]}, True),
        ({"input": SAMPLE["input"][::-1]}, True),
        ({"input": [["a", "required", "INT", {"default": 2}], SAMPLE["input"][1]]}, True),
        ({"input": [["a", "optional", "INT", {"default": 1}], SAMPLE["input"][1]]}, True),
        ({"input": [SAMPLE["input"][0], ["m", "optional", ["x"], {}]]}, True),
        ({"output": [["p", "IMAGE"]]}, True),
        ({"output_node": True}, True),
    ],
)
def test_what_breaks_a_saved_workflow(change, breaks):
    assert bool(broken(SAMPLE, {**SAMPLE, **change})) == breaks


def write() -> None:
    """Add what is new to the golden file; refuse what breaks it."""
    entries = served()
    wrong = {
        node_id: broken(kept, entries[node_id]) if node_id in entries else ["is gone"]
        for node_id, kept in KEPT_ENTRIES.items()
    }
    wrong = {node_id: found for node_id, found in wrong.items() if found}
    if wrong:
        raise SystemExit(f"Not written, because saved workflows would break: {wrong}")
    GOLDEN.write_text(json.dumps(entries, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
