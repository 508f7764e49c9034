"""A workflow in ComfyUI's API format as typed values: read from a file, changed by `--set`, written back."""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .schema import InputSpec, NodeSchema

LARGEST_FILE = 64 << 20
DEEPEST = 64
"""How deep lists and objects may stand in each other; those of nodes are two or three deep."""
UNWRITABLE = re.compile("[\0\ud800-\udfff]")


PREFIX = "filename_prefix"
DATE_PART = re.compile("dd?|MM?|hh?|mm?|ss?|yyy?y?")
NOT_IN_NAMES = re.compile(r'[/?<>\\:*|"\x00-\x1f\x7f]')
"""What the editor replaces by an underscore in a value that becomes a part of a file's name."""


class WorkflowError(ValueError):
    """The file, or an override of it, is not a workflow that can run."""


@dataclass(frozen=True)
class Link:
    """An input that takes output number `slot` of another node."""

    node_id: str
    slot: int


@dataclass(frozen=True)
class NodeSpec:
    """One node of a workflow. Values of `inputs` are `Link`s and constants; its title is what the editor showed."""

    id: str
    class_type: str
    title: str
    inputs: Mapping[str, Any]

    @property
    def links(self) -> dict[str, Link]:
        return {name: value for name, value in self.inputs.items() if isinstance(value, Link)}

    def __str__(self) -> str:
        return f"#{self.id} {self.class_type}" + (f" '{self.title}'" if self.title != self.class_type else "")


@dataclass(frozen=True)
class Workflow:
    """Nodes by id, in the order of the file."""

    nodes: Mapping[str, NodeSpec]

    @classmethod
    def from_api(cls, data: Any, source: str = "workflow") -> "Workflow":
        """Read what `json.load` gave.

        Raises:
            WorkflowError: `data` is not in API format; a file of the editor is named as such.
        """
        if isinstance(data, dict) and isinstance(data.get("nodes"), list) and "links" in data:
            raise WorkflowError(
                f"{source} is in the editor's format. A headless run needs the API format: take its twin from "
                "workflows/api, or export it in ComfyUI with Workflow > Export (API)."
            )
        if not isinstance(data, dict) or not data or not all(isinstance(node, dict) for node in data.values()):
            raise WorkflowError(
                f"{source} is not a ComfyUI workflow in API format: expected an object of "
                '{"<node id>": {"class_type": ..., "inputs": {...}}}.'
            )
        return cls(MappingProxyType({node_id: _node(node_id, node) for node_id, node in data.items()}))

    @classmethod
    def load(cls, path: str | Path) -> "Workflow":
        """Read an API-format JSON file.

        Raises:
            WorkflowError: there is no such file, or it is not JSON, or not in API format.
        """
        path = Path(path)
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise WorkflowError(f"{path} is no workflow: it has more than {LARGEST_FILE >> 20} MiB.")
            data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
        except OSError as error:
            raise WorkflowError(f"Cannot read the workflow {path}: {error.strerror or error}.") from error
        except UnicodeDecodeError as error:
            raise WorkflowError(f"{path} is not a JSON file: it is not UTF-8 text.") from error
        except WorkflowError:
            raise
        except RecursionError as error:
            raise WorkflowError(f"{path} is no workflow: its values are nested too deeply.") from error
        except ValueError as error:
            raise WorkflowError(f"{path} is not valid JSON: {error}.") from error
        return cls.from_api(data, str(path))

    def to_api(self) -> dict[str, Any]:
        """The API format again; a new object at every call."""
        return {
            node.id: {
                "inputs": {name: _plain(value) for name, value in node.inputs.items()},
                "class_type": node.class_type,
                "_meta": {"title": node.title},
            }
            for node in self.nodes.values()
        }

    def with_inputs(self, node_id: str, inputs: Mapping[str, Any]) -> "Workflow":
        """This workflow with `inputs` (constants, Links or `[node id, slot]`) laid over those of one node."""
        return self.with_all({node_id: inputs})

    def with_all(self, changes: Mapping[str, Mapping[str, Any]]) -> "Workflow":
        """The same for several nodes, by their ids."""
        changed = {}
        for node_id, inputs in changes.items():
            node = self.nodes[node_id]
            merged = {**node.inputs, **{name: _value(value) for name, value in inputs.items()}}
            changed[node_id] = dataclasses.replace(node, inputs=MappingProxyType(merged))
        return Workflow(MappingProxyType({**self.nodes, **changed}))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys are different: of two equal ones only the last would count, without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if any(key == other for other, _ in pairs[:index]))
        raise WorkflowError(f"The workflow has {twice!r:.100} twice in one object; remove one of them.")
    return found


