"""One job from its claim to its published film, and the worker that makes films in its process."""

import contextlib
import os
import platform
import re
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from PIL import Image

from wan_core.atomic import replacing
from wan_core.media import CLIP_SUFFIXES, PICTURE_SUFFIXES, frames, probe
from wan_core.media.pixels import to_eight_bit
from wan_core.runtime import Cancelled

from ...nodes import NODE_CLASS_MAPPINGS, host, sockets
from ..client import RunLostError
from ..core_nodes import core_nodes
from ..folders import Folders
from ..overrides import expand_prefixes
from ..runner import Kept, OnEvent, RunResult, run
from ..schema import schemas_of
from ..server import ServerUnreachableError
from ..workflow import Workflow
from .jobs import Job
from .results import Results, is_full

CHECKPOINTS = "Long Run of the batch"
"""The id of the node that is added to a workflow, so that a lost worker costs a few steps and not a film."""

STILL = (320, 320)

LONGEST_REASON = 400
"""Letters of an error in tables."""

Status = Literal["done", "before", "elsewhere", "failed", "full"]


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        status: `done`; `before`: it was finished already; `elsewhere`: another driver works on it; `failed`, here or by
            another driver since this batch began; `full`: there is no room for the results.
        seconds: of the attempt.
        error: why it failed, in one line.
        continued: whether there were saved steps of an attempt that was cut off.
    """

    status: Status
    seconds: float = 0.0
    error: str = ""
    continued: bool = False


@dataclass(frozen=True)
class Made:
    """What a job made: files in its work folder, what was said of it, and where."""

    files: tuple[Path, ...]
    versions: Mapping[str, str]


Make = Callable[[Job, Path], Made]


def attempt(job: Job, results: Results, make: Make, worker: str) -> Outcome:
    """Claim a job, make it unless it is finished, and publish it.

    Raises:
        ServerUnreachableError, RunLostError, Cancelled, KeyboardInterrupt: the job is as it was, and unclaimed.
    """
    begun, clock = time.time(), time.monotonic()
    with results.claimed(job.id) as ours:
        if not ours:
            return Outcome("elsewhere")
        if results.finished(job.id) is not None:
            return Outcome("before")
        work, failure = results.work(job.id), results.failure(job.id) or {}
        if failure.get("attempts", 0) > job.tried:
            return Outcome("failed", error=failure["error"])
        continued = any(work.rglob("unfinished_*"))
        try:
            record = results.publish_made(job.id)
            if record is None:
                made = make(job, work)
                record = results.publish(job.id, made.files, {
                    "id": job.id, "workflow": job.workflow, "values": job.values, "seeds": job.seeds,
                    "seconds": round(time.monotonic() - clock, 3), "attempts": failure.get("attempts", 0) + 1,
                    "continued": continued, "begun": _stamp(begun), "ended": _stamp(time.time()), "worker": worker,
                    "versions": made.versions, "digest": job.digest, "prompt": job.prompt,
                })  # fmt: skip
        except (ServerUnreachableError, RunLostError, Cancelled):
            raise
        except Exception as error:
            seconds = time.monotonic() - clock
            reason = shorten(str(error), LONGEST_REASON) or type(error).__name__
            if is_full(error):
                return Outcome("full", seconds, reason)
            trace = "".join(traceback.format_exception(error))
            results.fail(job.id, {"error": reason, "at": _stamp(time.time()), "worker": worker, "traceback": trace})
            return Outcome("failed", seconds, reason)
    with contextlib.suppress(OSError, ValueError):
        _write_still([results.root / file["name"] for file in record["files"]], results.still(job.id))
    return Outcome("done", time.monotonic() - clock, continued=continued)


def _stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _write_still(files: list[Path], target: Path) -> None:
    """A small JPEG of the middle of the first clip, or of the first picture."""
    shown = next((file for file in files if file.suffix in (*CLIP_SUFFIXES, *PICTURE_SUFFIXES)), None)
    if shown is not None:
        middle = probe(shown).num_frames // 2
        picture = Image.fromarray(to_eight_bit(next(islice(frames(shown), middle, None))))
        picture.thumbnail(STILL)
        with replacing(target) as partial:
            picture.save(partial, quality=80)


@dataclass(frozen=True)
class WorkerSettings:
    """Where a worker reads and writes, and how it computes. Every machine has the folders under the same paths.

    Attributes:
        checkpoint_every: steps of a sampler between two saved states; 0 saves none.
        typed: names that the person typed, which may be any path.
    """

    results: Path
    input: Path
    device: str | None = None
    checkpoint_every: int = 5
    typed: frozenset[str] = frozenset()


class Worker:
    """Makes films in this process. Models and other results that several jobs need are kept from job to job."""

    def __init__(
        self,
        settings: WorkerSettings,
        nodes: Mapping[str, type[Any]] = NODE_CLASS_MAPPINGS,
        on_event: OnEvent = lambda _: None,
    ) -> None:
        self.settings, self.nodes, self.on_event = settings, nodes, on_event
        self.results, self.kept = Results(settings.results), Kept()
        self.name = f"{socket.gethostname()}:{os.getpid()}"

    def run(self, job: Job) -> Outcome:
        """As `attempt`."""
        return attempt(job, self.results, self._make, self.name)

    def _make(self, job: Job, work: Path) -> Made:
        folders = Folders(self.settings.input, work, self.settings.typed)
        host.configure(
            device=self.settings.device, input_dir=folders.input, output_dir=work, prompts_dir=self.results.prompts,
            typed=folders.typed,
        )  # fmt: skip
        nodes = {**core_nodes(folders), **self.nodes}
        workflow = expand_prefixes(Workflow.from_api(job.prompt))
        made: RunResult = run(
            resumable(workflow, nodes, self.settings.checkpoint_every), nodes, on_event=self.on_event,
            folders=folders, kept=self.kept, keep=job.shared, written=workflow,
        )  # fmt: skip
        return Made(tuple(file for file in made.files if not file.is_relative_to(folders.of_kind("temp"))), versions())


def resumable(workflow: Workflow, nodes: Mapping[str, type[Any]], every: int) -> Workflow:
    """The workflow with samplers that save their state every so many steps, unless they have a Long Run of their own,
    and with text encoders that share their results on the disk.
    """
    prompt, added = workflow.to_api(), False
    schemas = schemas_of({node.class_type: nodes[node.class_type] for node in workflow.nodes.values()})
    for node_id, node in workflow.nodes.items():
        for name, spec in schemas[node.class_type].inputs.items():
            if spec.type == sockets.RUN and name not in node.inputs and every:
                prompt[node_id]["inputs"][name] = [CHECKPOINTS, 0]
                added = True
            elif name == "cache_on_disk":
                prompt[node_id]["inputs"][name] = True
    if added:
        inputs = {"checkpoint_every": every, "keep_latents": False}
        prompt[CHECKPOINTS] = {"class_type": "WanCoreLongRun", "inputs": inputs}
    return Workflow.from_api(prompt)


@cache
def versions() -> dict[str, str]:
    """Of this pack and of what it computes with."""
    project = host.PACK_FOLDER / "pyproject.toml"
    if project.is_file():
        own = re.search(r'^version = "(.+)"', project.read_text(encoding="utf-8"), re.MULTILINE)
        pack = own[1] if own else "unknown"
    else:
        pack = version("wancore")  # pip has installed it
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"wancore": pack, "python": platform.python_version(), "torch": torch.__version__, "device": device}
