"""Disks that are full or read-only. What a command is there for is refused in clear words and leaves nothing; what it
writes beside that costs a warning at most.
"""

import contextlib
import itertools
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.attack import Trial
from tests.attack.processes import files, partial_files, run, scratch
from tests.attack.work import Bench, bench, results

ROOM = 2**11
"""Bytes that fit on the full disk, for each file: less than any result, more than what a quiet command says."""

SIDE = ("wancore", "previews")
"""Folders below the output folder for what a run writes beside its video."""


@contextlib.contextmanager
def mounted(place: Path, options: str) -> Iterator[bool]:
    """A small disk at `place`; False where this process may not mount one."""
    place.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True)
    try:
        yield not done.returncode
    finally:
        if not done.returncode:
            subprocess.run(["umount", "-l", place], check=True)


@contextlib.contextmanager
def bad_folders(out: Path, how: str) -> Iterator[None]:
    """Folders below `out` that take nothing: on a full disk, a read-only one, or a file in their place."""
    with contextlib.ExitStack() as stack:
        for name in SIDE:
            place = out / name
            if how != "file" and stack.enter_context(mounted(place, {"full": "size=4k", "read-only": "ro"}[how])):
                if how == "full":
                    (place / "all there is room for").write_bytes(b"x" * 4096)
                continue
            with contextlib.suppress(OSError):
                place.rmdir()
            place.write_text("a file in the way")
        yield


@dataclass(frozen=True)
class Case:
    """A command on a bad disk, and whether what it is there for is made all the same."""

    job: str
    how: str
    more: tuple[str, ...] = ()
    is_made: bool = True


CASES = (
    Case("sample", "full", ("--preview-every", "1")),
    Case("sample", "no room", ("--quiet",), is_made=False),
    Case("convert", "no room", is_made=False),
    Case("sample", "full log"),
    Case("sample", "read-only", ("--preview-every", "1")),
    Case("sample", "file", ("--preview-every", "1")),
    Case("extract", "no room", is_made=False),
    Case("train", "no room", is_made=False),
)


QUICK = 3
"""Trials in the tests."""


def attack(count: int, seed: int) -> Iterator[Trial]:
    """All cases, in turns; nothing in them is random."""
    with scratch("disks") as folder:
        for number, case in zip(range(count), itertools.cycle(CASES), strict=False):
            out = folder / f"trial_{number}"
            out.mkdir()
            try:
                trial = (made if case.is_made else refused)(bench(), case, out)
            except TimeoutError as error:
                trial = Trial("", "hang", str(error))
            yield Trial(f"{case.job}, {case.how}", trial.verdict, trial.detail)


def made(bench: Bench, case: Case, out: Path) -> Trial:
    """What is written beside the video fails; the video comes."""
    job, (whole, _) = bench.jobs[case.job], bench.undisturbed(case.job)
    options = {"errors": "/dev/full"} if case.how == "full log" else {}
    around = contextlib.nullcontext() if options else bad_folders(out, case.how)
    with around:
        code, said = run(job.module, (*job.words(out), *case.more), out.parent / "log", **options)
        found = {name: content for name, content in results(job, out).items() if name.endswith(".mp4")}
    if code:
        return Trial("", "lost", f"ended with {code}: {said[-300:]}")
    if found != {name: content for name, content in whole.items() if name.endswith(".mp4")}:
        return Trial("", "lost", f"{sorted(found)}")
    warnings = ("cannot be kept", "No preview")
    if not options and any(said.count(words) < 1 or said.count(words) > 2 for words in warnings):
        return Trial("", "raw", f"not one warning of each kind: {said[-500:]}")
    return Trial("", "survived") if not partial_files(out) else Trial("", "left over", str(partial_files(out)))


def refused(bench: Bench, case: Case, out: Path) -> Trial:
    """Nothing fits; once there is room, the same command makes everything."""
    job, (whole, _) = bench.jobs[case.job], bench.undisturbed(case.job)
    code, said = run(job.module, (*job.words(out), *case.more), out.parent / "log", room=ROOM)
    if code not in (1, 2) or "too large" not in said or "Traceback" in said:
        return Trial("", "raw", f"ended with {code}: {said[-400:]}")
    if partial_files(out) or results(job, out):
        return Trial("", "left over", f"{sorted(files(out))}")
    code, said = run(job.module, job.words(out), out.parent / "log")
    if code or results(job, out) != whole:
        return Trial("", "lost", f"the next attempt ended with {code}: {said[-300:]}")
    return Trial("", "clear")