def _check_plain(where: str, value: Any) -> None:
    """Raise WorkflowError when a value is nested too deeply, or holds text that no file and no program can take."""
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if depth > DEEPEST:
            raise WorkflowError(f"{where}: values are nested more than {DEEPEST} deep.")
        if isinstance(item, Mapping):
            stack += ((inner, depth + 1) for pair in item.items() for inner in pair)
        elif isinstance(item, list):
            stack += ((inner, depth + 1) for inner in item)
        elif isinstance(item, str) and UNWRITABLE.search(item):
            raise WorkflowError(
                f"{where}: the text {item!r:.100} has characters that cannot be written (NUL, surrogates)."
            )


def _node(node_id: str, data: Mapping[str, Any]) -> NodeSpec:
    _check_plain(f"Node #{node_id!r:.100}", {node_id: data})
    class_type, inputs = data.get("class_type"), data.get("inputs", {})
    if not isinstance(class_type, str):
        raise WorkflowError(f"Cannot execute because a node is missing the class_type property.: Node ID '#{node_id}'")
    if not isinstance(inputs, dict):
        raise WorkflowError(f"Node #{node_id} ({class_type}): inputs must be an object, not {inputs!r:.100}.")
    meta = data.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    values = {name: _value(value) for name, value in inputs.items()}
    return NodeSpec(node_id, class_type, str(title or class_type), MappingProxyType(values))


def _value(value: Any) -> Any:
    is_link = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int
    return Link(*value) if is_link else value


def _plain(value: Any) -> Any:
    if isinstance(value, Link):
        return [value.node_id, value.slot]
    # A bare list would be read as a link; the host's wrapper keeps a list-valued widget apart.
    return {"__value__": value} if isinstance(value, list) else value


def apply_sets(workflow: Workflow, sets: Iterable[str], schemas: Mapping[str, NodeSchema]) -> Workflow:
    """The workflow with each `<node title or id>.<input>=<value>` applied, later ones over earlier ones.

    A value is read as the type that the input declares; setting a linked input replaces the link.

    Raises:
        WorkflowError: a malformed override, an unknown or ambiguous node, an unknown input, an unreadable value.
    """
    for text in sets:
        target, equals, value = text.partition("=")
        if not equals or "." not in target:
            raise WorkflowError(f"--set {text!r}: expected <node title or id>.<input>=<value>.")
        node, name = _target(workflow, target)
        schema = schemas.get(node.class_type)
        spec = schema.inputs.get(name) if schema else None
        if spec is None and name not in node.inputs:
            known = dict.fromkeys([*(schema.inputs if schema else ()), *node.inputs])
            raise WorkflowError(f"--set {text!r}: node {node} has no input {name!r}. It has: {nearest(name, known)}.")
        try:
            if spec and schema:
                parsed = _parse(value, spec, any_choice=name in schema.own_checks)
            else:
                parsed = _parse_like(value, node.inputs[name])
        except WorkflowError as error:
            raise WorkflowError(f"--set {text!r}: {error}") from error
        workflow = workflow.with_inputs(node.id, {name: parsed})
    return workflow


def typed_values(sets: Iterable[str]) -> frozenset[str]:
    """The values of `--set`: what the person has typed, and no workflow can have brought along."""
    return frozenset(text.partition("=")[2] for text in sets) - {""}


def expand_prefixes(workflow: Workflow, now: datetime | None = None) -> Workflow:
    """The workflow with what the editor replaces in each `filename_prefix` when it queues it: `%date:yyyy-MM-dd%` by
    `now`, and `%Node.widget%` by the value of a node that is found by its class or else its title. Anything else
    between percent signs is left; the node that saves knows `%width%` and its like.
    """
    given, now = workflow, now or datetime.now()
    for node in workflow.nodes.values():
        prefix = node.inputs.get(PREFIX)
        if isinstance(prefix, str) and "%" in prefix:
            expanded = re.sub(r"%([^%]+)%", lambda found: _replacement(found, given, now), prefix)
            workflow = workflow.with_inputs(node.id, {PREFIX: expanded})
    return workflow


