"""What a run shows of itself in a shell."""

import sys
import time
from contextlib import suppress

from wan_core.runtime import Pace

from .runner import Event

STEP_INTERVAL = 0.5
"""Seconds between two progress lines of one node."""


class Progress:
    """Prints events to stderr; of a node's steps at most one per `STEP_INTERVAL`, and always the last."""

    def __init__(self) -> None:
        self.shown = 0.0
        self.pace = Pace()

    def show(self, event: Event) -> None:
        now = time.monotonic()
        left = ""
        if event.kind == "progress":
            left = self.pace.left(event.text, event.done, event.total)
            if event.done < event.total and now - self.shown < STEP_INTERVAL:
                return
            self.shown = now
        # Progress that cannot be written, as to a full disk, must not stop the run.
        with suppress(OSError):
            sys.stderr.write(f"{self._line(event)}{left}\n")
            sys.stderr.flush()

    @staticmethod
    def _line(event: Event) -> str:
        match event.kind:
            case "start":
                return f"[{event.done}/{event.total}] {event.node}"
            case "cached":
                return f"{event.node}: reused"
            case "queued":
                return f"Waiting: {event.done} run{'s' if event.done > 1 else ''} on the server first."
            case "progress":
                return f"    {event.text or 'step'} {event.done}/{event.total}"
        return event.text
