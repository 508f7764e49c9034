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
    """Do `action` when the workflow that is running has ended well; at once where a node is called alone."""
    server = host.prompt_server()
    if server is not None:
        threading.Thread(target=_after, args=(server, server.last_prompt_id, action), daemon=True).start()
    elif _waiting is not None:
        _waiting.append(action)
    else:
        action()


def _after(server: Any, prompt_id: str, action: Action) -> None:
    """Do `action` when ComfyUI's history says that the prompt has ended well; nothing when it says otherwise."""
    running = True
    while running:
        time.sleep(POLL)
        # Asked first: the next prompt begins after this one has got into the history.
        running = server.last_prompt_id == prompt_id
        for entry in server.prompt_queue.get_history(prompt_id=prompt_id).values():
            if entry["status"]["completed"]:
                action()
            return
