"""`python -m tools.blueprints`: write the subgraph blueprints of the node library, from the shipped workflows.

A blueprint is a workflow inside of one node. Only what most people change is on its outside: prompt, pictures, size,
length and seed. ComfyUI lists `subgraphs/*.json` of a pack from version 0.3.69 on.
"""

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pack import NAME, ROOT
from tools import film_workflows, workflow_texts
from tools.graph import to_ui
from tools.workflows import core_classes, version
from wancore.nodes import NODE_CLASS_MAPPINGS

BLUEPRINTS: dict[str, tuple[str, str]] = {
    "t2v": ("Text to video (Wan)", "文生视频"),
    "i2v_a14b": ("Image to video (Wan)", "图生视频"),
    "flf2v_720p": ("First last frame to video (Wan)", "首尾帧生视频"),
    "fun_a14b_control": ("Control video (Wan)", "控制视频"),
    "vace_14b": ("VACE (Wan)", "视频编辑"),
    "extend_ti2v_5b": ("Extend a clip (Wan)", "续写影片"),
}
"""Workflow to the name of its blueprint, in English and in Chinese."""

FOLDER = ROOT / "subgraphs"
CATEGORY = "Video generation and editing/WanCore"
OUTSIDE = ("prompt", "width", "height", "num_frames")
"""Widgets that become inputs of the blueprint; several of one name become one."""

OF_FILMS = ("prompts", "clips", "clip_frames")
"""The same of a film that goes on: its frames have their size."""

SOURCES, SINKS = ("LoadImage", "LoadVideo", "GetVideoComponents"), ("SaveVideo", "MarkdownNote")
LEFT_OUT = ("WanCoreDriftMeter",)
"""Nodes whose charts a user of one node does not see."""

INPUT, OUTPUT = -10, -20
"""The ids of the places in a subgraph where its inputs begin and its outputs end."""

SLOT = 20
"""Height of a slot, in the editor's units."""


def blueprint(name: str) -> dict[str, Any]:
    """The blueprint of the workflow called `name`, in the editor's format."""
    title = " ".join(BLUEPRINTS[name])
    is_film = name in film_workflows.FILMS
    graph = (film_workflows if is_film else workflow_texts).describe(name)
    whole = to_ui(graph, {**core_classes(), **NODE_CLASS_MAPPINGS}, NAME, version())
    return _Inside(title, whole, OF_FILMS if is_film else OUTSIDE).wrapped()


