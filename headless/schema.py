"""What a node declares, in one form for a class in this process and for an `/object_info` entry of a server."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

UPLOADS = ("image_upload", "video_upload", "audio_upload", "file_upload")
"""Options that say that a combo names a file of the input folder, which may be brought along with the workflow."""

INPUT_TYPES = "input_types"
"""The parameter of VALIDATE_INPUTS that receives the types of the linked inputs."""


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

    `validate_inputs` is the class's own check where the class lives in this process. The host leaves range, choices and
    link type of the inputs in `own_checks` to that check; for a class on a server these are all of them, because only
    the server knows its checks.
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
        inputs, check = _inputs(declared), getattr(node, "VALIDATE_INPUTS", None)
        return cls(
            class_type,
            inputs,
            dict(declared.get("hidden") or {}),
            tuple(node.RETURN_TYPES),
            getattr(node, "OUTPUT_NODE", False) is True,
            _named(check, inputs) if check else frozenset(),
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


def _named(check: Callable[..., bool | str], inputs: Iterable[str]) -> frozenset[str]:
    parameters = inspect.signature(check).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return frozenset({*parameters, *(inputs if takes_all else ())})


def _inputs(declared: Mapping[str, Any]) -> dict[str, InputSpec]:
    return {
        name: InputSpec.parse(name, entry, group == "required")
        for group in ("required", "optional")
        for name, entry in (declared.get(group) or {}).items()
    }
