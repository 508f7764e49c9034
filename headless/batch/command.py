"""The command `batch`: its arguments, and from a file of jobs to a folder of films."""

import argparse
import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from wan_core.checks import check_whole
from wan_core.recommend import AUTO
from wan_core.runtime import log

from ...nodes import NODE_CLASS_MAPPINGS, host
from ..core_nodes import core_nodes
from ..folders import Folders
from ..overrides import apply_tiny, apply_to_samplers, typed_values
from ..schema import schemas_of
from ..server import Server
from ..workflow import Workflow
from .cluster import ray_crew
from .drive import Alone, Crew, drive
from .fleet import fleet_crew, schemas_of_fleet
from .jobs import Job, check_all, make_jobs, read_rows, with_shared
from .report import Progress, lines, write_sheet, write_summary
from .results import Results
from .worker import Worker, WorkerSettings

BATCH_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "jobs": {
        "metavar": "JOBS",
        "type": Path,
        "help": "what to make: .jsonl with an object a line (id, workflow, and any inputs: prompt, seed, "
        "Sampler.steps), .csv or .tsv with the same names in the first line, or a text file with a prompt a line",
    },
    "--workflow": {
        "metavar": "NAME",
        "default": "t2v",
        "help": "for jobs that name none: a file, the name of a shipped workflow or of a model (default: t2v)",
    },
    "--skip-invalid": {
        "action": "store_true",
        "help": "leave out jobs that cannot run, instead of running none",
    },
    "--checkpoint-every": {
        "metavar": "N",
        "type": int,
        "default": 5,
        "help": "save the state of a film every N steps, where another worker can go on (default: 5; 0: never)",
    },
    "--workers": {
        "metavar": "N",
        "type": int,
        "help": "make N films at once, with Ray (default: one for each card, or one in this process)",
    },
    "--address": {
        "metavar": "ADDRESS",
        "help": "of a Ray cluster: auto, or such as 10.0.0.1:6379; every machine sees --out and --input by these paths",
    },
    "--servers": {
        "metavar": "URL",
        "nargs": "+",
        "default": [],
        "help": "make the films on these ComfyUI servers, the least busy first",
    },
    "--check": {"action": "store_true", "help": "check all jobs and say how many there are; make nothing"},
}

LIKE_RUN = ("--set", "--out", "--input", "--tiny", "--recommended", "--more-motion", "--device", "--quiet")
"""Arguments of `run` that hold for every job."""


def batch(arguments: argparse.Namespace) -> tuple[str, bool]:
    """What to print, and whether every job is finished.

    Raises:
        ValueError: an argument or a job is wrong; nothing has run.
        DiskFullError: there is no room for the results.
    """
    check_whole("--checkpoint-every", arguments.checkpoint_every, low=0, high=1000)
    if arguments.servers and (arguments.workers or arguments.address or arguments.device):
        raise ValueError("--servers compute by themselves: leave --workers, --address and --device out.")
    if arguments.workers is not None:
        check_whole("--workers", arguments.workers, low=1, high=10000)
    results = Results(arguments.out.absolute())
    typed = typed_values(arguments.sets)
    folders = Folders(arguments.input.absolute(), results.root, typed)
    folders.check("batch")
    host.configure(device=arguments.device, input_dir=folders.input, output_dir=results.root, typed=typed)
    nodes = {**core_nodes(folders), **NODE_CLASS_MAPPINGS}
    servers, known = [Server(url) for url in arguments.servers], schemas_of(nodes)
    rows = read_rows(arguments.jobs, arguments.workflow)
    jobs, wrong = make_jobs(
        rows,
        prepare=lambda workflow: _prepared(workflow, arguments, nodes),
        schemas=lambda workflow: schemas_of_fleet(servers, workflow) if servers else known,
        sets=arguments.sets,
    )
    if not arguments.skip_invalid:
        check_all(wrong)
    if problems := results.conflicts(jobs):
        raise ValueError("\n".join(["Nothing has run: results are in the way.", *problems]))
    left = [
        dataclasses.replace(job, tried=(results.failure(job.id) or {}).get("attempts", 0))
        for job in with_shared(jobs)
        if results.finished(job.id) is None
    ]
    before = len(jobs) - len(left)
    if arguments.check:
        groups = len({job.group for job in jobs})
        return f"{len(jobs)} jobs in {groups} groups of one model and size; {before} finished before.", not wrong
    progress = Progress(left, before, {row.id: problem for row, problem in wrong}, arguments.quiet)
    settings = WorkerSettings(results.root, folders.input, arguments.device, arguments.checkpoint_every, typed)
    try:
        with _crew(arguments, settings, progress) as crew:
            drive(left, crew, progress.finished)
    finally:
        # Also when the batch is interrupted, or the disk is full.
        invalid = [Job(row.id, row.workflow, row.values, {}) for row, _ in wrong]
        table = lines([*jobs, *invalid], results, progress.failed)
        with suppress(OSError):
            write_summary(table, results)
            write_sheet(table, results)
    results.tidy()
    return progress.summary(results), all(line.status == "done" for line in table)


def _prepared(workflow: Workflow, arguments: argparse.Namespace, nodes: Mapping[str, type[Any]]) -> Workflow:
    if arguments.tiny:
        workflow = apply_tiny(workflow, nodes)
    if arguments.recommended or arguments.more_motion:
        chosen = {"recommended": arguments.recommended or AUTO, "more_motion": arguments.more_motion}
        workflow = apply_to_samplers(workflow, chosen, nodes)
    return workflow


def _crew(arguments: argparse.Namespace, settings: WorkerSettings, progress: Progress) -> AbstractContextManager[Crew]:
    """Servers, or Ray's actors where several are asked for or there are several cards and Ray; else this process."""
    if arguments.servers:
        return fleet_crew([Server(url) for url in arguments.servers], settings)
    cards = 0 if arguments.device == "cpu" else torch.cuda.device_count()
    workers = arguments.workers or (cards if find_spec("ray") else 1)
    if cards > 1 and workers == 1 and not arguments.workers:
        log.warning("One of %d cards is used: pip install .[batch] to use all of them.", cards)
    if arguments.address or workers > 1:
        return ray_crew(settings, arguments.address, arguments.workers, gpus=0 if arguments.device == "cpu" else 1)
    return nullcontext(Alone(Worker(settings, NODE_CLASS_MAPPINGS, progress.step)))
