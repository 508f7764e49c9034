"""Run a workflow in this process, by the rules ComfyUI runs it by."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from wan_core.runtime import Cancelled

from ..nodes import host
from .execution_plan import ExecutionPlan, call_arguments, map_calls
from .folders import Folders
from .schema import NodeSchema, schemas_of, validate
from .workflow import NodeSpec, Workflow


@dataclass(frozen=True)
class Event:
    """What happens in a run.

    Attributes:
        kind: `start`: `node` begins, the `done`-th of `total`. `cached`: its results are reused. `progress`: step
            `done` of `total` inside a node, in the phase `text`. `queued`: the server finishes `done` runs first.
            `notice`: `text` is for the user.
    """

    kind: Literal["start", "cached", "progress", "queued", "notice"]
    node: NodeSpec | None = None
    done: int = 0
    total: int = 0
    text: str = ""


OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class RunResult:
    """The `ui` of the output nodes by node id, as in ComfyUI's history, and the files that they wrote."""

    ui: dict[str, dict[str, list]]
    files: tuple[Path, ...]


class NodeError(RuntimeError):
    """A node failed while it ran; the message names it, and in this process the exception of the node is chained.

    The message of a ValueError is for the user, so that its `kind` is not shown.
    """

    def __init__(self, node: NodeSpec, kind: str, message: str):
        self.node = node
        super().__init__(f"Node {node} failed: " + (message if kind == "ValueError" else f"{kind}: {message}"))


@dataclass(frozen=True)
class DynamicPrompt:
    """The value of the hidden input DYNPROMPT: the workflow in API format, by node."""

    prompt: Mapping[str, Any]

    def get_original_prompt(self) -> Mapping[str, Any]:
        return self.prompt

    def get_node(self, node_id: str) -> Mapping[str, Any]:
        return self.prompt[node_id]

    def has_node(self, node_id: str) -> bool:
        return node_id in self.prompt

    def all_node_ids(self) -> set[str]:
        return set(self.prompt)


@dataclass(frozen=True)
class Kept:
    """Results that several runs share, so that a model is loaded once for all of them.

    A run drops from `results` what no node of it has, before it computes anything, and adds those of the nodes that it
    is told to keep.

    Attributes:
        results: the outputs of nodes by a digest of what they were made from: class, constants, and the same of every
            node before.
    """

    results: dict[str, list[list[Any]]] = field(default_factory=dict)


def run(
    workflow: Workflow,
    nodes: Mapping[str, type[Any]],
    *,
    on_event: OnEvent = lambda _: None,
    folders: Folders | None = None,
    extra_pnginfo: Mapping[str, Any] | None = None,
    kept: Kept | None = None,
    keep: Collection[str] = (),
    written: Workflow | None = None,
) -> RunResult:
    """Validate, then execute what the output nodes need, each node after its inputs, under `torch.inference_mode`.

    Nodes of the same class with the same inputs and the same IS_CHANGED share one execution. Inputs that a node
    declares lazy are computed when its `check_lazy_status` asks for them. Results are released after their last use.

    Args:
        nodes: node classes by class_type, in ComfyUI's class-attribute form.
        folders: where the files that nodes report lie; without it the result names no files.
        extra_pnginfo: the hidden input EXTRA_PNGINFO, which nodes write into files and may add to.
        kept: results of earlier runs, which are used here.
        keep: ids of the nodes whose results go into `kept`. Nodes that save files, or add to what is written into
            files, are never kept.
        written: the workflow that is written into files, where that is not this one.

    Raises:
        ValidationError: the workflow cannot run; nothing has run.
        NodeError: a node failed, with its own exception chained.
        KeyboardInterrupt, Cancelled: the user stopped the run.
    """
    schemas = schemas_of(nodes)
    workflow = validate(workflow, schemas)
    prompt = workflow.to_api()
    hidden = {
        "PROMPT": _without_folders((written or workflow).to_api(), folders),
        "DYNPROMPT": DynamicPrompt(prompt),
        "EXTRA_PNGINFO": dict(extra_pnginfo or {}),
    }
    with torch.inference_mode(), host.current.workflow():
        plan = ExecutionPlan.of(workflow, nodes, schemas)
        for node_id, same in plan.same_as.items():
            if node_id != same:
                on_event(Event("cached", workflow.nodes[node_id]))
        ui = _Execution(plan, nodes, schemas, hidden, on_event, kept or Kept(), keep).run()
    return RunResult(ui, tuple(folders.reported_files(ui)) if folders else ())


def _without_folders(prompt: Mapping[str, Any], folders: Folders | None) -> dict[str, Any]:
    """The prompt as it is written into files, which may be shared: without the paths of this machine."""
    if folders is None:
        return dict(prompt)

    def cleaned(value: Any) -> Any:
        return folders.without_folders(value) if isinstance(value, str) else value

    return {
        node_id: {**node, "inputs": {name: cleaned(value) for name, value in node["inputs"].items()}}
        for node_id, node in prompt.items()
    }


