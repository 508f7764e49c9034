"""Workers as actors of a Ray cluster: one for each card, started again where the cluster finds room when one is lost.

Ray starts processes, finds cards and notices deaths. Jobs, claims and results are those of any other crew: a worker
reads and writes the folder of the batch itself, which every machine of the cluster sees under the same path.
"""

import dataclasses
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...nodes import host
from .drive import Finished, NoWorkersError
from .jobs import Job
from .results import STATE
from .worker import Outcome, WorkerSettings

STORE_BYTES = 128 << 20
"""Of Ray's object store: only jobs and their outcomes travel."""

CONNECT_SECONDS = 10.0

LOOK_SECONDS = 2.0
"""Pause before a lost actor is asked again whether it is back."""

MOST_STARTS = 3
"""Failed starts of Ray here, or of every actor without one that succeeded, after which a batch is given up."""


@contextmanager
def ray_crew(
    settings: WorkerSettings, address: str | None = None, workers: int | None = None, gpus: int = 1
) -> Iterator["RayCrew"]:
    """A crew of actors, on this machine or on the cluster at `address`, for a block.

    Args:
        workers: None is as many as the cluster has cards for, or one on each machine where none has a card.
        gpus: cards of a worker; 0 computes on CPUs.

    Raises:
        ValueError: Ray is not installed, or does not have these cards.
        ConnectionError: there is no cluster at `address`.
    """
    try:
        import ray
    except ImportError:
        raise ValueError(
            "Several workers and clusters need Ray: pip install 'ray>=2.48', or pip install .[batch]."
        ) from None
    # Nothing is reported to anybody unless the user has asked for that.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = not ray.is_initialized()
    if own:
        _connect(ray, address, workers)
    token = settings.results / STATE / f"seen_{uuid.uuid4().hex}"
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch()
        yield RayCrew(ray, _actors(ray, settings, token, workers, gpus))
    finally:
        token.unlink(missing_ok=True)
        if own:
            ray.shutdown()


