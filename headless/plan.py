"""What a run executes: the nodes that the outputs need, with equal ones merged into one."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .calling import arguments, mapped
from .schema import NodeSchema
from .validate import dependency_order, needed_nodes
from .workflow import Link, NodeSpec, Workflow

log = logging.getLogger("wancore")


@dataclass(frozen=True)
class Plan:
    """`nodes` by id, their links rewritten to nodes of the plan; `same_as` maps every needed id to one of them."""

    nodes: Mapping[str, NodeSpec]
    same_as: Mapping[str, str]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, workflow: Workflow, nodes: Mapping[str, type], schemas: Mapping[str, NodeSchema]) -> "Plan":
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


def _signature(node: NodeSpec, cls: type, schema: NodeSchema) -> tuple[Any, ...]:
    own = getattr(cls, "NOT_IDEMPOTENT", False) or "UNIQUE_ID" in schema.hidden.values()
    inputs = frozenset((name, _frozen(value)) for name, value in node.inputs.items())
    return node.class_type, node.id if own else None, inputs, _frozen(_is_changed(node, cls, schema))


def _is_changed(node: NodeSpec, cls: type, schema: NodeSchema) -> Any:
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
