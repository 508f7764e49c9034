"""Pictures of a node's place in a graph: its neighbours in a shipped workflow, or by the types of its sockets."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from tools.graph import inputs, outputs

WIDTH, ROW, TITLE, GAP, COLUMN = 190, 20, 26, 14, 290
MARGIN = 12
FONT = "font-family='Inter, Noto Sans SC, sans-serif' font-size='12'"
COLOURS = ("#f2b134", "#5aa9e6", "#7fc97f", "#e5533d", "#b48ead", "#64b5b0", "#d08770", "#a3be8c")

SOURCES = {
    "IMAGE": ("LoadImage", "IMAGE"),
    "MASK": ("LoadImage", "MASK"),
    "SIGMAS": ("BasicScheduler", "SIGMAS"),
    "LATENT": ("WanCoreSampler", "latent"),
    "WANCORE_MODEL": ("WanCoreModelLoader", "model"),
    "WANCORE_CONDITIONING": ("WanCoreTextEncode", "conditioning"),
}
"""The usual node and output that a type comes from, where the first node that has it is not the usual one."""

TARGETS = {
    "IMAGE": ("PreviewImage", "images"),
    "LATENT": ("WanCoreVAEDecode", "latent"),
    "STRING": ("PreviewAny", "source"),
    "WANCORE_MODEL": ("WanCoreSampler", "model"),
    "WANCORE_CONDITIONING": ("WanCoreSampler", "conditioning"),
}
"""The usual node and input that a type goes to, likewise."""

UNUSUAL = {("WanCoreVAEEncode", "LATENT"): ("WanCoreSampler", "latent")}
"""Where the output of one node goes, when it is not where its type usually goes."""


@dataclass(frozen=True)
class Link:
    """One end of a link of the pictured node: the neighbour, the name of its slot, the pictured node's own slot."""

    neighbour: str
    slot: str
    own: str
    kind: str


@dataclass(frozen=True)
class Place:
    """The pictured node's class and its links to the left and to the right."""

    node_id: str
    sources: tuple[Link, ...]
    targets: tuple[Link, ...]


def place(node_id: str, classes: Mapping[str, type], workflows: Mapping[str, Mapping[str, Any]]) -> Place:
    """Where `node_id` stands: in the first of the workflows (API format) that has it, else by its socket types."""
    for workflow in workflows.values():
        for key, node in workflow.items():
            if node["class_type"] == node_id:
                return _in_workflow(key, workflow, classes)
    return _by_type(node_id, classes)


def _in_workflow(key: str, workflow: Mapping[str, Any], classes: Mapping[str, type]) -> Place:
    node_id = workflow[key]["class_type"]
    sources = []
    for own, value in workflow[key]["inputs"].items():
        if isinstance(value, list):
            cls = workflow[value[0]]["class_type"]
            slot, kind, _ = list(outputs(classes[cls]))[value[1]]
            sources.append(Link(cls, slot, own, kind))
    own_outputs = list(outputs(classes[node_id]))
    targets = [
        Link(other["class_type"], slot, own_outputs[value[1]][0], own_outputs[value[1]][1])
        for other in workflow.values()
        for slot, value in other["inputs"].items()
        if isinstance(value, list) and value[0] == key
    ]
    return Place(node_id, tuple(sources), tuple(dict.fromkeys(targets)))


def _by_type(node_id: str, classes: Mapping[str, type]) -> Place:
    ours = {name: cls for name, cls in classes.items() if name.startswith("WanCore") and name != node_id}
    made = dict(SOURCES)
    taken = dict(TARGETS)
    for name, cls in ours.items():
        for slot, kind, _ in outputs(cls):
            made.setdefault(kind, (name, slot))
        for slot, kind, _, _ in inputs(cls):
            if isinstance(kind, str):
                taken.setdefault(kind, (name, slot))
    cls = classes[node_id]
    linked = [(name, kind) for name, kind, _, _ in inputs(cls) if isinstance(kind, str) and kind in made]
    sources = [Link(*made[kind], name, kind) for name, kind in linked if kind not in ("STRING", "INT", "FLOAT")]
    targets = [
        Link(*UNUSUAL.get((node_id, kind), taken[kind]), name, kind) for name, kind, _ in outputs(cls) if kind in taken
    ]
    return Place(node_id, tuple(sources), tuple(targets))


