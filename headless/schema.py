"""What nodes declare, and the check of a workflow against it before anything runs.

A class in this process and an `/object_info` entry of a server are read into one form, `NodeSchema`. The check has
ComfyUI's own rules, error types and wording. Four things are stricter than the host, which would go on with a value
nobody meant: NaN and infinity are refused, text is not taken for a BOOLEAN, no constant for what only a node can give,
and one invalid output branch refuses the whole run instead of being left out of it.
"""

import inspect
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import islice
from typing import Any

from ..nodes.sockets import LINKED
from .workflow import Link, NodeSpec, Workflow, WorkflowError, nearest, needed_nodes

log = logging.getLogger("wancore")

UPLOADS = ("image_upload", "video_upload", "audio_upload", "file_upload")
"""Options of a combo that names a file of the input folder; such a file may be uploaded with the workflow."""

INPUT_TYPES = "input_types"
"""The parameter of VALIDATE_INPUTS that receives the types of the linked inputs."""

LONGEST_LIST = 20
"""The host prints a combo's choices up to this many."""

MOST_LISTED = 20
"""Unknown names that are reported, and compared with the known ones."""

EDITOR_ONLY = frozenset({"upload"})
"""Names that the editor's export writes beside the declared inputs."""


@dataclass(frozen=True)
class InputSpec:
    """One declared input. `type` is the socket type, or for a combo "COMBO" with its `choices` in order."""

    name: str
    type: str
    options: Mapping[str, Any]
    required: bool
    choices: tuple[Any, ...] | None = None

    @property
    def takes_file(self) -> bool:
        return any(self.options.get(flag) for flag in UPLOADS)

    @classmethod
    def parse(cls, name: str, entry: Any, required: bool) -> "InputSpec":
        """Read `(type, options)`; a combo's choices stand in place of the type, or among the options of a "COMBO"."""
        declared, options = entry[0], (entry[1] if len(entry) > 1 else None) or {}
        if isinstance(declared, (list, tuple)):
            return cls(name, "COMBO", options, required, tuple(declared))
        choices = options.get("options") if declared == "COMBO" else None
        return cls(name, declared, options, required, None if choices is None else tuple(choices))

    def accepts(self, received: Any) -> bool:
        """Whether an output of type `received` may be linked here: a type in common, or `*` on either side."""
        if isinstance(received, (list, tuple)):
            return self.choices == tuple(received) or self.type == "*"
        # Packs subclass str with their own `!=` to let an input take any type; the host honours that.
        if not received != self.type:  # noqa: SIM202
            return True
        ours, theirs = ({part.strip() for part in text.split(",")} for text in (self.type, received))
        return bool(ours & theirs) or "*" in ours | theirs


@dataclass(frozen=True)
class NodeSchema:
    """One node class. `hidden` maps parameter names to what the host puts there (PROMPT, UNIQUE_ID, ...).

    `validate_inputs` is the class's own check, VALIDATE_INPUTS, where the class is in this process. As on the host, it
    replaces the checks of range, choices and link type for the inputs in `own_checks`. For a class on a server these
    are all inputs: only the server knows its checks.
    """

    class_type: str
    inputs: Mapping[str, InputSpec]
    hidden: Mapping[str, str]
    outputs: tuple[Any, ...]
    is_output: bool
    own_checks: frozenset[str]
    validate_inputs: Callable[..., bool | str] | None = None

    @classmethod
    def of_class(cls, class_type: str, node: type[Any]) -> "NodeSchema":
        declared = node.INPUT_TYPES()
        inputs = _inputs(declared)
        # Of our loaders, which say there what ComfyUI would repeat.
        check = getattr(node, "CHECK_INPUTS", None) or getattr(node, "VALIDATE_INPUTS", None)
        return cls(
            class_type,
            inputs,
            dict(declared.get("hidden") or {}),
            tuple(node.RETURN_TYPES),
            getattr(node, "OUTPUT_NODE", False) is True,
            _parameters(check, inputs) if check else frozenset(),
            check,
        )

    @classmethod
    def of_server(cls, class_type: str, info: Mapping[str, Any]) -> "NodeSchema":
        declared = info["input"]
        inputs = _inputs(declared)
        return cls(
            class_type,
            inputs,
            dict(declared.get("hidden") or {}),
            tuple(info["output"]),
            info.get("output_node") is True,
            frozenset({*inputs, INPUT_TYPES}),
        )


