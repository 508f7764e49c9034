"""Blueprints: a shipped workflow inside of one node, with what most people change on its outside."""

import json
from pathlib import Path

import pytest

from tools import blueprints
from tools.graph import inputs, is_widget
from tools.workflows import core_classes
from wancore.nodes import NODE_CLASS_MAPPINGS

ROOT = Path(__file__).parents[2]
CLASSES = {**core_classes(), **NODE_CLASS_MAPPINGS}
PICTURES = {
    "t2v": set(),
    "i2v_a14b": {"Start image 首帧"},
    "flf2v_720p": {"Start image 首帧", "End image 尾帧"},
    "fun_a14b_control": {"Control video 控制视频", "Reference image 参考图"},
    "extend_ti2v_5b": {"Film 影片"},
    "vace_14b": {"Source video 源视频", "Mask video 遮罩视频", "Reference image 参考图"},
}


def test_files_are_what_their_workflows_say():
    shipped = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in blueprints.FOLDER.glob("*.json")}
    assert blueprints.files() == shipped, "run python -m tools.blueprints"


@pytest.mark.parametrize("name", blueprints.BLUEPRINTS)
def test_only_what_most_people_change_is_outside(name):
    whole = blueprints.blueprint(name)
    (outer,), (inner,) = whole["nodes"], whole["definitions"]["subgraphs"]
    assert outer["type"] == inner["id"]
    given = {entry["name"] for entry in outer["inputs"]}
    outside = blueprints.OF_FILMS if name.startswith("extend") else blueprints.OUTSIDE
    assert given == {*outside} | PICTURES[name]
    assert [entry["type"] for entry in outer["outputs"]] == ["VIDEO"]
    assert [widget for _, widget in outer["properties"]["proxyWidgets"][-2:]] == ["seed", "control_after_generate"]


@pytest.mark.parametrize("name", blueprints.BLUEPRINTS)
def test_the_workflow_inside_is_the_shipped_one(name):
    """Followed from the outside in, with the values on its outside."""
    whole = blueprints.blueprint(name)
    (outer,), (inner,) = whole["nodes"], whole["definitions"]["subgraphs"]
    links = {link["id"]: link for link in inner["links"]}
    assert len(links) == len(inner["links"])
    widgets = [entry["name"] for entry in outer["inputs"] if entry.get("widget")]
    outside = dict(zip(widgets, outer["widgets_values"], strict=True))
    shipped = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in inner["nodes"]:
        twin, values = shipped[str(node["id"])], iter(node["widgets_values"])
        assert twin["class_type"] == node["type"]
        for slot, entry in enumerate(node["inputs"]):
            link = links.get(entry["link"])
            if link is not None:
                assert (link["target_id"], link["target_slot"]) == (node["id"], slot)
        slots = {entry["name"]: entry for entry in node["inputs"]}
        for input_name, kind, options, _ in inputs(CLASSES[node["type"]]):
            entry = slots[input_name]
            value = next(values) if is_widget(kind) else None
            if options.get("control_after_generate"):
                next(values)
            link = links.get(entry["link"])
            if link is None:
                assert input_name not in twin["inputs"] or twin["inputs"][input_name] == value
            elif link["origin_id"] == blueprints.INPUT:
                given = inner["inputs"][link["origin_slot"]]
                assert link["id"] in given["linkIds"]
                expected = outside.get(given["name"])
                assert expected is None or twin["inputs"][input_name] == expected
            else:
                assert twin["inputs"][input_name] == [str(link["origin_id"]), link["origin_slot"]]
