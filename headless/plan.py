"""`python -m headless plan FILE`: what a workflow will take, from its links, widgets and headers of model files."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from wan_core.checks import check_number, check_whole
from wan_core.model import VideoModel
from wan_core.planning.fit import FittedPlan, data_of, fit_plan, suggestions, text_of
from wan_core.planning.job import Job, plan_whole
from wan_core.runtime import GIB, free_bytes
from wan_core.sampling.experts import Expert

from ..nodes import NODE_CLASS_MAPPINGS, host
from ..nodes.planning import PlanError, PlannedRun, PlannedTraining, Unknown
from .core_nodes import core_nodes
from .folders import Folders, workflow_file
from .overrides import RECOMMENDED_ARGUMENTS, apply_recommended, apply_sets, apply_tiny
from .schema import NodeSchema, dependency_order, schemas_of
from .workflow import Link, NodeSpec, Workflow, WorkflowError, needed_nodes

PLAN_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "file": {
        "metavar": "FILE",
        "type": workflow_file,
        "help": "workflow in API format, or the name of one in workflows/api such as t2v",
    },
    "--vram": {
        "metavar": "GB",
        "type": float,
        "help": "card memory that a run may use, a little less than the card has (default: what is free on this one)",
    },
    "--fit": {"action": "store_true", "help": "look for the settings that fit, changing as little as possible"},
    "--set": {
        "metavar": "NODE.INPUT=VALUE",
        "dest": "sets",
        "action": "append",
        "default": [],
        "help": "override an input, as for run",
    },
    **RECOMMENDED_ARGUMENTS,
    "--gpus": {
        "metavar": "N",
        "type": int,
        "default": 1,
        "help": "plan for N cards that share each film; --vram is that of one card",
    },
    "--tiny": {"action": "store_true", "help": "plan for the bundled models, with their sizes, steps and prompt"},
    "--json": {"action": "store_true", "help": "print JSON, sizes in bytes"},
}


def plan(arguments: argparse.Namespace) -> tuple[str, bool]:
    """What to print, and whether every run of the workflow fits.

    Raises:
        ValueError: the workflow, one of its settings or one of its files cannot be used.
    """
    if arguments.vram is not None:
        check_number("--vram", arguments.vram, low=0.1, high=100000)
    check_whole("--gpus", arguments.gpus, low=1, high=64)
    limit = free_bytes(host.current.device()) if arguments.vram is None else arguments.vram * GIB
    nodes = {**core_nodes(Folders()), **NODE_CLASS_MAPPINGS}
    workflow = Workflow.load(arguments.file)
    if arguments.tiny:
        workflow = apply_tiny(workflow, nodes)
    workflow = apply_recommended(workflow, arguments.recommended, arguments.more_motion, nodes)
    schemas = schemas_of(nodes)
    jobs, trainings = planned_runs(apply_sets(workflow, arguments.sets, schemas), nodes, schemas)
    jobs = [replace(job, ranks=max(job.ranks, arguments.gpus)) for job in jobs]
    absent = list(dict.fromkeys(part.absent for job in jobs for part in job.modules.values() if part.absent))
    fits = [fit_plan(job, limit) if arguments.fit else _unchanged(job, limit) for job in jobs]
    counted = [_training(training, limit) for training in trainings]
    fine = all(found.plan.fits for found in fits)
    if arguments.json:
        plans = {"plans": [data_of(found) for found in fits], "trainings": [data for data, *_ in counted]}
        return json.dumps({**plans, "absent": absent}, indent=2), fine and all(fits for *_, fits in counted)
    texts = [text_of(found) for found in fits] + [text for _, text, _ in counted]
    if not fine and not arguments.fit:
        texts.append("With --fit, settings are looked for that take less.")
    if absent:
        files = [f"  - {file}" for file in absent]
        texts.append("\n".join(["Not on this machine, planned by what is published of it, in bf16:", *files]))
    return "\n\n".join(texts), fine and all(fits for *_, fits in counted)


def _training(training: PlannedTraining, limit: float | None) -> tuple[dict[str, Any], str, bool]:
    """A training by count: as JSON holds it, in words, and whether it fits."""
    # Only who plans a training needs the packages that training needs.
    from ..trainer.data import dataset, report
    from ..trainer.model import trainable
    from ..trainer.run.estimate import Estimator

    config, model = training.config, training.model
    controller = None if model.motion_controller is None else model.motion_controller.module
    experts = tuple(Expert(each.module, each.lowest) for each in model.experts)
    handle = VideoModel(experts, model.variant, None, model.name, controller)
    data = dataset.load(config)
    checked = report.fit_to_geometry(report.check(data, config), data, config, model.geometry)
    rows = checked.require(config.on_bad_sample)
    estimator = Estimator(trainable.prepare(handle, config), (row.latent_shape for row in rows))
    text, fits = estimator.verdict(config, limit)
    figures = {"model": training.name, "limit": limit, "fits": fits, **vars(estimator.needs(config))}
    return figures, f"Training {training.name}. {text}", fits


def _unchanged(job: Job, limit: float | None) -> FittedPlan:
    """How a job fits as it is, and what would help where it does not."""
    whole = plan_whole(job, limit)
    return FittedPlan(whole, suggestions=() if whole.fits else suggestions(whole))


def planned_runs(
    workflow: Workflow, nodes: Mapping[str, type[Any]], schemas: Mapping[str, NodeSchema]
) -> tuple[list[Job], list[PlannedTraining]]:
    """What each sampler and each training runs, in the order of the file, by the `plan_outputs` of every node class.

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
        plan_outputs = getattr(nodes.get(node.class_type), "plan_outputs", None)
        if plan_outputs is None:
            values[node_id] = ()
            continue
        try:
            values[node_id] = plan_outputs(**_inputs(node, schemas[node.class_type], values, workflow))
        except PlanError as error:
            raise WorkflowError(f"{node}: {error}") from error
    runs = [value for node_id in needed for value in values[node_id] if isinstance(value, PlannedRun)]
    trainings = [value for node_id in needed for value in values[node_id] if isinstance(value, PlannedTraining)]
    if not runs and not trainings:
        raise WorkflowError(
            "There is nothing to plan: no sampler or training of this pack leads to an output of the workflow."
        )
    decoded: dict[PlannedRun, PlannedRun] = {}
    for run in runs:
        if run.sampled is not None:
            decoded.setdefault(run.sampled, run)
    return [decoded.get(run, run).job for run in runs if run.sampled is None], trainings


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
