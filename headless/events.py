"""What a run reports while it goes on, the same in this process and on a server."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .workflow import NodeSpec


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
