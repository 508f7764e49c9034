"""Attacks on the pack: damaged files, hostile workflows, wrong calls, kills, races, full disks.

Each kind is a module here with one function, `attack(count, seed) -> Iterator[Trial]`: `count` trials that follow from
`seed`, so that a failure can be repeated. `python -m tests.attack` prints the results of all kinds as a table; the
tests run a small number of each.
"""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["survived", "clear", "raw", "executed", "hang", "lost", "left over", "memory"]
"""The result of a trial.

survived: the work was done, and its result is right. clear: refused with the pack's own error, which names the file or
the parameter. The others are faults. raw: an exception of another kind, or a result that is wrong without a word.
executed: code from a file ran. hang: no answer in time. lost: something that a user made is gone. left over: a file or
process that nobody needs stayed. memory: more than twice the file and 200 MB were taken.
"""

FAULTS = ("raw", "executed", "hang", "lost", "left over", "memory")


@dataclass(frozen=True)
class Trial:
    """One attack: what was tried, in a few words that let it be repeated, what came of it, and the message if any."""

    name: str
    verdict: Verdict
    detail: str = ""
