"""Asking a run to end: Ctrl-C, SIGTERM, a closed terminal, or a file. The step that runs is finished, and all saved."""

import contextlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from wan_core.atomic import abandon

SIGNALS = (signal.SIGINT, signal.SIGTERM)
QUIT_NOW = 130


class StopRequest:
    """Whether the run shall end after the step that runs."""

    def __init__(self, file: Path) -> None:
        """`file`: its appearance is a request too."""
        self._file = file
        self._seen: Counter[int] = Counter()

    def __bool__(self) -> bool:
        return bool(self._seen) or self._file.exists()

    def obeyed(self) -> None:
        """Remove the file, so that the run can be continued."""
        with contextlib.suppress(OSError):
            self._file.unlink()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block signals ask for the end; the second one of a kind quits on the spot.

        A launcher passes on as SIGTERM the Ctrl-C that the terminal has sent to every process, so signals of two kinds
        are one wish.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = list(SIGNALS)
        # `nohup` has it ignored, and means that.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen[number] += 1
        if self._seen[number] > 1:
            abandon()
            os._exit(QUIT_NOW)
