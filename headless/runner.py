"""Run a workflow in this process, by the rules ComfyUI runs it by."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from wan_core.runtime import Cancelled

from ..nodes import host
from .folders import Folders
from .plan import Plan, Returned, arguments, mapped, merged_outputs, merged_ui
from .schema import NodeSchema, schemas_of
from .validate import validate
from .workflow import NodeSpec, Workflow


@dataclass(frozen=True)
class Event:
    """`start`: `node` begins, the `done`-th of `total`. `cached`: its results are reused. `progress`: step `done` of
    `total` inside a node, in the phase `text`. `queued`: the server finishes `done` runs first. `notice`: `text` for
    the user."""

    kind: Literal["start", "cached", "progress", "queued", "notice"]
    node: NodeSpec | None = None
    done: int = 0
    total: int = 0
    text: str = ""


OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class RunResult:
    """What the output nodes reported, by node id, as ComfyUI's history holds it, and the files they wrote."""

    ui: dict[str, dict[str, list]]
    files: tuple[Path, ...]


class NodeError(RuntimeError):
    """A node failed while it ran; the message names it, and in this process the exception of the node is chained.

    The `kind` of exception is left out for a ValueError, whose message speaks to the user.
    """

    def __init__(self, node: NodeSpec, kind: str, message: str):
        self.node = node
        super().__init__(f"Node {node} failed: " + (message if kind == "ValueError" else f"{kind}: {message}"))


@dataclass(frozen=True)
class DynamicPrompt:
    """What the hidden input DYNPROMPT holds: the workflow in API format, by node."""

    prompt: Mapping[str, Any]

    def get_original_prompt(self) -> Mapping[str, Any]:
        return self.prompt

    def get_node(self, node_id: str) -> Mapping[str, Any]:
        return self.prompt[node_id]

    def has_node(self, node_id: str) -> bool:
        return node_id in self.prompt

    def all_node_ids(self) -> set[str]:
        return set(self.prompt)


def run(
    workflow: Workflow,
    nodes: Mapping[str, type[Any]],
    *,
    on_event: OnEvent = lambda _: None,
    folders: Folders | None = None,
    extra_pnginfo: Mapping[str, Any] | None = None,
) -> RunResult:
    """Validate, then execute what the output nodes need, each node after its inputs, under `torch.inference_mode`.

    Nodes of the same class with the same inputs and the same IS_CHANGED share one execution. Inputs that a node
    declares lazy are computed when its `check_lazy_status` asks for them. Results are released after their last use.

    Args:
        nodes: node classes by class_type, in ComfyUI's class-attribute form.
        folders: where the files that nodes report lie; without it the result names no files.
        extra_pnginfo: what nodes receive as the hidden input EXTRA_PNGINFO, to be written into files; a node may add to
            it.

    Raises:
        ValidationError: the workflow cannot run; nothing has run.
        NodeError: a node failed, with its own exception chained.
        KeyboardInterrupt, Cancelled: the user stopped the run.
    """
    schemas = schemas_of(nodes)
    workflow = validate(workflow, schemas)
    prompt = workflow.to_api()
    hidden = {
        "PROMPT": _carried(prompt, folders),
        "DYNPROMPT": DynamicPrompt(prompt),
        "EXTRA_PNGINFO": dict(extra_pnginfo or {}),
    }
    with torch.inference_mode(), host.current.workflow():
        plan = Plan.of(workflow, nodes, schemas)
        for node_id, kept in plan.same_as.items():
            if node_id != kept:
                on_event(Event("cached", workflow.nodes[node_id]))
        ui = _Execution(plan, nodes, schemas, hidden, on_event).run()
    return RunResult(ui, tuple(folders.reported(ui)) if folders else ())


def _carried(prompt: Mapping[str, Any], folders: Folders | None) -> dict[str, Any]:
    """The prompt as files carry it to other people: without the paths of this machine."""
    if folders is None:
        return dict(prompt)

    def told(value: Any) -> Any:
        return folders.told(value) if isinstance(value, str) else value

    return {
        node_id: {**node, "inputs": {name: told(value) for name, value in node["inputs"].items()}}
        for node_id, node in prompt.items()
    }


class _Execution:
    """The state of one run: what is finished, results that are still needed, lazy inputs that were asked for."""

    def __init__(
        self,
        plan: Plan,
        nodes: Mapping[str, type[Any]],
        schemas: Mapping[str, NodeSchema],
        hidden: Mapping[str, Any],
        on_event: OnEvent,
    ):
        self.plan, self.nodes, self.schemas, self.hidden, self.on_event = plan, nodes, schemas, hidden, on_event
        self.waiting: dict[str, set[str]] = defaultdict(set)
        for node in plan.nodes.values():
            for link in node.links.values():
                self.waiting[link.node_id].add(node.id)
        self.asked: dict[str, set[str]] = defaultdict(set)
        self.finished: set[str] = set()
        self.objects: dict[str, Any] = {}
        self.results: dict[str, list[list[Any]]] = {}
        self.ui: dict[str, dict[str, list]] = {}

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
            elif sources := self._unfinished(node) or self._asked_lazily(node):
                stack += reversed(sources)
            else:
                self._execute(node)
                self._release(node)

    def _unfinished(self, node: NodeSpec) -> list[str]:
        specs, asked = self.schemas[node.class_type].inputs, self.asked[node.id]
        return [
            link.node_id
            for name, link in node.links.items()
            if link.node_id not in self.finished
            and (name in asked or name not in specs or not specs[name].options.get("lazy"))
        ]

    def _asked_lazily(self, node: NodeSpec) -> list[str]:
        with _blamed_on(node):
            check = getattr(self._instance(node), "check_lazy_status", None)
            for names in self._call(node, check) if check else ():
                self.asked[node.id].update(names or ())
        return self._unfinished(node)

    def _execute(self, node: NodeSpec) -> None:
        schema, cls = self.schemas[node.class_type], self.nodes[node.class_type]
        self.on_event(Event("start", node, len(self.finished) + 1, len(self.plan.nodes)))
        with _blamed_on(node):
            function = getattr(self._instance(node), cls.FUNCTION)
            calls = [Returned.of(value, schema) for value in self._call(node, function)]
            if ui := merged_ui(calls):
                self.ui[node.id] = ui
            if self.waiting[node.id]:
                is_list = getattr(cls, "OUTPUT_IS_LIST", [False] * len(schema.outputs))
                self.results[node.id] = merged_outputs(calls, is_list)

    def _call(self, node: NodeSpec, function: Any) -> Iterator[Any]:
        cls, hidden = self.nodes[node.class_type], {**self.hidden, "UNIQUE_ID": node.id}
        values = arguments(node, self.schemas[node.class_type], self.results, hidden)
        return mapped(function, values, getattr(cls, "INPUT_IS_LIST", False))

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
def _blamed_on(node: NodeSpec) -> Iterator[None]:
    try:
        yield
    except Cancelled:
        raise
    except Exception as error:
        # A library's or the pack's own kind of ValueError speaks to the user as well.
        kind = "ValueError" if isinstance(error, ValueError) else type(error).__name__
        raise NodeError(node, kind, str(error)) from error
