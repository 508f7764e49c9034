"""A workflow in ComfyUI's API format as typed values: read from a file, changed, written back."""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

LARGEST_FILE = 64 << 20

DEEPEST = 64
"""How deep lists and objects may be nested; those of nodes are two or three deep."""

UNWRITABLE = re.compile("[\0\ud800-\udfff]")


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
        """This workflow with `inputs` (constants, Links or `[node id, slot]`) in place of those of one node."""
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
    """A JSON object without repeated keys, of which `json` would silently use the last."""
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


def needed_nodes(workflow: Workflow, outputs: Iterable[str]) -> list[str]:
    """The ids of `outputs` and of everything upstream of them, in the order of the file."""
    found, stack = set(), list(outputs)
    while stack:
        if (node_id := stack.pop()) in workflow.nodes and node_id not in found:
            found.add(node_id)
            stack += [link.node_id for link in workflow.nodes[node_id].links.values()]
    return [node_id for node_id in workflow.nodes if node_id in found]


def nearest(word: str, known: Iterable[str]) -> str:
    """The known words joined by commas, those most like `word` first."""
    words = list(known)
    close = difflib.get_close_matches(word, words, n=len(words) or 1, cutoff=0.5)
    return ", ".join([*close, *(other for other in words if other not in close)]) or "none"