class _Execution:
    """The state of one run: finished nodes, results that are still needed, lazy inputs that were requested."""

    def __init__(
        self,
        plan: ExecutionPlan,
        nodes: Mapping[str, type[Any]],
        schemas: Mapping[str, NodeSchema],
        hidden: Mapping[str, Any],
        on_event: OnEvent,
        kept: Kept,
        keep: Collection[str],
    ):
        self.plan, self.nodes, self.schemas, self.hidden, self.on_event = plan, nodes, schemas, hidden, on_event
        self.kept, self.keep = kept, keep
        self.waiting: dict[str, set[str]] = defaultdict(set)
        for node in plan.nodes.values():
            for link in node.links.values():
                self.waiting[link.node_id].add(node.id)
        self.asked: dict[str, set[str]] = defaultdict(set)
        self.finished: set[str] = set()
        self.objects: dict[str, Any] = {}
        self.results: dict[str, list[list[Any]]] = {}
        self.ui: dict[str, dict[str, list]] = {}
        self._take_kept()

    def _take_kept(self) -> None:
        """Begin with the results of earlier runs, and let go of those that are of no use here."""
        present = set(self.plan.keys.values())
        for useless in self.kept.results.keys() - present:
            del self.kept.results[useless]
        for node_id, key in self.plan.keys.items():
            if found := self.kept.results.get(key or ""):
                self.results[node_id] = found
                self.on_event(Event("cached", self.plan.nodes[node_id]))
                self._release(self.plan.nodes[node_id])

    def run(self) -> dict[str, dict[str, list]]:
        kept = {output: self.plan.same_as[output] for output in self.plan.outputs}
        for node_id in kept.values():
            self._finish(node_id)
        return {output: self.ui[node_id] for output, node_id in kept.items() if node_id in self.ui}

    def _finish(self, node_id: str) -> None:
        stack = [node_id]
        while stack:
            node = self.plan.nodes[stack[-1]]
            if node.id in self.finished:
                stack.pop()
            elif sources := self._unfinished_sources(node) or self._request_lazy_inputs(node):
                stack += reversed(sources)
            else:
                self._execute(node)
                self._release(node)

    def _unfinished_sources(self, node: NodeSpec) -> list[str]:
        specs, asked = self.schemas[node.class_type].inputs, self.asked[node.id]
        return [
            link.node_id
            for name, link in node.links.items()
            if link.node_id not in self.finished
            and (name in asked or name not in specs or not specs[name].options.get("lazy"))
        ]

    def _request_lazy_inputs(self, node: NodeSpec) -> list[str]:
        with _as_node_error(node):
            check = getattr(self._instance(node), "check_lazy_status", None)
            for names in self._call(node, check) if check else ():
                self.asked[node.id].update(names or ())
        return self._unfinished_sources(node)

    def _execute(self, node: NodeSpec) -> None:
        schema, cls = self.schemas[node.class_type], self.nodes[node.class_type]
        self.on_event(Event("start", node, len(self.finished) + 1, len(self.plan.nodes)))
        with _as_node_error(node):
            function = getattr(self._instance(node), cls.FUNCTION)
            calls = [Returned.of(value, schema) for value in self._call(node, function)]
            if ui := merge_ui(calls):
                self.ui[node.id] = ui
            if self.waiting[node.id]:
                is_list = getattr(cls, "OUTPUT_IS_LIST", [False] * len(schema.outputs))
                self.results[node.id] = merge_outputs(calls, is_list)
                key = self.plan.keys[node.id] if node.id in self.keep else None
                if key and "EXTRA_PNGINFO" not in schema.hidden.values():
                    self.kept.results[key] = self.results[node.id]

    def _call(self, node: NodeSpec, function: Any) -> Iterator[Any]:
        cls, hidden = self.nodes[node.class_type], {**self.hidden, "UNIQUE_ID": node.id}
        values = call_arguments(node, self.schemas[node.class_type], self.results, hidden)
        return map_calls(function, values, getattr(cls, "INPUT_IS_LIST", False))

    def _instance(self, node: NodeSpec) -> Any:
        if node.id not in self.objects:
            self.objects[node.id] = self.nodes[node.class_type]()
        return self.objects[node.id]

    def _release(self, node: NodeSpec) -> None:
        self.finished.add(node.id)
        self.objects.pop(node.id, None)
        for link in node.links.values():
            self.waiting[link.node_id].discard(node.id)
            if not self.waiting[link.node_id]:
                self.results.pop(link.node_id, None)


@contextmanager
def _as_node_error(node: NodeSpec) -> Iterator[None]:
    try:
        yield
    except Cancelled:
        raise
    except Exception as error:
        # The message of any subclass of ValueError is for the user, too.
        kind = "ValueError" if isinstance(error, ValueError) else type(error).__name__
        raise NodeError(node, kind, str(error)) from error


@dataclass(frozen=True)
class Returned:
    """What one call of a node returned: a value per output, and what the interface shows."""

    values: Sequence[Any]
    ui: Mapping[str, list[Any]]

    @classmethod
    def of(cls, returned: Any, schema: NodeSchema) -> "Returned":
        """Read a tuple, or `{"ui": ..., "result": ...}`.

        Raises:
            ValueError: something else, or another number of values than the node declares.
        """
        ui: Mapping[str, list[Any]] = {}
        if isinstance(returned, dict):
            if "expand" in returned:
                raise ValueError("it expands into other nodes, which only a ComfyUI server can run; use --server")
            returned, ui = returned.get("result"), returned.get("ui") or {}
        values = () if returned is None else returned
        if not isinstance(values, (tuple, list)) or len(values) != len(schema.outputs):
            given = f"{len(values)} values" if isinstance(values, (tuple, list)) else type(values).__name__
            raise ValueError(f"it returned {given} for its {len(schema.outputs)} outputs")
        return cls(values, ui)


def merge_outputs(calls: Sequence[Returned], is_list: Sequence[bool]) -> list[list[Any]]:
    """Per output the values of all calls; an output that gives lists has them joined."""
    return [
        [item for call in calls for item in call.values[slot]] if joined else [call.values[slot] for call in calls]
        for slot, joined in enumerate(is_list)
    ]


def merge_ui(calls: Sequence[Returned]) -> dict[str, list[Any]]:
    panes = [call.ui for call in calls if call.ui]
    return {key: [item for pane in panes for item in pane[key]] for key in (panes[0] if panes else ())}
