"""What a command changes in a workflow before it runs: `--set`, `--tiny`, and the dates in names of files."""

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from wan_core.recommend import AUTO, CHOICES

from .schema import InputSpec, NodeSchema, finite_float
from .workflow import Link, NodeSpec, Workflow, WorkflowError, nearest

PREFIX = "filename_prefix"

DATE_PART = re.compile("dd?|MM?|hh?|mm?|ss?|yyy?y?")

NOT_IN_NAMES = re.compile(r'[/?<>\\:*|"\x00-\x1f\x7f]')
"""What the editor replaces by an underscore in a value that becomes a part of a file's name."""


def apply_tiny(workflow: Workflow, nodes: Mapping[str, type[Any]]) -> Workflow:
    """The workflow with the inputs that each node's `tiny(inputs)` gives in place of its own.

    A node class has a tiny form when it has a classmethod `tiny`; it receives the node's inputs in API form.

    Raises:
        WorkflowError: no node of the workflow has a tiny form, so that it would run at full size.
    """
    prompt = workflow.to_api()
    changed = [node for node in workflow.nodes.values() if hasattr(nodes.get(node.class_type), "tiny")]
    if not changed:
        raise WorkflowError("--tiny: no node of this workflow has a tiny form; leave --tiny out.")
    return workflow.with_all({node.id: nodes[node.class_type].tiny(prompt[node.id]["inputs"]) for node in changed})


RECOMMENDED_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "--recommended": {
        "choices": CHOICES,
        "help": "every sampler takes the steps, cfg, shift, solver and noise levels that the authors of its distilled "
        "LoRA or its model publish (auto), or those of the named few-step weights",
    },
    "--more-motion": {"action": "store_true", "help": "with --recommended, against the slow motion of few steps"},
}


def apply_recommended(
    workflow: Workflow, recommended: str | None, more_motion: bool, nodes: Mapping[str, type[Any]]
) -> Workflow:
    """The workflow as `RECOMMENDED_ARGUMENTS` ask for.

    Raises:
        WorkflowError: it has no sampler.
    """
    if not recommended and not more_motion:
        return workflow
    return apply_to_samplers(workflow, {"recommended": recommended or AUTO, "more_motion": more_motion}, nodes)


def apply_to_samplers(workflow: Workflow, values: Mapping[str, Any], nodes: Mapping[str, type[Any]]) -> Workflow:
    """The workflow with these inputs of every node that declares them all, which are its samplers.

    Raises:
        WorkflowError: no node does.
    """

    def declares(node: NodeSpec) -> bool:
        cls = nodes.get(node.class_type)
        return cls is not None and values.keys() <= {name for group in cls.INPUT_TYPES().values() for name in group}

    changed = [node for node in workflow.nodes.values() if declares(node)]
    if not changed:
        raise WorkflowError("--recommended: this workflow has no sampler that takes recommended settings.")
    return workflow.with_all({node.id: dict(values) for node in changed})


def apply_measure(workflow: Workflow) -> Workflow:
    """The workflow with a MagCache on every sampler, in place of its cache, that measures the model.

    Raises:
        WorkflowError: there is no sampler of this pack.
    """
    prompt, name = workflow.to_api(), "MagCache that measures"
    samplers = [node for node in prompt.values() if node["class_type"] == "WanCoreSampler"]
    if not samplers:
        raise WorkflowError("--measure: this workflow has no Sampler (WanCore).")
    for node in samplers:
        node["inputs"]["cache"] = [name, 0]
    prompt[name] = {"class_type": "WanCoreMagCache", "inputs": {"preset": "custom", "template": "measure"}}
    return Workflow.from_api(prompt)


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
        node, name = _split_target(workflow, target)
        schema = schemas.get(node.class_type)
        spec = schema.inputs.get(name) if schema else None
        if spec is None and name not in node.inputs:
            known = dict.fromkeys([*(schema.inputs if schema else ()), *node.inputs])
            raise WorkflowError(f"--set {text!r}: node {node} has no input {name!r}. It has: {nearest(name, known)}.")
        try:
            if spec and schema:
                parsed = _parse(value, spec, any_choice=name in schema.own_checks)
            else:
                # An unknown class declares nothing: the type is that of the value in the file.
                kinds = ((bool, "BOOLEAN"), (int, "INT"), (float, "FLOAT"))
                kind = next((kind for type_, kind in kinds if isinstance(node.inputs[name], type_)), "STRING")
                parsed = _parse(value, InputSpec(name, kind, {}, required=False))
        except WorkflowError as error:
            raise WorkflowError(f"--set {text!r}: {error}") from error
        workflow = workflow.with_inputs(node.id, {name: parsed})
    return workflow


def typed_values(sets: Iterable[str]) -> frozenset[str]:
    """The values of `--set`: typed by the person, so that they cannot come from a stranger's workflow."""
    return frozenset(text.partition("=")[2] for text in sets) - {""}


def _split_target(workflow: Workflow, target: str) -> tuple[NodeSpec, str]:
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


PARSERS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    "INT": (int, "a whole number"),
    "FLOAT": (finite_float, "a finite number"),
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
    if spec.type not in PARSERS:
        raise WorkflowError(f"{spec.name} takes a {spec.type} from another node; it cannot be typed.")
    parse, expected = PARSERS[spec.type]
    try:
        return parse(text)
    except ValueError:
        raise WorkflowError(f"{spec.name} expects {expected}, not {text!r}.") from None


def expand_prefixes(workflow: Workflow, now: datetime | None = None) -> Workflow:
    """The workflow with the replacements that the editor makes in each `filename_prefix` when it queues a workflow.

    `%date:yyyy-MM-dd%` becomes `now`, and `%Node.widget%` the value of a node that is found by its class or else its
    title. Anything else between percent signs is left: the node that saves replaces `%width%` and the like.
    """
    original, now = workflow, now or datetime.now()
    for node in workflow.nodes.values():
        prefix = node.inputs.get(PREFIX)
        if isinstance(prefix, str) and "%" in prefix:
            expanded = re.sub(r"%([^%]+)%", lambda found: _replacement(found, original, now), prefix)
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
