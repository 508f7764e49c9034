"""What a batch tells: a line for each job with an estimate of the rest, a table, and a page of pictures."""

import csv
import html
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from wan_core.atomic import replacing

from ..runner import Event
from .drive import Finished
from .jobs import Job
from .results import SHEET, STILLS, SUMMARY, Results

STEP_INTERVAL = 10.0
"""Seconds between two lines about the steps of one job."""

LISTED = 20
"""Failed jobs whose reasons are printed; the table in the folder has all."""

COLUMNS = ("id", "status", "files", "seconds", "seeds", "workflow", "worker", "attempts", "error")


class Progress:
    """Prints a line to stderr for each job that ends, and now and then one about the steps of a long one."""

    def __init__(self, jobs: Sequence[Job], before: int, invalid: Mapping[str, str], quiet: bool) -> None:
        """
        Args:
            before: how many were finished before.
            invalid: what is wrong with jobs that are left out.
        """
        self.left = Counter(job.group for job in jobs)
        self.total, self.done = len(jobs) + before + len(invalid), before + len(invalid)
        self.failed = dict(invalid)
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        self.workers: Counter[str] = Counter()
        self.continued = 0
        self.quiet, self.begun, self.shown = quiet, time.monotonic(), time.monotonic()

    def finished(self, each: Finished) -> None:
        """Count an attempt that ended, and tell of it."""
        job, outcome = each.job, each.outcome
        if outcome is None:
            self._say(f"{job.id}: its worker {each.worker} is lost ({each.lost}); it continues elsewhere.")
            return
        if outcome.status == "elsewhere":
            return
        self.done += 1
        self.left[job.group] -= 1
        how = {"before": "finished by another driver", "failed": f"failed: {outcome.error}"}.get(outcome.status, "")
        if outcome.status == "failed":
            self.failed[job.id] = outcome.error
        elif outcome.status == "done":
            self.seconds[job.group].append(outcome.seconds)
            self.workers[each.worker] += 1
            self.continued += outcome.continued
            how = f"{outcome.seconds:.1f} s"
        failed = f", {len(self.failed)} failed" if self.failed else ""
        self._say(f"[{self.done}/{self.total}] {job.id}: {how}{self._estimate()}{failed}")

    def step(self, event: Event) -> None:
        """Tell of the steps inside of a job that takes long."""
        if event.kind == "progress" and time.monotonic() - self.shown > STEP_INTERVAL:
            self._say(f"    {event.text or 'step'} {event.done}/{event.total}")

    def _estimate(self) -> str:
        """The time that is left, from the seconds of a job of each group so far and the films of this run."""
        known = [seconds for each in self.seconds.values() for seconds in each]
        if not known or not sum(self.left.values()):
            return ""
        mean = sum(known) / len(known)
        means = {group: sum(each) / len(each) for group, each in self.seconds.items() if each}
        work = sum(count * means.get(group, mean) for group, count in self.left.items())
        # What one second of waiting has brought so far: with several workers more than one of work.
        pace = sum(known) / max(time.monotonic() - self.begun, 1e-3)
        return f", about {duration(work / max(pace, 1e-3))} left"

    def _say(self, text: str) -> None:
        self.shown = time.monotonic()
        if not self.quiet:
            # Progress that cannot be written must not stop the batch.
            with suppress(OSError):
                sys.stderr.write(f"{text}\n")
                sys.stderr.flush()

    def summary(self, results: Results) -> str:
        """The table for the end."""
        seconds, made = time.monotonic() - self.begun, sum(self.workers.values())
        rows = [
            ("finished", str(self.done - len(self.failed))),
            (
                "of these now",
                f"{made} in {duration(seconds)}" + (f", {made / seconds * 3600:.0f} an hour" if made else ""),
            ),
            ("continued after a loss", str(self.continued)),
            ("failed", str(len(self.failed))),
            ("results", str(results.root)),
            ("to look at", str(results.root / SHEET)),
        ]
        table = [f"{name:<24}{value}" for name, value in rows]
        table += [f"  {worker:<32}{count} jobs" for worker, count in sorted(self.workers.items())] * (
            len(self.workers) > 1
        )
        reasons = [f"  {job_id}: {reason}" for job_id, reason in list(self.failed.items())[:LISTED]]
        if len(self.failed) > LISTED:
            reasons.append(f"  ... and {len(self.failed) - LISTED} more, in {results.root / SUMMARY}")
        return "\n".join([*table, *(["Failed; the same command tries them again:", *reasons] if reasons else [])])


def duration(seconds: float) -> str:
    """Such as `40 s`, `12 min` or `5.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Line:
    """A job in the table and on the page. `record` is its sidecar, or what is known of its failure."""

    job: Job
    status: str
    record: Mapping[str, Any]

    @property
    def files(self) -> list[str]:
        return [file["name"] for file in self.record.get("files", ())]


def lines(jobs: Sequence[Job], results: Results, failed: Mapping[str, str]) -> list[Line]:
    """Every job as it stands in the folder now."""
    found = []
    for job in jobs:
        if (record := results.finished(job.id)) is not None:
            found.append(Line(job, "done", record))
        else:
            known = results.failure(job.id) or ({"error": failed[job.id]} if job.id in failed else None)
            found.append(Line(job, "failed" if known else "not made", known or {}))
    return found


def write_summary(table: Sequence[Line], results: Results) -> None:
    """The table as CSV, one row a job."""
    with replacing(results.root / SUMMARY) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for line in table:
            job = line.job
            lists = {"seeds": " ".join(map(str, job.seeds)), "files": " ".join(line.files)}
            writer.writerow({**line.record, "id": job.id, "workflow": job.workflow, "status": line.status, **lists})


STYLE = """
body { font: 14px system-ui, sans-serif; margin: 1.5em; background: #16181d; color: #dde; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 1em; }
figure { margin: 0; background: #22252c; border-radius: 6px; overflow: hidden; }
figure img, figure .none { width: 100%; aspect-ratio: 16 / 9; object-fit: contain; background: #000; display: block; }
figcaption { padding: .5em .7em; overflow-wrap: anywhere; }
figcaption small { color: #99a; display: block; } .failed { color: #f88; } a { color: inherit; }
"""


def write_sheet(table: Sequence[Line], results: Results) -> None:
    """A page with a picture of every film, which leads to the film."""
    count = Counter(line.status for line in table)
    figures = "\n".join(map(_figure, table, (results.still(line.job.id).is_file() for line in table)))
    told = ", ".join(f"{number} {status}" for status, number in count.items())
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(results.root.name)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(results.root.name)}</h1><p>{told}</p><main>{figures}</main></html>"
    )
    with replacing(results.root / SHEET) as partial:
        partial.write_text(page, encoding="utf-8")


def _figure(line: Line, has_still: bool) -> str:
    job = line.job
    picture = (
        f'<img loading="lazy" alt="" src="{STILLS}/{quote(job.id)}.jpg">' if has_still else '<div class="none"></div>'
    )
    if line.files:
        picture = f'<a href="{quote(line.files[0])}">{picture}</a>'
    values = "; ".join(f"{name} {value}" for name, value in job.values.items())
    facts = [
        f"{line.record['seconds']} s" if "seconds" in line.record else "",
        " ".join(f"seed {s}" for s in job.seeds),
    ]
    error = f'<small class="failed">{html.escape(line.record["error"])}</small>' if "error" in line.record else ""
    return (
        f"<figure>{picture}<figcaption>{html.escape(job.id)}<small>{html.escape(values)}</small>"
        f"<small>{html.escape(', '.join(filter(None, facts)))}</small>{error}</figcaption></figure>"
    )