def draw(shown: Place, titles: Mapping[str, str], names: Mapping[str, str]) -> str:
    """The picture as SVG; `titles` are the nodes' names and `names` those of slots, both as the reader knows them."""
    left, middle, right = 0, COLUMN if shown.sources else 0, COLUMN * (2 if shown.sources else 1)
    own_in = list(dict.fromkeys(link.own for link in shown.sources))
    own_out = list(dict.fromkeys(link.own for link in shown.targets))
    sources, targets = _boxes(shown.sources), _boxes(shown.targets)
    rows = max(len(own_in), len(own_out), 1)
    height = max(_height(sources), _height(targets), TITLE + rows * ROW)
    width = (right if shown.targets else middle) + WIDTH
    top = (height - TITLE - rows * ROW) / 2
    parts = [_box(middle, top, titles[shown.node_id], rows, True)]
    links = []
    for links_of, boxes, x, own, is_source in (
        (shown.sources, sources, left, own_in, True),
        (shown.targets, targets, right, own_out, False),
    ):
        y = (height - _height(boxes)) / 2
        for neighbour, slots in boxes.items():
            parts.append(_box(x, y, titles.get(neighbour, neighbour), len(slots), False))
            for i, slot in enumerate(slots):
                slot_y = y + TITLE + (i + 0.5) * ROW
                parts.append(_label(x, slot_y, names.get(slot, slot), is_source))
                for link in links_of:
                    if (link.neighbour, link.slot) == (neighbour, slot):
                        own_y = top + TITLE + (own.index(link.own) + 0.5) * ROW
                        ends = (x + WIDTH, slot_y, middle, own_y) if is_source else (middle + WIDTH, own_y, x, slot_y)
                        links.append(_link(*ends, link.kind))
            y += TITLE + len(slots) * ROW + GAP
    for slots, is_output in ((own_in, False), (own_out, True)):
        parts += [
            _label(middle, top + TITLE + (i + 0.5) * ROW, names.get(s, s), is_output) for i, s in enumerate(slots)
        ]
    box = f"{-MARGIN} {-MARGIN} {width + 2 * MARGIN:g} {height + 2 * MARGIN:g}"
    size = f"width='{width + 2 * MARGIN:g}' height='{height + 2 * MARGIN:g}'"
    return "\n".join(
        [f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='{box}' {size} {FONT}>", *parts, *links, "</svg>\n"]
    )


def _boxes(links: tuple[Link, ...]) -> dict[str, list[str]]:
    boxes: dict[str, list[str]] = {}
    for link in links:
        slots = boxes.setdefault(link.neighbour, [])
        if link.slot not in slots:
            slots.append(link.slot)
    return boxes


def _height(boxes: Mapping[str, list[str]]) -> float:
    return sum(TITLE + len(slots) * ROW + GAP for slots in boxes.values()) - GAP if boxes else 0


def _box(x: float, y: float, title: str, rows: int, own: bool) -> str:
    edge = "#f2b134" if own else "#4a5568"
    height = TITLE + rows * ROW
    return (
        f"<rect x='{x:g}' y='{y:g}' width='{WIDTH}' height='{height:g}' rx='6' fill='#2b303b' stroke='{edge}'/>"
        f"<text x='{x + 10:g}' y='{y + 17:g}' fill='#ffffff' font-weight='{600 if own else 400}'>{escape(title)}</text>"
    )


def _label(x: float, y: float, name: str, is_output: bool) -> str:
    place, anchor = (x + WIDTH - 10, "end") if is_output else (x + 10, "start")
    return f"<text x='{place:g}' y='{y + 4:g}' fill='#c0c5ce' text-anchor='{anchor}'>{escape(name)}</text>"


def _link(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    colour, bend = COLOURS[sum(kind.encode()) % len(COLOURS)], (x2 - x1) / 2
    return (
        f"<path d='M{x1:g} {y1:g}C{x1 + bend:g} {y1:g} {x2 - bend:g} {y2:g} {x2:g} {y2:g}' fill='none' "
        f"stroke='{colour}' stroke-width='2'/><circle cx='{x1:g}' cy='{y1:g}' r='3.5' fill='{colour}'/>"
        f"<circle cx='{x2:g}' cy='{y2:g}' r='3.5' fill='{colour}'/>"
    )
