"""What the pack logs while a node runs, shown on that node of the editor."""

import logging
from collections.abc import Callable

Running = Callable[[], tuple[str, str] | None]
"""The prompt and the node that are running, by their ids; None outside of a prompt."""


class OnNode(logging.Handler):
    """Shows each line that is logged while a node runs on that node, once, below the earlier ones of the same run.

    A record with the attribute `passing` is of the moment: the next one of that kind takes its place.
    """

    def __init__(self, running: Running, show: Callable[[str, str], None]) -> None:
        """`show` gets the text and the node's id."""
        super().__init__(logging.INFO)
        self._running, self._show = running, show
        self._place: tuple[str, str] | None = None
        self._lines: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        place = self._running()
        if place is None:
            return
        if place != self._place:
            self._place, self._lines = place, {}
        line, passing = record.getMessage(), getattr(record, "passing", False)
        if not passing:
            self._lines[line] = None
        self._show("\n".join([*self._lines, *([line] if passing else [])]), place[1])
