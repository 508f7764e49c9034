"""Who makes which job when: the same loop for this process, for actors of a Ray cluster and for ComfyUI servers."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .jobs import Job
from .worker import Outcome, Worker

MOST_LOSSES = 5
"""Workers that may be lost with one job before the job is given up: it may be what ends them."""

PAUSE = 0.5
"""Seconds between two looks at a job that another driver works on."""

WAIT = 2.0
"""Seconds for which a crew waits for the next result."""

PATIENCE = 600.0
"""Seconds without any worker after which a batch is given up."""


class DiskFullError(OSError):
    """There is no room for results; every further film would be lost, too."""


class NoWorkersError(ConnectionError):
    """All workers are gone, and none came back."""


@dataclass(frozen=True)
class Finished:
    """A job that a worker has ended with; `outcome` is None when the worker was lost, for the reason `lost`."""

    worker: str
    job: Job
    outcome: Outcome | None
    lost: str = ""


class Crew(Protocol):
    """Workers, by their names."""

    def free(self) -> Sequence[str]:
        """Those that can take a job now, the best first."""

    def start(self, worker: str, job: Job) -> None:
        """Give a job to a free worker."""

    def finished(self, seconds: float) -> Sequence[Finished]:
        """What has ended, as soon as there is something, or after that time."""

    def alive(self) -> bool:
        """Whether there is a worker, free or not."""


class Alone:
    """A crew of one worker in this process."""

    def __init__(self, worker: Worker) -> None:
        self.worker, self.given = worker, deque[Job]()

    def free(self) -> Sequence[str]:
        return () if self.given else (self.worker.name,)

    def start(self, worker: str, job: Job) -> None:
        self.given.append(job)

    def finished(self, seconds: float) -> Sequence[Finished]:
        if not self.given:
            time.sleep(seconds)
            return ()
        # Not before it has ended: an interruption in the middle leaves it given.
        ended = Finished(self.worker.name, self.given[0], self.worker.run(self.given[0]))
        self.given.popleft()
        return (ended,)

    def alive(self) -> bool:
        return True


class Schedule:
    """Jobs that are to be made. A worker stays with jobs of one group as long as there are any."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._groups: dict[str, deque[Job]] = {}
        for job in jobs:
            self._groups.setdefault(job.group, deque()).append(job)
        self._at: dict[str, str] = {}
        self._later: list[tuple[float, Job]] = []

    def __len__(self) -> int:
        return len(self._later) + sum(map(len, self._groups.values()))

    def next(self, worker: str) -> Job | None:
        """The next job for a worker; None when there is none now."""
        now = time.monotonic()
        for entry in [entry for entry in self._later if entry[0] <= now]:
            self._later.remove(entry)
            self._groups[entry[1].group].append(entry[1])
        if worker not in self._at or not self._groups[self._at[worker]]:
            others = Counter(group for name, group in self._at.items() if name != worker)
            open_groups = [group for group, jobs in self._groups.items() if jobs]
            if not open_groups:
                return None
            # Where most jobs are left for each worker.
            self._at[worker] = max(open_groups, key=lambda group: len(self._groups[group]) / (1 + others[group]))
        return self._groups[self._at[worker]].popleft()

    def again(self, job: Job, seconds: float = 0.0) -> None:
        """Put a job back: as the next of its group, or after that many seconds."""
        if seconds:
            self._later.append((time.monotonic() + seconds, job))
        else:
            self._groups[job.group].appendleft(job)

    def lose(self, worker: str) -> None:
        """Forget a worker, whose models are gone."""
        self._at.pop(worker, None)


def drive(
    jobs: Sequence[Job],
    crew: Crew,
    on_finished: Callable[[Finished], None],
) -> None:
    """Have every job made. A job whose worker is lost goes to another one; a job that fails stops nothing.

    Args:
        on_finished: called for each attempt that ended, also when its worker was lost.

    Raises:
        DiskFullError: there is no room for results. Jobs that were begun continue when the command is run again.
        NoWorkersError: there has been no worker for `PATIENCE`.
    """
    schedule, busy, losses = Schedule(jobs), 0, Counter[str]()
    seen_alive = time.monotonic()
    while schedule or busy:
        for worker in crew.free():
            if (job := schedule.next(worker)) is None:
                break
            crew.start(worker, job)
            busy += 1
        ended = crew.finished(WAIT if busy else PAUSE)
        busy -= len(ended)
        for each in ended:
            job, outcome = each.job, each.outcome
            if outcome is None:
                losses[job.id] += 1
                schedule.lose(each.worker)
                if losses[job.id] < MOST_LOSSES:
                    schedule.again(job)
                else:
                    text = f"{losses[job.id]} workers were lost with this job, the last because: {each.lost}"
                    each = Finished(each.worker, job, Outcome("failed", error=text))
            elif outcome.status == "full":
                raise DiskFullError(
                    f"There is no room for {job.id}: {outcome.error}. Make room and run the same command."
                )
            elif outcome.status == "elsewhere":
                schedule.again(job, PAUSE)
            on_finished(each)
        if busy or crew.alive():
            seen_alive = time.monotonic()
        elif time.monotonic() - seen_alive > PATIENCE:
            raise NoWorkersError(f"All workers are gone; {len(schedule)} jobs are left. Run the same command again.")
