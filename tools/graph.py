"""A workflow described once, written in both of ComfyUI's formats: the editor's and the API's."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.templates import both

WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN")
NODE_WIDTH, SOCKET_HEIGHT, WIDGET_HEIGHT, TEXT_HEIGHT = 320, 20, 24, 120
TITLE_HEIGHT, PADDING = 30, 16
PREVIEW_HEIGHTS = {
    "LoadImage": 250,
    "LoadVideo": 250,
    "WanCoreCameraPath": 300,
    "PreviewImage": 220,
    "WanCoreSampler": 200,
    "SaveVideo": 240,
}
"""Room for the picture that the editor shows in a node."""
COLOURS = {
    "Models": ("#223", "#335"),
    "Prompt": ("#232", "#353"),
    "Inputs": ("#233", "#355"),
    "Conditioning": ("#332922", "#593930"),
    "Data": ("#233", "#355"),
    "Training": ("#432", "#653"),
    "Trained": ("#432", "#653"),
    "Sampling": ("#323", "#535"),
    "Video": ("#222", "#444"),
}
"""Title bar and body of a stage's nodes, from the editor's own palette; the body's colour is also the group's."""
COLUMN_GAP, ROW_GAP, GROUP_MARGIN, GROUP_TITLE = 60, 40, 20, 50
WIDTHS = {"Models": 480}
"""Width of the nodes of a stage whose choices are longer than `NODE_WIDTH`: names of models with what a download is."""
TITLED = ("LoadImage", "LoadVideo", "PreviewImage")
"""Nodes whose title says what they load or show, as there may be several."""
TOP_BAR = 190
"""Room for the editor's own bar above the graph, in graph units at the first scale."""

Out = tuple[str, int]
"""A link: the title of the node that it comes from, and the index of its output."""


@dataclass(frozen=True)
class Step:
    """One node: its title (unique in the graph), class, and inputs that differ from their defaults; links are `Out`."""

    title: str
    class_type: str
    inputs: Mapping[str, Any] = field(default_factory=dict)
    models: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True)
class Stage:
    """A titled column of the graph."""

    title: str
    steps: Sequence[Step]


@dataclass(frozen=True)
class Graph:
    """A whole workflow, with a note for its reader."""

    name: str
    note: str
    stages: Sequence[Stage]

    @property
    def steps(self) -> list[Step]:
        return [step for stage in self.stages for step in stage.steps]


def inputs(cls: type) -> Iterator[tuple[str, Any, dict[str, Any], bool]]:
    """(name, type or choices, options, is optional) of a node's inputs, in the order of the saved widget values."""
    for section in ("required", "optional"):
        for name, (kind, *options) in cls.INPUT_TYPES().get(section, {}).items():
            yield name, kind, options[0] if options else {}, section == "optional"


def outputs(cls: type) -> Iterator[tuple[str, str, str]]:
    """(name, type, tooltip) of every output of a node."""
    names, tips = getattr(cls, "RETURN_NAMES", cls.RETURN_TYPES), getattr(cls, "OUTPUT_TOOLTIPS", ())
    for i, (name, kind) in enumerate(zip(names, cls.RETURN_TYPES, strict=True)):
        yield name, kind, tips[i] if i < len(tips) else ""


def is_widget(kind: Any) -> bool:
    return isinstance(kind, list) or kind in WIDGET_TYPES


def _default(kind: Any, options: Mapping[str, Any]) -> Any:
    return options.get("default", kind[0] if isinstance(kind, list) else None)


def _companion(options: Mapping[str, Any]) -> str | None:
    """The value of the second widget that the editor puts below some: what becomes of a seed, an upload button."""
    if options.get("control_after_generate"):
        return "randomize"
    return "image" if any(name.endswith("_upload") for name in options) else None


def to_api(graph: Graph, classes: Mapping[str, type]) -> dict[str, Any]:
    """The API format: every widget with its value, every link."""
    ids = {step.title: str(i) for i, step in enumerate(graph.steps, 1)}
    nodes = {}
    for step in graph.steps:
        values = {}
        for name, kind, options, _ in inputs(classes[step.class_type]):
            value = step.inputs.get(name)
            if isinstance(value, tuple):
                values[name] = [ids[value[0]], value[1]]
            elif is_widget(kind):
                values[name] = _default(kind, options) if value is None else value
        nodes[ids[step.title]] = {"class_type": step.class_type, "inputs": values, "_meta": {"title": step.title}}
    return nodes


def to_ui(graph: Graph, classes: Mapping[str, type], pack: str, version: str) -> dict[str, Any]:
    """The editor's format (0.4), laid out in one column per stage."""
    return _Layout(graph, classes, pack, version).workflow()


