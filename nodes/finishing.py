"""What is done once everything that a workflow makes is saved. Until then a killed run can be continued."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import host

POLL = 0.25
"""Seconds between two looks at ComfyUI's history."""

Action = Callable[[], None]

_waiting: list[Action] | None = None


@contextmanager
def workflow() -> Iterator[None]:
    """Around a workflow that runs without ComfyUI. After an error nothing of what waits for its end is done."""
    global _waiting
    before, _waiting = _waiting, []
    try:
        yield
        for action in _waiting:
            action()
    finally:
        _waiting = before


def when_saved(action: Action) -> None:
    """Do `action` when what the running node makes is saved: in ComfyUI when the prompt has ended well or, after an
    error, the next one that takes the node's result from the cache; at once where a node is called alone.
    """
    server, running = host.prompt_server(), host.executing()
    if server is not None and running is not None:
        threading.Thread(target=_after, args=(server, *running, action), daemon=True).start()
    elif _waiting is not None:
        _waiting.append(action)
    else:
        action()


def _after(server: Any, prompt_id: str, node_id: str, action: Action) -> None:
    """Do `action` when a prompt has ended well, this one or one after it; nothing once the result of `node_id`, which
    this one made, has left ComfyUI's cache: the node then runs again, and asks again.
    """
    status = _ended(server, prompt_id)
    while status is not None and not status["completed"]:
        while server.last_prompt_id == prompt_id:
            time.sleep(POLL)
        prompt_id = server.last_prompt_id
        status = _ended(server, prompt_id)
        if status is None or node_id not in _from_cache(status):
            return
    if status is not None:
        action()


def _ended(server: Any, prompt_id: str) -> dict[str, Any] | None:
    """How ComfyUI's history says that a prompt has ended, once it has; None where the history was cleared of it."""
    running = True
    while running:
        time.sleep(POLL)
        # Asked first: the next prompt begins after this one has got into the history.
        running = server.last_prompt_id == prompt_id
        for entry in server.prompt_queue.get_history(prompt_id=prompt_id).values():
            return entry["status"]
    return None


def _from_cache(status: dict[str, Any]) -> set[str]:
    """The nodes of a prompt whose results were in ComfyUI's cache when it began."""
    return {node for event, data in status["messages"] if event == "execution_cached" for node in data["nodes"]}
