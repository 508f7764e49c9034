"""What a run executes: the nodes that its outputs need, equal ones merged, and how a node is called."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .schema import NodeSchema
from .validate import dependency_order, needed_nodes
from .workflow import Link, NodeSpec, Workflow, WorkflowError


def apply_tiny(workflow: Workflow, nodes: Mapping[str, type[Any]]) -> Workflow:
    """The workflow with the inputs that each node's `tiny(inputs)` gives laid over its own.

    A node class has a tiny form when it has a classmethod `tiny`; it receives the node's inputs in API form.

    Raises:
        WorkflowError: no node of the workflow has a tiny form, so that it would run at full size.
    """
    prompt = workflow.to_api()
    changed = [node for node in workflow.nodes.values() if hasattr(nodes.get(node.class_type), "tiny")]
    if not changed:
        raise WorkflowError("--tiny: no node of this workflow has a tiny form; leave --tiny out.")
    return workflow.with_all({node.id: nodes[node.class_type].tiny(prompt[node.id]["inputs"]) for node in changed})


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


log = logging.getLogger("wancore")


@dataclass(frozen=True)
class Plan:
    """`nodes` by id, their links rewritten to nodes of the plan; `same_as` maps every needed id to one of them."""

    nodes: Mapping[str, NodeSpec]
    same_as: Mapping[str, str]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, workflow: Workflow, nodes: Mapping[str, type[Any]], schemas: Mapping[str, NodeSchema]) -> "Plan":
        """Merge nodes of one class with the same inputs and the same IS_CHANGED, as the host's cache does.

        Classes that say NOT_IDEMPOTENT or ask for their UNIQUE_ID are never merged.
        """
        outputs = tuple(node.id for node in workflow.nodes.values() if schemas[node.class_type].is_output)
        first: dict[Any, str] = {}
        kept: dict[str, NodeSpec] = {}
        same_as: dict[str, str] = {}
        for node_id in dependency_order(workflow, needed_nodes(workflow, outputs)):
            node = workflow.nodes[node_id]
            links = {name: Link(same_as[link.node_id], link.slot) for name, link in node.links.items()}
            node = dataclasses.replace(node, inputs={**node.inputs, **links})
            signature = _signature(node, nodes[node.class_type], schemas[node.class_type])
            same_as[node_id] = first.setdefault(signature, node_id)
            if same_as[node_id] == node_id:
                kept[node_id] = node
        return cls(kept, same_as, outputs)


def _signature(node: NodeSpec, cls: type[Any], schema: NodeSchema) -> tuple[Any, ...]:
    own = getattr(cls, "NOT_IDEMPOTENT", False) or "UNIQUE_ID" in schema.hidden.values()
    inputs = frozenset((name, _frozen(value)) for name, value in node.inputs.items())
    return node.class_type, node.id if own else None, inputs, _frozen(_is_changed(node, cls, schema))


def _is_changed(node: NodeSpec, cls: type[Any], schema: NodeSchema) -> Any:
    check = getattr(cls, "IS_CHANGED", None)
    if check is None:
        return False
    values = arguments(node, schema, {}, {"PROMPT": {}, "UNIQUE_ID": node.id})
    try:
        return list(mapped(check, values, getattr(cls, "INPUT_IS_LIST", False)))
    except Exception as error:
        log.warning("IS_CHANGED of %s failed, so its results are not shared: %s", node, error)
        return float("nan")


def _frozen(value: Any) -> Any:
    """A hashable equal for equal values of the same type; NaN and unknown objects equal nothing."""
    if isinstance(value, Mapping):
        return frozenset((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, (str, int, float, bool, bytes, type(None), Link)) and value == value:
        return type(value).__name__, value
    return object()