class _Layout:
    def __init__(self, graph: Graph, classes: Mapping[str, type], pack: str, version: str) -> None:
        self.graph, self.classes, self.pack, self.version = graph, classes, pack, version
        self.ids = {step.title: i for i, step in enumerate(graph.steps, 1)}
        self.links: list[list[Any]] = []
        self.nodes: dict[str, dict[str, Any]] = {}

    def workflow(self) -> dict[str, Any]:
        note = self._note(len(self.ids) + 1)
        groups, left = [], 0
        for number, stage in enumerate(self.graph.stages, 1):
            width = WIDTHS.get(stage.title, NODE_WIDTH)
            groups.append(self._column(number, stage, left, width))
            left += width + COLUMN_GAP
        self._connect()
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{self.pack}/{self.graph.name}")),
            "revision": 0,
            "last_node_id": note["id"],
            "last_link_id": len(self.links),
            "nodes": [note, *self.nodes.values()],
            "links": self.links,
            "groups": groups,
            "config": {},
            "extra": {"ds": {"scale": 0.8, "offset": [NODE_WIDTH + COLUMN_GAP + 80, TOP_BAR]}},
            "version": 0.4,
        }

    def _note(self, node_id: int) -> dict[str, Any]:
        return {
            "id": node_id,
            "type": "MarkdownNote",
            "title": both("About this workflow"),
            "pos": [-NODE_WIDTH - COLUMN_GAP, 0],
            "size": [NODE_WIDTH, 320],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {},
            "widgets_values": [self.graph.note],
            "color": "#432",
            "bgcolor": "#653",
        }

    def _column(self, number: int, stage: Stage, left: int, width: int) -> dict[str, Any]:
        y = 0
        for step in stage.steps:
            node = self._node(step, [left, y], width, *COLOURS[stage.title])
            self.nodes[step.title] = node
            y += node["size"][1] + TITLE_HEIGHT + ROW_GAP
        top = -GROUP_TITLE - TITLE_HEIGHT
        return {
            "id": number,
            "title": both(stage.title),
            "bounding": [left - GROUP_MARGIN, top, width + 2 * GROUP_MARGIN, y - top],
            "color": COLOURS[stage.title][1],
            "flags": {},
        }

    def _node(self, step: Step, position: list[int], width: int, color: str, bgcolor: str) -> dict[str, Any]:
        cls = self.classes[step.class_type]
        sockets, widgets, values = [], [], []
        height = PADDING + PREVIEW_HEIGHTS.get(step.class_type, 0)
        for name, kind, options, optional in inputs(cls):
            entry: dict[str, Any] = {"name": name, "type": "COMBO" if isinstance(kind, list) else kind, "link": None}
            if is_widget(kind):
                entry["widget"] = {"name": name}
                value = step.inputs.get(name)
                values.append(_default(kind, options) if value is None or isinstance(value, tuple) else value)
                companion = _companion(options)
                if companion:
                    values.append(companion)
                    height += WIDGET_HEIGHT
                height += TEXT_HEIGHT if options.get("multiline") else WIDGET_HEIGHT
            if optional:
                entry["shape"] = 7
            (widgets if is_widget(kind) else sockets).append(entry)
        slots = [{"name": name, "type": kind, "links": []} for name, kind, _ in outputs(cls)]
        height += SOCKET_HEIGHT * max(len(sockets), len(slots))
        ours = step.class_type.startswith("WanCore")
        properties: dict[str, Any] = {
            "cnr_id": self.pack if ours else "comfy-core",
            "ver": self.version if ours else "0.3.64",
            "Node name for S&R": step.class_type,
        }
        if step.models:
            properties["models"] = [dict(model) for model in step.models]
        return {
            "id": self.ids[step.title],
            "type": step.class_type,
            # A node without a title of its own has its name in the user's language.
            **({"title": both(step.title)} if step.class_type in TITLED else {}),
            "pos": position,
            "size": [width, height],
            "flags": {},
            "order": self.ids[step.title],
            "mode": 0,
            "inputs": [*sockets, *widgets],
            "outputs": slots,
            "properties": properties,
            "widgets_values": values,
            "color": color,
            "bgcolor": bgcolor,
        }

    def _connect(self) -> None:
        for step in self.graph.steps:
            target = self.nodes[step.title]
            for slot, entry in enumerate(target["inputs"]):
                value = step.inputs.get(entry["name"])
                if not isinstance(value, tuple):
                    continue
                source = self.nodes[value[0]]
                output = source["outputs"][value[1]]
                link = len(self.links) + 1
                entry["link"] = link
                output["links"].append(link)
                self.links.append([link, source["id"], value[1], target["id"], slot, output["type"]])
