"""The jobs of a batch: read from a file, checked, and in an order in which models are loaded rarely."""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any

from wan_core import catalog
from wan_core.files import parse_json, read_text

from ...nodes.places import plain_name
from ..folders import workflow_file
from ..overrides import apply_sets
from ..schema import NodeSchema, dependency_order, validate
from ..workflow import Link, Workflow, WorkflowError, needed_nodes

ID, WORKFLOW = "id", "workflow"
"""The names of a row that are no inputs."""

TABLES = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".ndjson")

LONGEST_FILE = 256 << 20
SIZES = ("width", "height", "num_frames", "length")

SHOWN_PROBLEMS = 20
"""Wrong jobs whose problems are printed; the others are counted."""

LONGEST_WORDS, DIGITS = 40, 8
"""Letters of the prompt, and hexadecimal digits of the digest of the row, in the id of a job that has none."""


@dataclass(frozen=True)
class Row:
    """A job as it stands in a file. `where` names the line; `values` are inputs of the workflow, as text."""

    where: str
    id: str
    workflow: str
    values: Mapping[str, str]


@dataclass(frozen=True)
class Job:
    """A job that can run.

    Attributes:
        id: its name, and that of its results.
        workflow: as it was named.
        values: the inputs that the job has of its own.
        prompt: the whole workflow in API format.
        group: equal for jobs that use the same model files and sizes.
        shared: ids of the nodes whose results other jobs need, too.
        tried: attempts that had failed when this batch began.
    """

    id: str
    workflow: str
    values: Mapping[str, str]
    prompt: Mapping[str, Any]
    group: str = ""
    shared: tuple[str, ...] = ()
    tried: int = 0

    @property
    def digest(self) -> str:
        """Of everything that the result is made from, apart from the contents of files."""
        return hashlib.sha256(json.dumps(self.prompt, sort_keys=True).encode()).hexdigest()

    @property
    def seeds(self) -> list[int]:
        """The constants called `seed` or `noise_seed`, in the order of the file."""
        inputs = (node["inputs"] for node in self.prompt.values())
        return [
            value for each in inputs for name, value in each.items() if name.endswith("seed") and type(value) is int
        ]


def read_rows(path: Path, workflow: str) -> list[Row]:
    """The jobs in a file: objects in JSON lines, rows of a table whose first line has the names, or one prompt a line.

    Args:
        workflow: of the rows that name none.

    Raises:
        ValueError: the file cannot be read, or there is none in it; all wrong lines, and ids that occur twice.
    """
    text, suffix = read_text(path, "is no list of jobs", limit=LONGEST_FILE), path.suffix.lower()
    parse: Callable[[Any], Mapping[str, Any]] = dict if suffix in TABLES else _object if suffix in LINES else _prompt
    rows: dict[str, Row] = {}
    problems = []
    for number, line in _table(path, text) if suffix in TABLES else enumerate(text.splitlines(), 1):
        try:
            if isinstance(line, str) and not line.strip():
                continue
            row = _row(f"{path.name}:{number}", dict(parse(line)), workflow)
            # Some file systems do not distinguish the case of letters.
            if (other := rows.setdefault(row.id.casefold(), row)) is not row:
                raise ValueError(f"the id {row.id!r} is also that of {other.where}; each job needs its own")
        except ValueError as error:
            problems.append(f"{path.name}:{number}: {error}")
    _raise(problems)
    if not rows:
        example = '{"id": "cat", "workflow": "t2v", "prompt": "a cat in the rain", "seed": 7}'
        raise ValueError(f"{path} holds no jobs. Write one object a line, such as {example}.")
    return list(rows.values())


def _table(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter=TABLES[path.suffix.lower()], strict=True)
    try:
        for values in reader:
            if None in values or None in values.values():
                wrong = f"expected {len(reader.fieldnames or ())} cells, as the first line has"
                raise ValueError(f"{path.name}:{reader.line_num}: {wrong}; quote cells that hold a delimiter.")
            # An empty cell leaves the workflow's own value.
            yield reader.line_num, {name.strip(): value for name, value in values.items() if value.strip()}
    except csv.Error as error:
        raise ValueError(f"{path.name}:{reader.line_num} is not a row of a table: {error}.") from error


def _prompt(line: str) -> Mapping[str, Any]:
    return {"prompt": line.strip()}


def _object(line: str) -> Mapping[str, Any]:
    found = parse_json(line, "the line")
    if not isinstance(found, dict):
        raise ValueError(f'expected an object, such as {{"id": "cat", "prompt": "a cat"}}; got {line!r:.60}')
    return found


def _row(where: str, values: dict[str, Any], workflow: str) -> Row:
    texts = {name: _text(name, value) for name, value in values.items()}
    chosen = texts.pop(WORKFLOW, workflow)
    name = texts.pop(ID, None)
    if name is None:
        # Of the content, so that a line that is added does not rename the others.
        digest = hashlib.sha256(json.dumps([chosen, texts], sort_keys=True).encode()).hexdigest()
        words = shorten(re.sub(r"[\W_]+", " ", texts.get("prompt", "")).lower(), LONGEST_WORDS, placeholder="")
        name = f"{words.replace(' ', '-') or 'job'}-{digest[:DIGITS]}"
    name = plain_name("id", name)
    if "~" in name or name.startswith("."):
        raise ValueError(f"id: a name without ~ that does not begin with a dot is needed; got {name!r}")
    return Row(where, name, chosen, texts)


