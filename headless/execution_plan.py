"""What a run executes: the nodes that its outputs need, equal ones once, and the arguments of each."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .schema import NodeSchema, dependency_order
from .workflow import Link, NodeSpec, Workflow, needed_nodes

log = logging.getLogger("wancore")

Results = Mapping[str, Sequence[list[Any]]]
"""By node id: for each output the list of its values, one per call of the node."""


def call_arguments(
    node: NodeSpec, schema: NodeSchema, results: Results, hidden: Mapping[str, Any]
) -> dict[str, list[Any]]:
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


def map_calls(function: Callable[..., Any], values: Mapping[str, list[Any]], takes_lists: bool) -> Iterator[Any]:
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
class ExecutionPlan:
    """`nodes` by id, their links rewritten to nodes of the plan; `same_as` maps every needed id to one of them.

    `keys` are the digests of `Kept` of the nodes.
    """

    nodes: Mapping[str, NodeSpec]
    same_as: Mapping[str, str]
    outputs: tuple[str, ...]
    keys: Mapping[str, str | None]

    @classmethod
    def of(
        cls, workflow: Workflow, nodes: Mapping[str, type[Any]], schemas: Mapping[str, NodeSchema]
    ) -> "ExecutionPlan":
        """Merge nodes of one class with the same inputs and the same IS_CHANGED, as the host's cache does.

        Classes that say NOT_IDEMPOTENT or ask for their UNIQUE_ID are never merged.
        """
        outputs = tuple(node.id for node in workflow.nodes.values() if schemas[node.class_type].is_output)
        first: dict[Any, str] = {}
        kept: dict[str, NodeSpec] = {}
        same_as: dict[str, str] = {}
        keys: dict[str, str | None] = {}
        for node_id in dependency_order(workflow, needed_nodes(workflow, outputs)):
            node = workflow.nodes[node_id]
            links = {name: Link(same_as[link.node_id], link.slot) for name, link in node.links.items()}
            node = dataclasses.replace(node, inputs={**node.inputs, **links})
            node_class, schema = nodes[node.class_type], schemas[node.class_type]
            unique = getattr(node_class, "NOT_IDEMPOTENT", False) or "UNIQUE_ID" in schema.hidden.values()
            inputs = frozenset((name, _hashable(value)) for name, value in node.inputs.items())
            changed = _is_changed(node, node_class, schema)
            own_id = node_id if unique else None
            same_as[node_id] = first.setdefault((node.class_type, own_id, inputs, _hashable(changed)), node_id)
            if same_as[node_id] == node_id:
                kept[node_id] = node
                keys[node_id] = _key(node, own_id, changed, keys)
        return cls(kept, same_as, outputs, keys)


def _key(node: NodeSpec, node_id: str | None, changed: Any, sources: Mapping[str, str | None]) -> str | None:
    """A digest of what the results of a node are made from; None when it is not known to be the same in another run."""
    inputs: dict[str, Any] = {}
    for name, value in node.inputs.items():
        if isinstance(value, Link):
            if (source := sources[value.node_id]) is None:
                return None
            value = {"source": source, "slot": value.slot}
        inputs[name] = value
    try:
        # Refuses NaN, which equals nothing, and objects.
        text = json.dumps([node.class_type, node_id, inputs, changed], sort_keys=True, allow_nan=False)
    except (TypeError, ValueError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def _is_changed(node: NodeSpec, cls: type[Any], schema: NodeSchema) -> Any:
    check = getattr(cls, "IS_CHANGED", None)
    if check is None:
        return False
    values = call_arguments(node, schema, {}, {"PROMPT": {}, "UNIQUE_ID": node.id})
    try:
        return list(map_calls(check, values, getattr(cls, "INPUT_IS_LIST", False)))
    except Exception as error:
        log.warning("IS_CHANGED of %s failed, so its results are not shared: %s", node, error)
        return float("nan")


def _hashable(value: Any) -> Any:
    """A hashable form of a value, equal for equal values of the same type; NaN and unknown objects equal nothing."""
    if isinstance(value, Mapping):
        return frozenset((key, _hashable(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, (str, int, float, bool, bytes, type(None), Link)) and value == value:
        return type(value).__name__, value
    return object()
