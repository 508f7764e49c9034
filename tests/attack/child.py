"""A process of its own for what may hang or take all memory: jobs run in it one after the other, under a limit.

Memory is measured as Linux counts it: the peak of what the process holds above what it held before the job.
"""

import contextlib
import importlib
import json
import os
import re
import resource
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.attack import Trial

ROOT = Path(__file__).resolve().parents[2]
SECONDS, PATIENCE = 20, 300
"""The longest that a job may compute, and may take in all, on a machine that does much else."""

ALLOWANCE = 200 * 2**20
CEILING = 4 * 2**30
"""Above it the child gets no memory, so that an attack does not take the machine's."""

NO_MEMORY = re.compile("MemoryError|can't allocate memory|Cannot allocate memory|not enough memory")

EXECUTED = re.compile(
    r"os\.(system|exec|posix_spawn|spawn|startfile|fork|forkpty)|subprocess\.Popen|pty\.spawn|socket\.connect"
)
"""What the interpreter reports when a program is started or another machine is spoken to."""


class Child:
    """Runs jobs of one module: functions from a path to a short text.

    The text says what came of the job; a ValueError is the pack's own, clear if it names the file. What else is raised,
    more time than `SECONDS` and `PATIENCE`, more memory than twice the file and `ALLOWANCE`, and anything executed are
    faults.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def judge(self, name: str, job: str, path: Path) -> Trial:
        """What `job` makes of the file at `path`."""
        size = path.stat().st_size if path.exists() else 0
        answer = self._ask({"job": job, "path": str(path)})
        label = f"{job}: {name}"
        if answer is None:
            return Trial(label, "hang", f"no answer in {SECONDS} s of computing or {PATIENCE} s, or the process died")
        if answer["executed"]:
            return Trial(label, "executed", answer["detail"])
        if answer["taken"] > 2 * size + ALLOWANCE or NO_MEMORY.search(answer["detail"]):
            return Trial(label, "memory", f"{answer['taken'] >> 20} MiB for {size} bytes. {answer['detail']}")
        return Trial(label, answer["verdict"], answer["detail"])

    def _ask(self, order: dict[str, Any]) -> dict[str, Any] | None:
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
            line = b""
            end, computed = time.monotonic() + PATIENCE, self._computed() + SECONDS
            while not line.endswith(b"\n"):
                ready, _, _ = select.select([self._process.stdout], [], [], 0.2)
                piece = os.read(self._process.stdout.fileno(), 2**16) if ready else b""
                if (ready and not piece) or time.monotonic() > end or self._computed() > computed:
                    raise TimeoutError
                line += piece
            return json.loads(line)
        except (OSError, TimeoutError):
            self._end()
            return None

    def _computed(self) -> float:
        """Seconds that the child's threads have computed."""
        words = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def _start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        program = f"import pack; pack.register(); from tests.attack import child; child.serve({self._module!r})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment,
        )  # fmt: skip
        ready, _, _ = select.select([self._process.stdout], [], [], 300)
        assert ready and self._process.stdout.readline() == b"ready\n", "the child did not start"

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    stream.close()
        self._process = None


def serve(module: str) -> None:
    """Read jobs from the standard input, write what came of each to the standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what jobs print goes elsewhere
    jobs = importlib.import_module(module).JOBS
    executed: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if EXECUTED.fullmatch(event):
            executed.append(f"{event} {arguments!r:.200}")

    sys.addaudithook(watch)
    resource.setrlimit(resource.RLIMIT_AS, (_field("VmSize") + CEILING, resource.RLIM_INFINITY))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        executed.clear()
        Path("/proc/self/clear_refs").write_text("5")  # begin to count the peak again
        before = _field("VmRSS")
        try:
            verdict, detail = "survived", jobs[order["job"]](Path(order["path"]))
        except ValueError as error:
            verdict, detail = "clear", f"{error}"
            # A part of the name is enough: shards and folders are named for what they are.
            if Path(order["path"]).stem not in detail:
                verdict, detail = "raw", f"names no file: {detail}"
        except BaseException as error:
            verdict, detail = "raw", f"{type(error).__name__}: {error}"
        taken = max(0, _field("VmHWM") - before)
        told = {"verdict": verdict, "detail": detail[:600], "taken": taken, "executed": list(executed)}
        print(json.dumps(told), file=answers, flush=True)


def _field(name: str) -> int:
    """A size from the process's status, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s*(\d+)", status)[1])