def _text(name: str, value: Any) -> str:
    """A value as `--set` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float)):
        return str(value)
    raise ValueError(f"{name} must be text, a number, true or false; got {value!r:.60}")


def make_jobs(
    rows: Sequence[Row],
    prepare: Callable[[Workflow], Workflow],
    schemas: Callable[[Workflow], Mapping[str, NodeSchema]],
    sets: Iterable[str] = (),
) -> tuple[list[Job], list[tuple[Row, str]]]:
    """The jobs that can run, and the others, each with what is wrong.

    Args:
        prepare: what the command does to every workflow, such as `--tiny`.
        schemas: of the node classes that a workflow uses.
        sets: overrides for every job; its own values come on top.
    """

    @cache
    def load(name: str) -> tuple[Workflow, Mapping[str, NodeSchema]]:
        workflow = prepare(Workflow.load(_workflow(name)))
        return workflow, schemas(workflow)

    jobs, wrong = [], []
    for row in rows:
        try:
            workflow, known = load(row.workflow)
            workflow = apply_sets(workflow, [*sets, *_sets(row, workflow)], known)
            checked = validate(workflow, known)
            jobs.append(Job(row.id, row.workflow, dict(row.values), checked.to_api(), _group(checked)))
        except ValueError as error:
            wrong.append((row, str(error)))
    return jobs, wrong


def check_all(wrong: Sequence[tuple[Row, str]]) -> None:
    """Raise ValueError with the problems of all wrong jobs, if there are any."""
    _raise([f"{row.where} ({row.id}): {problem}" for row, problem in wrong])


def _raise(problems: Sequence[str]) -> None:
    if problems:
        count = "1 job is wrong" if len(problems) == 1 else f"{len(problems)} jobs are wrong"
        more = [f"... and {len(problems) - SHOWN_PROBLEMS} more."] if len(problems) > SHOWN_PROBLEMS else []
        raise ValueError("\n".join([f"Nothing has run: {count}.", *problems[:SHOWN_PROBLEMS], *more]))


def _workflow(name: str) -> Path:
    """The file of a workflow: a path, the name of a shipped one, or a row of the catalog, with or without its owner."""
    rows = (row for row in catalog.CATALOG if name in (row.model_id, row.model_id.partition("/")[2]))
    return workflow_file(next((row.workflow for row in rows), name))


def _sets(row: Row, workflow: Workflow) -> Iterator[str]:
    """The values of a row as `--set` takes them. A name alone is that input of every node that has it as a constant."""
    for name, value in row.values.items():
        if "." in name:
            yield f"{name}={value}"
            continue
        nodes = [node for node in workflow.nodes.values() if not isinstance(node.inputs.get(name, Link("", 0)), Link)]
        if not nodes:
            known = dict.fromkeys(n for node in workflow.nodes.values() for n in node.inputs.keys() - node.links.keys())
            raise WorkflowError(
                f"{name!r} is an input of no node of {row.workflow}. Write one of {', '.join(known)}; or NODE.INPUT."
            )
        yield from (f"{node.id}.{name}={value}" for node in nodes)


def _group(workflow: Workflow) -> str:
    """What the nodes that load models are given, and the sizes."""
    nodes = workflow.nodes.values()
    loaders = [(node.class_type, dict(node.inputs)) for node in nodes if "loader" in node.class_type.lower()]
    sizes = [{name: node.inputs[name] for name in SIZES if type(node.inputs.get(name)) is int} for node in nodes]
    return hashlib.sha256(repr((loaders, sizes)).encode()).hexdigest()


def with_shared(jobs: Sequence[Job]) -> list[Job]:
    """The jobs by group, the largest group first, each with the nodes that others have, too."""
    digests = [_digests(Workflow.from_api(job.prompt)) for job in jobs]
    count = Counter(digest for each in digests for digest in set(each.values()))
    size = Counter(job.group for job in jobs)
    first = {job.group: index for index, job in reversed(list(enumerate(jobs)))}
    marked = [
        replace(job, shared=tuple(node_id for node_id, digest in each.items() if count[digest] > 1))
        for job, each in zip(jobs, digests, strict=True)
    ]
    return sorted(marked, key=lambda job: (-size[job.group], first[job.group]))


def _digests(workflow: Workflow) -> dict[str, str]:
    """By node a digest of its class, its constants, and the same of every node before it."""
    found: dict[str, str] = {}
    for node_id in dependency_order(workflow, needed_nodes(workflow, workflow.nodes)):
        node = workflow.nodes[node_id]
        inputs = {
            name: [found[value.node_id], value.slot] if isinstance(value, Link) else value
            for name, value in node.inputs.items()
        }
        text = json.dumps([node.class_type, inputs], sort_keys=True)
        found[node_id] = hashlib.sha256(text.encode()).hexdigest()
    return found
