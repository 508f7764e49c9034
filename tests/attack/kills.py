"""Kills at random moments, by every signal that ends programs; then the same command again. What it makes has to be
what it makes undisturbed, bit for bit, and nothing else may stay.
"""

import itertools
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from tests.attack import Trial
from tests.attack.processes import files, partial_files, run, scratch, start
from tests.attack.work import Bench, bench, results

SIGNALS = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGINT")
ORDER = ("sample", "convert", "extract", "sample", "train")
"""Sampling, decoding and saving a video are one command; it gets twice as many kills."""

TWICE = 0.3
"""The share of trials in which the second attempt is killed too."""

QUICK = 3
"""Trials in the tests: all kinds of work but a training."""


def attack(count: int, seed: int) -> Iterator[Trial]:
    moments = random.Random(seed)
    with scratch("kills") as folder:
        for number, name in zip(range(count), itertools.cycle(ORDER), strict=False):
            kills = [
                (SIGNALS[(number + again) % 4] if not again else moments.choice(SIGNALS), moments.random())
                for again in range(1 + (moments.random() < TWICE))
            ]
            out = folder / f"trial_{number}"
            out.mkdir()
            yield tried(bench(), name, out, kills)


def tried(bench: Bench, name: str, out: Path, kills: list[tuple[str, float]]) -> Trial:
    """One command, killed after these shares of the time that it takes."""
    job = bench.jobs[name]
    whole, seconds = bench.undisturbed(name)
    told = f"{name}, " + ", then ".join(f"{how} after {share:.3f}" for how, share in kills)
    log, was_ready = out.parent / "log", False
    try:
        for how, share in kills:
            process = start(job.module, job.words(out), log)
            time.sleep(share * seconds * 1.05)
            process.send(getattr(signal, how))
            process.wait()
            if how != "SIGKILL" and (left := partial_files(out)):
                return Trial(told, "left over", f"after {how}: {left}")
            if was_ready := results(job, out).keys() >= whole.keys():
                break  # it was faster than the kill, and once more would make the same once more
        if not was_ready or name == "train":
            code, said = run(job.module, job.words(out), log)
            if code:
                return Trial(told, "raw", f"the next attempt ended with {code}: {said[-300:]}")
    except TimeoutError as error:
        return Trial(told, "hang", str(error))
    found = results(job, out)
    if lost := [file for file in whole if found.get(file) != whole[file]]:
        return Trial(told, "lost", f"not as undisturbed: {lost}")
    extra = sorted(set(found) - set(whole)) + partial_files(out)
    if was_ready and how == "SIGKILL":
        # Killed between its last file and its end: what it would have tidied goes with the next run.
        extra = [file for file in extra if "unfinished_" not in file and ".wancore-part" not in file]
    unfinished = [file for file in files(out) if "unfinished_" in file]
    if extra or (unfinished and not was_ready):
        return Trial(told, "left over", f"{extra + unfinished}")
    return Trial(told, "survived")
