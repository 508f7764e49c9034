"""The runs of a workflow, from its links, its widgets and the headers of its model files."""

from collections.abc import Mapping
from typing import Any

from wan_core.planning.job import Job

from ..nodes.planning import PlanError, PlannedRun, Unknown
from .schema import NodeSchema
from .validate import dependency_order, needed_nodes
from .workflow import Link, NodeSpec, Workflow, WorkflowError


def jobs_of(workflow: Workflow, nodes: Mapping[str, type[Any]], schemas: Mapping[str, NodeSchema]) -> list[Job]:
    """What each sampler runs, in the order of the file: the `planned` of every node class, along the links.

    Raises:
        WorkflowError: a link leads nowhere, links form a cycle, no sampler leads to an output, or what one is linked to
            is not known.
        ValueError: a setting is wrong, a file is broken or missing, or the model cannot use an input.
    """
    for node in workflow.nodes.values():
        for name, link in node.links.items():
            if link.node_id not in workflow.nodes:
                raise WorkflowError(f"{node}: {name} is linked to node #{link.node_id}, which is not there.")
    # A node of another pack may be what saves the video.
    ends = [n.id for n in workflow.nodes.values() if n.class_type not in schemas or schemas[n.class_type].is_output]
    needed = needed_nodes(workflow, ends)
    values: dict[str, tuple[Any, ...]] = {}
    for node_id in dependency_order(workflow, needed):
        node = workflow.nodes[node_id]
        planned = getattr(nodes.get(node.class_type), "planned", None)
        if planned is None:
            values[node_id] = ()
            continue
        try:
            values[node_id] = planned(**_inputs(node, schemas[node.class_type], values, workflow))
        except PlanError as error:
            raise WorkflowError(f"{node}: {error}") from error
    runs = [value for node_id in needed for value in values[node_id] if isinstance(value, PlannedRun)]
    if not runs:
        raise WorkflowError("There is nothing to plan: no sampler of this pack leads to an output of the workflow.")
    decoded: dict[PlannedRun, PlannedRun] = {}
    for run in runs:
        if run.sampled is not None:
            decoded.setdefault(run.sampled, run)
    return [decoded.get(run, run).job for run in runs if run.sampled is None]


def _inputs(
    node: NodeSpec, schema: NodeSchema, values: Mapping[str, tuple[Any, ...]], workflow: Workflow
) -> dict[str, Any]:
    """The inputs of a node: constants, what links carry, defaults of those that are left out."""
    found: dict[str, Any] = {}
    for name, spec in schema.inputs.items():
        value = node.inputs.get(name)
        if isinstance(value, Link):
            outputs = values[value.node_id]
            source = Unknown(str(workflow.nodes[value.node_id]))
            found[name] = outputs[value.slot] if value.slot < len(outputs) else source
        elif name in node.inputs:
            found[name] = value
        elif "default" in spec.options:
            found[name] = spec.options["default"]
        elif spec.required:
            raise WorkflowError(f"{node}: Required input is missing: {name}")
    return found
