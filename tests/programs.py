"""How long tests wait for what another program does.

No test claims a speed by a limit of seconds: on a busy machine, or a slow one, everything takes many times as long.
"""

import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 600.0
"""Seconds after which something counts as hanging."""


def wait_for(look: Callable[[], T], process: subprocess.Popen[str] | None = None, every: float = 0.02) -> T:
    """What `look` gives, as soon as that is true; `process` is what it waits for, and must not end before. `every` is
    the pause between two looks, in seconds.
    """
    end = time.monotonic() + PATIENCE
    while True:
        ended = process is not None and process.poll() is not None
        if found := look():
            return found
        if ended:
            raise AssertionError(f"the program ended with {process.returncode}: {_output(process)}")
        if time.monotonic() > end:
            raise AssertionError(f"did not happen in {PATIENCE:.0f} s: {look}")
        time.sleep(every)


def _output(process: subprocess.Popen[str]) -> str:
    return "\n".join(text for text in process.communicate() if text)
