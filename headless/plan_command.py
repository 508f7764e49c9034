"""`python -m headless plan FILE`: what a workflow will take, before anything is loaded."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

from wan_core.planning.fit import FittedPlan, data_of, fit_plan, suggestions, text_of
from wan_core.planning.job import Job, plan_whole
from wan_core.runtime import GIB, free_bytes
from wan_core.settings import check_number

from ..nodes import NODE_CLASS_MAPPINGS, host
from .core_nodes import core_nodes
from .folders import Folders, workflow_file
from .plan import apply_tiny
from .reading import jobs_of
from .schema import schemas_of
from .workflow import Workflow, apply_sets

HELP = "Say what a workflow will take of the card and of host memory, from headers alone."

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
    "--tiny": {"action": "store_true", "help": "plan for the bundled tiny models, small sizes and few steps"},
    "--json": {"action": "store_true", "help": "print JSON, sizes in bytes"},
}


def declare(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    for flag, options in PLAN_ARGUMENTS.items():
        parser.add_argument(flag, **options)


def answer(arguments: argparse.Namespace) -> tuple[str, bool]:
    """What to print, and whether every run of the workflow fits.

    Raises:
        ValueError: the workflow, one of its settings or one of its files cannot be used.
    """
    if arguments.vram is not None:
        check_number("--vram", arguments.vram, low=0.1, high=100000)
    limit = free_bytes(host.current.device()) if arguments.vram is None else arguments.vram * GIB
    nodes = {**core_nodes(Folders()), **NODE_CLASS_MAPPINGS}
    workflow = Workflow.load(arguments.file)
    if arguments.tiny:
        workflow = apply_tiny(workflow, nodes)
    schemas = schemas_of(nodes)
    jobs = jobs_of(apply_sets(workflow, arguments.sets, schemas), nodes, schemas)
    absent = list(dict.fromkeys(part.absent for job in jobs for part in job.modules.values() if part.absent))
    fits = [_planned(job, limit, change=arguments.fit) for job in jobs]
    fine = all(found.plan.fits for found in fits)
    if arguments.json:
        return json.dumps({"plans": [data_of(found) for found in fits], "absent": absent}, indent=2), fine
    texts = [text_of(found) for found in fits]
    if not fine and not arguments.fit:
        texts.append("With --fit, settings are looked for that take less.")
    if absent:
        files = [f"  - {file}" for file in absent]
        texts.append("\n".join(["Not on this machine, planned by what is published of it, in bf16:", *files]))
    return "\n\n".join(texts), fine


def _planned(job: Job, limit: float | None, *, change: bool) -> FittedPlan:
    if change:
        return fit_plan(job, limit)
    plan = plan_whole(job, limit)
    return FittedPlan(plan, suggestions=() if plan.fits else suggestions(plan))