def schemas_of(nodes: Mapping[str, type[Any]]) -> dict[str, NodeSchema]:
    """The schema of each node class in this process."""
    return {class_type: NodeSchema.of_class(class_type, node) for class_type, node in nodes.items()}


def _parameters(check: Callable[..., bool | str], inputs: Iterable[str]) -> frozenset[str]:
    """The names that a VALIDATE_INPUTS takes; all inputs where it takes `**kwargs`."""
    parameters = inspect.signature(check).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return frozenset({*parameters, *(inputs if takes_all else ())})


def _inputs(declared: Mapping[str, Any]) -> dict[str, InputSpec]:
    return {
        name: InputSpec.parse(name, entry, group == "required")
        for group in ("required", "optional")
        for name, entry in (declared.get(group) or {}).items()
    }


@dataclass(frozen=True)
class Issue:
    """A problem of the workflow or of one `node`; `type`, `message` and `details` are ComfyUI's."""

    type: str
    message: str
    details: str
    node: NodeSpec | None = None

    def __str__(self) -> str:
        where = f"{self.node}: " if self.node else ""
        return where + self.message + (f": {self.details}" if self.details else "")


class ValidationError(WorkflowError):
    """The workflow cannot run; `issues` are all the reasons. Nothing has run."""

    def __init__(self, issues: Sequence[Issue]):
        self.issues = tuple(issues)
        super().__init__("The workflow cannot run:\n" + "\n".join(f"  - {issue}" for issue in self.issues))


def validate(workflow: Workflow, schemas: Mapping[str, NodeSchema]) -> Workflow:
    """The workflow with its constants converted to the declared types, where every node that an output needs is valid.

    Nodes that no output needs are kept as they are, but their class must exist, as on the host.

    Raises:
        ValidationError: one or more issues, all of them at once.
    """
    unknown = [
        Issue(
            "invalid_prompt",
            f"Cannot execute because node {node.class_type} does not exist.",
            f"Node ID '#{node.id}'. Nearest: {', '.join(nearest(node.class_type, schemas).split(', ')[:3])}",
            node,
        )
        for node in islice((n for n in workflow.nodes.values() if n.class_type not in schemas), MOST_LISTED)
    ]
    if unknown:
        raise ValidationError(unknown)
    outputs = [node.id for node in workflow.nodes.values() if schemas[node.class_type].is_output]
    if not outputs:
        raise ValidationError([Issue("prompt_no_outputs", "Prompt has no outputs", "")])
    needed = needed_nodes(workflow, outputs)
    issues: list[Issue] = []
    converted = {}
    try:
        dependency_order(workflow, needed)
    except ValidationError as error:
        issues += error.issues
    for node_id in needed:
        node = workflow.nodes[node_id]
        converted[node_id], found = _check_node(node, schemas[node.class_type], workflow, schemas)
        issues += found
    if issues:
        raise ValidationError(issues)
    return workflow.with_all(converted)


def dependency_order(workflow: Workflow, needed: Iterable[str]) -> list[str]:
    """The ids of `needed`, each after those it links to.

    Raises:
        ValidationError: the links form a cycle.
    """
    ids = list(needed)
    known = set(ids)
    graph = {id_: [link.node_id for link in workflow.nodes[id_].links.values() if link.node_id in known] for id_ in ids}
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        ring = " -> ".join(f"#{node_id}" for node_id in error.args[1])
        raise ValidationError([Issue("dependency_cycle", "Dependency cycle detected", ring)]) from error


def _check_node(
    node: NodeSpec, schema: NodeSchema, workflow: Workflow, schemas: Mapping[str, NodeSchema]
) -> tuple[dict[str, Any], list[Issue]]:
    inputs: dict[str, Any] = {}
    issues = []
    received = {}
    for name, spec in schema.inputs.items():
        if name not in node.inputs:
            if spec.required:
                issues.append(Issue("required_input_missing", "Required input is missing", name, node))
            continue
        value = node.inputs[name]
        try:
            if isinstance(value, (Link, list)):
                received[name] = _check_link(
                    spec, value, workflow, schemas, check_type=INPUT_TYPES not in schema.own_checks
                )
            elif spec.type in LINKED:
                message = "Only another node can give this input"
                raise _InvalidInputError("bad_linked_input", message, f"{name}, {spec.type}, not {value!r:.100}")
            else:
                inputs[name] = _convert(spec, value)
                if name not in schema.own_checks:
                    _check_constant(spec, inputs[name])
        except _InvalidInputError as error:
            kind, message, details = error.args
            issues.append(Issue(kind, message, details, node))
        except Exception as error:
            issues.append(_exception(node, f"{name}: {error}"))
    for name in islice(node.inputs.keys() - schema.inputs.keys() - schema.hidden.keys() - EDITOR_ONLY, MOST_LISTED):
        log.warning("%s has no input %r; it is ignored. It has: %s.", node, name, nearest(name, schema.inputs))
    if schema.validate_inputs and not issues:
        issues += _own_validation(node, schema.validate_inputs, schema.own_checks, {**node.inputs, **inputs}, received)
    return inputs, issues


