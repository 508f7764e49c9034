"""Calling one node function as ComfyUI does: collecting arguments, mapping over lists, taking results apart."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .schema import NodeSchema
from .workflow import Link, NodeSpec

Results = Mapping[str, Sequence[list[Any]]]
"""By node id: for each output the list of its values, one per call of the node."""


def arguments(node: NodeSpec, schema: NodeSchema, results: Results, hidden: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Each argument as the list of values to map over; a linked input that is not computed is `[None]`.

    Optional inputs that the workflow leaves out are left out here: the function's own defaults hold, as on the host.
    """
    values = {}
    for name, value in node.inputs.items():
        if isinstance(value, Link):
            values[name] = results[value.node_id][value.slot] if value.node_id in results else [None]
        elif name in schema.inputs:
            values[name] = [value]
    return values | {name: [hidden.get(kind)] for name, kind in schema.hidden.items()}


def mapped(function: Callable[..., Any], values: Mapping[str, list[Any]], takes_lists: bool) -> Iterator[Any]:
    """Call `function` once with the lists, or once per item; a shorter list repeats its last item.

    Raises:
        ValueError: an input received an empty list.
    """
    if takes_lists:
        yield function(**values)
        return
    for name, items in values.items():
        if not items:
            raise ValueError(f"input {name} received an empty list")
    for index in range(max(map(len, values.values()), default=1)):
        yield function(**{name: items[min(index, len(items) - 1)] for name, items in values.items()})


@dataclass(frozen=True)
class Returned:
    """What one call gave: a value per output, and what the interface shows."""

    values: Sequence[Any]
    ui: Mapping[str, list[Any]]

    @classmethod
    def of(cls, returned: Any, schema: NodeSchema) -> "Returned":
        """Read a tuple, or `{"ui": ..., "result": ...}`.

        Raises:
            ValueError: something else, or another number of values than the node declares.
        """
        ui: Mapping[str, list[Any]] = {}
        if isinstance(returned, dict):
            if "expand" in returned:
                raise ValueError("it expands into other nodes, which only a ComfyUI server can run; use --server")
            returned, ui = returned.get("result"), returned.get("ui") or {}
        values = () if returned is None else returned
        if not isinstance(values, (tuple, list)) or len(values) != len(schema.outputs):
            given = f"{len(values)} values" if isinstance(values, (tuple, list)) else type(values).__name__
            raise ValueError(f"it returned {given} for its {len(schema.outputs)} outputs")
        return cls(values, ui)


def merged_outputs(calls: Sequence[Returned], is_list: Sequence[bool]) -> list[list[Any]]:
    """Per output the values of all calls; an output that gives lists has them joined."""
    return [
        [item for call in calls for item in call.values[slot]] if joined else [call.values[slot] for call in calls]
        for slot, joined in enumerate(is_list)
    ]


def merged_ui(calls: Sequence[Returned]) -> dict[str, list[Any]]:
    panes = [call.ui for call in calls if call.ui]
    return {key: [item for pane in panes for item in pane[key]] for key in (panes[0] if panes else ())}
