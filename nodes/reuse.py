"""Nodes that encode pictures, independently of the text beside them: another prompt encodes no picture again."""

import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from wan_core.types import Conditioning

TEXT = ("text", "negative_text")
"""The fields of `Conditioning` that come from the prompt."""

SIZE = ("width", "height", "num_frames")

HIDDEN = {"prompt": "PROMPT", "unique_id": "UNIQUE_ID"}
"""What such a node asks of the host besides its inputs: the whole workflow, and its own place in it."""

Encoder = Callable[..., tuple[Conditioning]]


def apart_from_text(encode: Encoder) -> Encoder:
    """The method `encode` of a node with the inputs `HIDDEN`, which gets its conditioning without text; the text is
    added to what it returns.

    As long as nothing but the text differs from the call before, on the same node, it is not called again. It is not
    called either when a node behind this one is for another size, see `check_sizes`.
    """
    signature = inspect.signature(encode)

    @functools.wraps(encode)
    def call(
        self: Any,
        *values: Any,
        prompt: Mapping[str, Any] | None = None,
        unique_id: str | None = None,
        **inputs: Any,
    ) -> tuple[Conditioning]:
        check_sizes(prompt, unique_id)
        bound = signature.bind(self, *values, **inputs)
        given = dict(bound.arguments)
        whole: Conditioning = given["conditioning"]
        pictures = dataclasses.replace(whole, **dict.fromkeys(TEXT))
        given["conditioning"] = pictures
        key = list(_leaves({name: value for name, value in given.items() if name != "self"}))
        known, result = getattr(self, "_encoded", (None, None))
        if known is None or not _same(known, key):
            bound.arguments["conditioning"] = pictures
            (result,) = encode(*bound.args, **bound.kwargs)
            self._encoded = (key, result)
        assert result is not None
        return (dataclasses.replace(result, **{name: getattr(whole, name) for name in TEXT}),)

    return call


def _leaves(value: Any) -> Iterator[Any]:
    """The parts of a value in order; tensors and modules as weak references, so that none is kept alive."""
    if isinstance(value, (Tensor, nn.Module)):
        yield weakref.ref(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value)
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield name
            yield from _leaves(each)
    elif isinstance(value, (tuple, list)):
        yield len(value)
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _same(first: list[Any], second: list[Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, weakref.ref) and isinstance(b, weakref.ref):
            return a() is not None and a() is b()
        return type(a) is type(b) and a == b

    return len(first) == len(second) and all(map(same, first, second))


def check_sizes(prompt: Mapping[str, Any] | None, node_id: str | None) -> None:
    """Check that the nodes behind `node_id` of a prompt (API format) that add to its conditioning make the same size.

    Linked numbers are not known yet, and checked when their node runs. The sampler's own size is not compared: that of
    the conditioning counts.

    Raises:
        ValueError: two of them differ.
    """
    if not prompt or node_id is None or node_id not in prompt:
        return
    here = _typed(prompt[node_id])
    for key, node in prompt.items():
        if node["inputs"].get("conditioning") == [node_id, 0]:
            there = _typed(node) if node["class_type"] != "WanCoreSampler" else {}
            differing = [name for name in here.keys() & there.keys() if here[name] != there[name]]
            if differing:
                name = min(differing, key=SIZE.index)
                title = (node.get("_meta") or {}).get("title") or node["class_type"]
                raise ValueError(
                    f"{name} is {here[name]} here and {there[name]} in {title} (node {key}), which adds to the same "
                    "video. Make them equal."
                )
            check_sizes(prompt, key)


def _typed(node: Mapping[str, Any]) -> dict[str, int]:
    return {name: value for name in SIZE if isinstance(value := node["inputs"].get(name), int)}