class _InvalidInputError(Exception):
    """(type, message, details) of an issue."""


def _check_link(
    spec: InputSpec,
    value: Link | list[Any],
    workflow: Workflow,
    schemas: Mapping[str, NodeSchema],
    check_type: bool,
) -> Any:
    if not isinstance(value, Link):
        message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
        raise _InvalidInputError("bad_linked_input", message, f"{spec.name}: {value}")
    source = workflow.nodes.get(value.node_id)
    if source is None:
        raise LookupError(f"linked to node #{value.node_id}, which is not in the workflow")
    outputs = schemas[source.class_type].outputs
    if not 0 <= value.slot < len(outputs):
        raise LookupError(f"linked to output {value.slot} of {source}, which has {len(outputs)} outputs")
    received = outputs[value.slot]
    if check_type and not spec.accepts(received):
        declared = list(spec.choices) if spec.choices is not None else spec.type
        details = f"{spec.name}, received_type({received}) mismatch input_type({declared})"
        raise _InvalidInputError("return_type_mismatch", "Return type mismatch between linked nodes", details)
    return received


def finite_float(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


def _boolean(value: Any) -> bool:
    if isinstance(value, str):
        raise ValueError("text; write true or false without quotes")
    return bool(value)


CONVERSIONS: Mapping[str, Callable[[Any], Any]] = {
    "INT": int,
    "FLOAT": finite_float,
    "STRING": str,
    "BOOLEAN": _boolean,
}


def _convert(spec: InputSpec, value: Any) -> Any:
    if isinstance(value, dict) and "__value__" in value:
        value = value["__value__"]
    convert = CONVERSIONS.get(spec.type)
    try:
        return convert(value) if convert else value
    except (TypeError, ValueError, OverflowError) as error:
        message = f"Failed to convert an input value to a {spec.type} value"
        raise _InvalidInputError("invalid_input_type", message, f"{spec.name}, {value!s:.200}, {error}") from error


def _check_constant(spec: InputSpec, value: Any) -> None:
    low, high = spec.options.get("min"), spec.options.get("max")
    if low is not None and value < low:
        raise _InvalidInputError("value_smaller_than_min", f"Value {value} smaller than min of {low}", spec.name)
    if high is not None and value > high:
        raise _InvalidInputError("value_bigger_than_max", f"Value {value} bigger than max of {high}", spec.name)
    if spec.choices is None or spec.takes_file:
        return
    # A multi-select combo carries a list of choices.
    chosen = value if isinstance(value, list) and spec.options.get("multiselect") else [value]
    for item in chosen:
        if item not in spec.choices:
            count = len(spec.choices)
            listed = str(list(spec.choices)) if count <= LONGEST_LIST else f"(list of length {count})"
            raise _InvalidInputError(
                "value_not_in_list", "Value not in list", f"{spec.name}: '{item!s:.200}' not in {listed}"
            )


def _own_validation(
    node: NodeSpec,
    validate_inputs: Callable[..., bool | str],
    wanted: Collection[str],
    inputs: Mapping[str, Any],
    received: Mapping[str, Any],
) -> list[Issue]:
    """Call VALIDATE_INPUTS as the host does: constants it names as they are, linked inputs it names as None."""
    arguments = {name: None if isinstance(value, Link) else value for name, value in inputs.items() if name in wanted}
    named = ", ".join(arguments)
    if INPUT_TYPES in wanted:
        arguments[INPUT_TYPES] = dict(received)
    try:
        answer = validate_inputs(**arguments)
    except Exception as error:
        return [_exception(node, str(error))]
    if answer is True:
        return []
    details = named if answer is False else f"{named} - {answer}"
    return [Issue("custom_validation_failed", "Custom validation failed for node", details, node)]


def _exception(node: NodeSpec, details: str) -> Issue:
    return Issue("exception_during_validation", "Exception when validating node", details, node)
