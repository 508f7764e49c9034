"""`python -m tests.attack [KIND ...] [--count N] [--seed N]`: what damaged and hostile input does."""

import argparse
import collections
import importlib
import sys
import time
from collections.abc import Iterator

import pack

pack.register()

from tests.attack import FAULTS, Trial  # noqa: E402

KINDS: dict[str, int] = {
    "calls": 400,
    "media": 2000,
    "pickles": 600,
    "safetensor_files": 2400,
    "training_inputs": 440,
    "workflows": 600,
    "kills": 120,
    "pairs": 70,
    "disks": 16,
}
"""Each kind of attack (a module of this folder) and how many trials a long run makes of it."""


def table(trials: dict[str, list[Trial]], seconds: dict[str, float]) -> Iterator[str]:
    """The lines of a Markdown table: a row per kind, with the number of trials by verdict."""
    columns = ("survived", "clear", *FAULTS)
    yield f"| attack | tried | {' | '.join(columns)} | s |"
    yield "|-|" + "-|" * (len(columns) + 2)
    for kind, outcomes in trials.items():
        counts = collections.Counter(trial.verdict for trial in outcomes)
        numbers = " | ".join(str(counts[column]) for column in columns)
        yield f"| {kind} | {len(outcomes)} | {numbers} | {seconds[kind]:.0f} |"


def main() -> int:
    """Run the attacks, print each fault when it is found, and the table at the end; 1 where there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"kinds of attack (default: all): {', '.join(KINDS)}")
    parser.add_argument("--count", type=int, help="trials of each kind (default: the long run's number of that kind)")
    parser.add_argument("--seed", type=int, default=0, help="where the trials follow from (default: %(default)s)")
    options = parser.parse_args()
    if unknown := set(options.kinds) - KINDS.keys():
        parser.error(f"unknown kind {', '.join(sorted(unknown))}; known: {', '.join(KINDS)}")
    trials, seconds = {}, {}
    for kind in options.kinds or KINDS:
        started = time.monotonic()
        module = importlib.import_module(f".{kind}", __package__)
        trials[kind] = []
        for trial in module.attack(options.count or KINDS[kind], options.seed):
            trials[kind].append(trial)
            if trial.verdict in FAULTS:
                number = len(trials[kind])
                print(f"{kind} {number}: {trial.verdict}: {trial.name}: {trial.detail}", flush=True)
        seconds[kind] = time.monotonic() - started
    sys.stdout.writelines(f"{line}\n" for line in table(trials, seconds))
    return 1 if any(trial.verdict in FAULTS for rows in trials.values() for trial in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