class _Inside:
    """A workflow while its sources and sinks become inputs and outputs."""

    def __init__(self, title: str, whole: dict[str, Any], outside: tuple[str, ...]) -> None:
        self.title, self.whole, self.outside = title, whole, outside
        left_out = {n["id"] for n in whole["nodes"] if n["type"] in LEFT_OUT}
        self.nodes = {n["id"]: n for n in whole["nodes"] if n["type"] not in (*SOURCES, *SINKS, *LEFT_OUT)}
        outer = {n["id"]: n for n in whole["nodes"] if n["type"] in SOURCES}
        self.links: list[dict[str, Any]] = []
        self.inputs: dict[str, dict[str, Any]] = {}
        self.outputs: list[dict[str, Any]] = []
        for link_id, source, output, target, slot, kind in whole["links"]:
            if target not in self.nodes:
                if target not in left_out and source in self.nodes:
                    self._give(self.nodes[source]["outputs"][output], source, output, kind)
                continue
            into = self.nodes[target]["inputs"][slot]
            if source in self.nodes:
                self._link(source, output, target, slot, kind, link_id)
            else:
                self._take(self._source_name(outer, source), kind, target, slot, into)
        for node in self.nodes.values():
            for slot, entry in enumerate(node["inputs"]):
                if entry["name"] in self.outside and entry.get("widget") and entry["link"] is None:
                    self._take(entry["name"], entry["type"], node["id"], slot, entry)

    def _source_name(self, outer: Mapping[int, dict[str, Any]], source: int) -> str:
        """What the picture or clip of a node outside is called: that of the loader behind it."""
        node = outer[source]
        if node["type"] == "GetVideoComponents":
            behind = next(link for link in self.whole["links"] if link[3] == source)
            return self._source_name(outer, behind[1])
        return str(node["title"])

    def _next(self) -> int:
        return max((link["id"] for link in self.links), default=0) + len(self.whole["links"]) + 1

    def _link(self, source: int, output: int, target: int, slot: int, kind: str, link_id: int) -> None:
        self.links.append({
            "id": link_id, "origin_id": source, "origin_slot": output, "target_id": target, "target_slot": slot,
            "type": kind,
        })  # fmt: skip

    def _take(self, name: str, kind: str, target: int, slot: int, into: dict[str, Any]) -> None:
        """Join an input of a node inside to the input `name` outside, which is made when it is new."""
        taken = self.inputs.setdefault(
            name, {"id": self._uuid(f"input/{name}"), "name": name, "type": kind, "linkIds": [], "pos": [0, 0]}
        )
        link_id = self._next()
        self._link(INPUT, list(self.inputs).index(name), target, slot, kind, link_id)
        taken["linkIds"].append(link_id)
        into["link"] = link_id

    def _give(self, slot: dict[str, Any], source: int, output: int, kind: str) -> None:
        link_id = self._next()
        self._link(source, output, OUTPUT, len(self.outputs), kind, link_id)
        slot["links"] = [link_id]
        self.outputs.append(
            {"id": self._uuid(f"output/{kind}"), "name": kind, "type": kind, "linkIds": [link_id], "pos": [0, 0]}
        )

    def _uuid(self, part: str) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{NAME}/blueprint/{self.title}/{part}"))

    def _value(self, name: str) -> Any:
        """The value of the first widget of that name inside."""
        for node in self.nodes.values():
            widgets = [entry["name"] for entry in node["inputs"] if entry.get("widget")]
            if name in widgets:
                # The second widget that the editor puts below a seed has a value and no input.
                before = widgets[: widgets.index(name)]
                return node["widgets_values"][len(before) + ("seed" in before)]
        raise KeyError(name)

    def wrapped(self) -> dict[str, Any]:
        """The workflow whose one node is the blueprint."""
        known = {link["id"] for link in self.links}
        for node in self.nodes.values():
            for slot in node["outputs"]:
                slot["links"] = [link for link in slot["links"] if link in known]
        places = [node["pos"] for node in self.nodes.values()]
        left, right = min(x for x, _ in places) - 240, max(x for x, _ in places) + 440
        for x, slots in ((left, self.inputs.values()), (right, self.outputs)):
            for number, each in enumerate(slots):
                each["pos"] = [x + 100, number * SLOT]
        sampler = next(node for node in self.nodes.values() if node["type"] == "WanCoreSampler")
        widgets = [name for name in self.inputs if name in self.outside]
        own_id = self._uuid("subgraph")
        seed = [[str(sampler["id"]), "seed"], [str(sampler["id"]), "control_after_generate"]]
        node = {
            "id": 1,
            "type": own_id,
            "pos": [0, 0],
            "size": [400, 60 + (len(self.inputs) + 3) * 2 * SLOT],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [
                {
                    "name": name,
                    "type": each["type"],
                    "link": None,
                    **({"widget": {"name": name}} if name in widgets else {}),
                }
                for name, each in self.inputs.items()
            ],
            "outputs": [{"name": each["name"], "type": each["type"], "links": None} for each in self.outputs],
            "properties": {
                "proxyWidgets": [*(["-1", name] for name in widgets), *seed],
                "cnr_id": NAME,
                "ver": version(),
            },
            "widgets_values": [self._value(name) for name in widgets],
        }
        subgraph = {
            "id": own_id,
            "version": 1,
            "state": {
                "lastGroupId": len(self.whole["groups"]), "lastNodeId": max(self.nodes),
                "lastLinkId": max(known), "lastRerouteId": 0,
            },
            "revision": 0,
            "config": {},
            "name": self.title,
            "inputNode": {"id": INPUT, "bounding": [left, -40, 120, 80 + SLOT * len(self.inputs)]},
            "outputNode": {"id": OUTPUT, "bounding": [right, -40, 120, 80]},
            "inputs": list(self.inputs.values()),
            "outputs": self.outputs,
            "widgets": [],
            "nodes": list(self.nodes.values()),
            "groups": self.whole["groups"],
            "links": self.links,
            "extra": {"workflowRendererVersion": "LG"},
            "category": CATEGORY,
        }  # fmt: skip
        return {
            "id": self._uuid("workflow"),
            "revision": 0,
            "last_node_id": 1,
            "last_link_id": 0,
            "nodes": [node],
            "links": [],
            "groups": [],
            "definitions": {"subgraphs": [subgraph]},
            "config": {},
            "extra": {"workflowRendererVersion": "LG"},
            "version": 0.4,
        }


def files() -> dict[Path, str]:
    """Every blueprint's path, relative to the pack, and what it holds."""
    return {
        Path("subgraphs", f"{' '.join(title)}.json"): json.dumps(blueprint(name), indent=2, ensure_ascii=False) + "\n"
        for name, title in BLUEPRINTS.items()
    }


def main() -> None:
    """Write every blueprint, and remove what is none any more."""
    FOLDER.mkdir(exist_ok=True)
    built = files()
    for old in FOLDER.glob("*.json"):
        if old.relative_to(ROOT) not in built:
            old.unlink()
    for path, text in built.items():
        (ROOT / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