def _replacement(found: re.Match[str], workflow: Workflow, now: datetime) -> str:
    parts = found[1].split(".")
    if len(parts) != 2:
        is_date = parts[0].startswith("date:")
        return DATE_PART.sub(lambda part: _date_part(part[0], now), parts[0][5:]) if is_date else found[0]
    nodes = workflow.nodes.values()
    named = [n for n in nodes if n.class_type == parts[0]] or [n for n in nodes if n.title == parts[0]]
    if not named or parts[1] not in named[0].inputs or isinstance(named[0].inputs[parts[1]], Link):
        return found[0]
    value = named[0].inputs[parts[1]]
    if isinstance(value, bool) or value is None:
        value = "" if value is None else str(value).lower()
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    return NOT_IN_NAMES.sub("_", str(value))


def _date_part(letters: str, now: datetime) -> str:
    numbers = {"d": now.day, "M": now.month, "h": now.hour, "m": now.minute, "s": now.second}
    years = {"yy": f"{now.year:04}"[2:], "yyyy": str(now.year)}
    return str(numbers[letters[0]]).zfill(len(letters)) if letters[0] in numbers else years.get(letters, letters)


def nearest(word: str, known: Iterable[str]) -> str:
    """The known words joined by commas, those most like `word` first."""
    words = list(known)
    close = difflib.get_close_matches(word, words, n=len(words) or 1, cutoff=0.5)
    return ", ".join([*close, *(other for other in words if other not in close)]) or "none"


def _target(workflow: Workflow, target: str) -> tuple[NodeSpec, str]:
    # Titles and input names may both contain dots: the longest title that names a node wins.
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        if node := _find(workflow, ".".join(parts[:cut])):
            return node, ".".join(parts[cut:])
    word = target.rpartition(".")[0]
    titles = nearest(word, dict.fromkeys(node.title for node in workflow.nodes.values()))
    raise WorkflowError(f"--set {target}: no node has the title or id {word!r}. Titles: {titles}.")


def _find(workflow: Workflow, key: str) -> NodeSpec | None:
    if key in workflow.nodes:
        return workflow.nodes[key]
    for fold in (str, str.casefold):
        found = [node for node in workflow.nodes.values() if fold(node.title) == fold(key)]
        if len(found) > 1:
            ids = ", ".join(node.id for node in found)
            raise WorkflowError(f"--set {key!r}: {len(found)} nodes have this title; use one of their ids: {ids}.")
        if found:
            return found[0]
    return None


def _boolean(text: str) -> bool:
    for answer, words in ((True, ("true", "1", "yes", "on")), (False, ("false", "0", "no", "off"))):
        if text.strip().lower() in words:
            return answer
    raise ValueError


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


READERS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "INT": (int, "a whole number"),
    "FLOAT": (_finite, "a finite number"),
    "BOOLEAN": (_boolean, "true or false"),
    "STRING": (str, "text"),
}


def _parse(text: str, spec: InputSpec, any_choice: bool = False) -> Any:
    if spec.type == "COMBO":
        for choice in spec.choices or ():
            if str(choice) == text:
                return choice
        if any_choice or spec.takes_file or spec.choices is None:
            return text
        raise WorkflowError(f"{text!r} is not one of: {nearest(text, map(str, spec.choices))}.")
    if spec.type not in READERS:
        raise WorkflowError(f"{spec.name} takes a {spec.type} from another node; it cannot be typed.")
    reader, expected = READERS[spec.type]
    try:
        return reader(text)
    except ValueError:
        raise WorkflowError(f"{spec.name} expects {expected}, not {text!r}.") from None


def _parse_like(text: str, current: Any) -> Any:
    kinds: Sequence[tuple[type, str]] = ((bool, "BOOLEAN"), (int, "INT"), (float, "FLOAT"))
    kind = next((name for type_, name in kinds if isinstance(current, type_)), "STRING")
    return _parse(text, InputSpec("it", kind, {}, required=False))