def _connect(ray: Any, address: str | None, workers: int | None) -> None:
    """Start Ray on this machine, or join the cluster at `address`.

    Raises:
        ConnectionError: it does not start, or does not answer.
    """
    if address:
        _check_address(address)
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    if workers:
        local["num_cpus"] = max(workers, os.cpu_count() or 1)
    # Its own handler of SIGTERM would end the process with another exit code.
    before = signal.getsignal(signal.SIGTERM)
    for left in reversed(range(MOST_STARTS)):
        try:
            ray.init(logging_level=logging.WARNING, log_to_driver=False, **({"address": address} if address else local))
            break
        except Exception as error:
            # It gives its own processes 30 seconds, too few on a busy machine.
            ray.shutdown()
            if address or not left:
                raise ConnectionError(f"Ray does not start: {error}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _check_address(address: str) -> None:
    """Raise ConnectionError where nothing answers at `host:port`: Ray itself tries for minutes."""
    name, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in name:
        try:
            socket.create_connection((name, int(port)), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            raise ConnectionError(f"No Ray cluster answers at {address}: {error}.") from error


def _actors(ray: Any, settings: WorkerSettings, token: Path, workers: int | None, gpus: int) -> dict[str, Any]:
    """The actors by their names."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cards = sum(int(machine.get("GPU", 0)) for machine in machines)
    gpus = gpus if cards else 0
    # A head that only directs has none.
    machines = [machine for machine in machines if machine.get("GPU" if gpus else "CPU")]
    if not machines:
        raise ValueError("The cluster has no machine with a core that is free for work: start one with ray start.")
    count = workers or (cards // gpus if gpus else len(machines))
    if gpus and count * gpus > cards:
        raise ValueError(f"{count} workers of {gpus} cards need {count * gpus}; the cluster has {cards}.")
    cores = min(int(machine.get("CPU", 0)) for machine in machines)
    cpus = max(1, cores // -(-count // len(machines)))

    class FilmWorker:
        """Pickled by its code, since the pack has no name in a process before it is registered there."""

        def __init__(self, pack: str, settings: Mapping[str, Any], token: str) -> None:
            import importlib
            import importlib.util
            import os
            import runpy

            if os.path.exists(pack):  # noqa: PTH110  # nothing of the driver's module is in this process
                runpy.run_path(pack)["register"]()
            worker = importlib.import_module("wancore.headless.batch.worker")
            self.worker = worker.Worker(worker.WorkerSettings(**settings))
            self.sees = os.path.exists(token)  # noqa: PTH110

        def ready(self) -> tuple[str, bool]:
            return self.worker.name, self.sees

        def run(self, job: Any) -> Any:
            return self.worker.run(job)

    # Ray makes the number of cores that of an actor's threads, unless OMP_NUM_THREADS is set.
    remote = ray.remote(FilmWorker).options(
        num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=0, scheduling_strategy="SPREAD"
    )
    plain = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    words = (str(host.PACK_FOLDER / "pack.py"), plain, str(token))
    return {f"worker {number}": remote.remote(*words) for number in range(1, count + 1)}


class RayCrew:
    """Actors that are free, at work, or not ready: starting, lost, or without a machine."""

    def __init__(self, ray: Any, actors: Mapping[str, Any]) -> None:
        self.ray, self.actors = ray, actors
        self._free: list[str] = []
        self._work: dict[Any, tuple[str, Job]] = {}
        self._pings: dict[Any, str] = {}
        self._away: dict[str, float] = dict.fromkeys(actors, 0.0)
        self._failed_starts: Counter[str] = Counter()

    def free(self) -> Sequence[str]:
        return tuple(self._free)

    def alive(self) -> bool:
        return bool(self._free or self._work)

    def start(self, worker: str, job: Job) -> None:
        self._free.remove(worker)
        self._work[self.actors[worker].run.remote(job)] = worker, job

    def finished(self, seconds: float) -> Sequence[Finished]:
        """What has ended; actors that have come back are free from now on.

        Raises:
            NoWorkersError: no actor can be started.
            ValueError: an actor does not see the folder of the batch.
        """
        now = time.monotonic()
        for worker in [worker for worker, when in self._away.items() if when <= now]:
            del self._away[worker]
            self._pings[self.actors[worker].ready.remote()] = worker
        waiting = [*self._work, *self._pings]
        if not waiting:
            time.sleep(seconds)
            return ()
        self.ray.wait(waiting, num_returns=1, timeout=seconds)
        ready, _ = self.ray.wait(waiting, num_returns=len(waiting), timeout=0)
        for ref in [ref for ref in ready if ref in self._pings]:
            self._back(self._pings.pop(ref), ref)
        return [self._ended(ref, *self._work.pop(ref)) for ref in ready if ref in self._work]

    def _back(self, worker: str, ref: Any) -> None:
        try:
            name, sees = self.ray.get(ref)
        except self.ray.exceptions.RayActorError as error:
            self._lose(worker)
            self._failed_starts[worker] += 1
            if all(self._failed_starts[name] >= MOST_STARTS for name in self.actors):
                raise NoWorkersError(f"No worker can be started. The last one: {error}") from error
            return
        if not sees:
            raise ValueError(
                f"The worker {name} does not see the folder of --out. All machines need it, by the same path."
            )
        self._failed_starts.clear()
        self._free.append(worker)

    def _ended(self, ref: Any, worker: str, job: Job) -> Finished:
        try:
            outcome = self.ray.get(ref)
        except self.ray.exceptions.RayActorError as error:
            self._lose(worker)
            return Finished(worker, job, None, (str(error).strip().splitlines() or ["it died"])[0])
        except self.ray.exceptions.RayError as error:
            # What the worker does not count as a failure of the job, such as a claim that the disk refuses.
            outcome = Outcome("failed", error=str(error).strip().splitlines()[-1])
        self._free.append(worker)
        return Finished(worker, job, outcome)

    def _lose(self, worker: str) -> None:
        self._away[worker] = time.monotonic() + LOOK_SECONDS
