"""Workers as ComfyUI servers: jobs go to the least busy one, and leave a server that goes away."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from wan_core.runtime import Cancelled

from ..client import RunLostError, run_on_server
from ..folders import Folders
from ..overrides import expand_prefixes
from ..schema import NodeSchema
from ..server import RefusedError, Server, ServerUnreachableError
from ..workflow import Workflow
from .drive import Finished
from .jobs import Job
from .results import Results
from .worker import Made, Outcome, WorkerSettings, attempt

AHEAD = 2
"""Jobs that a server has at once: the next one is there already while the films of the last one are fetched."""

PATIENCE = 20.0
"""Seconds for which a server may not answer while it makes a film; then the film is begun on another one."""

LOOK_SECONDS = 10.0
"""Pause before a server that went away is asked again, and between two looks at how busy the others are."""


@contextmanager
def fleet_crew(servers: Sequence[Server], settings: WorkerSettings) -> Iterator["Fleet"]:
    """A crew of servers for a block. What they still have at its end is taken out of their queues."""
    with ThreadPoolExecutor((AHEAD + 1) * len(servers)) as pool:
        fleet = Fleet(servers, settings, pool)
        try:
            yield fleet
        finally:
            fleet.stop.set()


class Fleet:
    """Servers by their addresses."""

    def __init__(self, servers: Sequence[Server], settings: WorkerSettings, pool: ThreadPoolExecutor) -> None:
        self.servers = {server.url: server for server in servers}
        self.results = Results(settings.results)
        self.settings, self.pool, self.stop = settings, pool, threading.Event()
        self._ended: queue.Queue[Finished] = queue.Queue()
        self._given = dict.fromkeys(self.servers, 0)
        self._others = dict.fromkeys(self.servers, 0)
        self._look = dict.fromkeys(self.servers, 0.0)
        # Until they have answered.
        self._away = set(self.servers)

    def free(self) -> Sequence[str]:
        """Servers that can take a job, that with the shortest queue first. One that is busy with the work of others
        takes none while others are not."""
        for url, when in self._look.items():
            if time.monotonic() >= when:
                self._look[url] = float("inf")
                self.pool.submit(self._inspect, url)
        there = [url for url in self.servers if url not in self._away]
        least = min((self._others[url] for url in there), default=0)
        ready = [url for url in there if self._given[url] < AHEAD and self._others[url] < least + AHEAD]
        return sorted(ready, key=lambda url: self._others[url] + self._given[url])

    def _inspect(self, url: str) -> None:
        """See how busy a server is; in a thread, as one that is gone may not even refuse."""
        try:
            self._others[url] = max(0, sum(map(len, self.servers[url].queue().values())) - self._given[url])
            self._away.discard(url)
        except (ServerUnreachableError, RefusedError):
            self._away.add(url)
        self._look[url] = time.monotonic() + LOOK_SECONDS

    def alive(self) -> bool:
        return len(self._away) < len(self.servers)

    def start(self, worker: str, job: Job) -> None:
        self._given[worker] += 1
        self.pool.submit(self._run, worker, job)

    def finished(self, seconds: float) -> Sequence[Finished]:
        try:
            ended = [self._ended.get(timeout=seconds)]
        except queue.Empty:
            return ()
        while not self._ended.empty():
            ended.append(self._ended.get())
        for each in ended:
            self._given[each.worker] -= 1
            if each.outcome is None:
                self._away.add(each.worker)
                self._look[each.worker] = time.monotonic() + LOOK_SECONDS
        return ended

    def _check_cancelled(self) -> None:
        if self.stop.is_set():
            raise Cancelled("The batch was stopped.")

    def _run(self, worker: str, job: Job) -> None:
        server = self.servers[worker]

        def make(job: Job, work: Path) -> Made:
            folders = Folders(self.settings.input, work, self.settings.typed)
            workflow = expand_prefixes(Workflow.from_api(job.prompt))
            result = run_on_server(workflow, server, folders, check_cancelled=self._check_cancelled, patience=PATIENCE)
            temporary = folders.of_kind("temp")
            return Made(tuple(f for f in result.files if not f.is_relative_to(temporary)), server.versions())

        try:
            self._ended.put(Finished(worker, job, attempt(job, self.results, make, worker)))
        except (ServerUnreachableError, RunLostError) as error:
            self._ended.put(Finished(worker, job, None, str(error)))
        except Cancelled as error:
            self._ended.put(Finished(worker, job, Outcome("failed", error=str(error))))
        except BaseException as error:
            self._ended.put(Finished(worker, job, Outcome("failed", error=f"{type(error).__name__}: {error}")))


def schemas_of_fleet(servers: Sequence[Server], workflow: Workflow) -> dict[str, NodeSchema]:
    """The schemas of a workflow's classes on the first server that answers.

    Raises:
        ServerUnreachableError: none does.
    """
    problems = []
    for server in servers:
        try:
            return server.schemas(workflow)
        except ServerUnreachableError as error:
            problems.append(error)
    raise problems[-1]
