"""Commands of the pack in processes of their own, which a nursery forks: it has imported everything once, so that a
process starts in milliseconds. A process is a real one: it has its own signals, files and limits, and dies alone.
"""

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300
"""Seconds after which a process counts as hanging."""

PROGRAM = "import pack; pack.register(); from tests.attack.processes import tend; tend()"
IMPORTED = ("wancore.headless.cli", "wancore.trainer.train", "wan_core.conditioning.text")


@dataclass
class Process:
    """A command at work; its output goes to `log`."""

    pid: int
    log: Path
    nursery: "Nursery"

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, or the negative number of the signal that ended it.

        Raises:
            TimeoutError: it hung, and was killed.
        """
        code = self.nursery.ask({"wait": self.pid})
        if code is None:
            raise TimeoutError(f"no end in {LIMIT} seconds")
        return code

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


class Nursery:
    """Forks processes that run `wancore.<module>.main(words)`."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def ask(self, order: dict) -> int | None:
        self._process.stdin.write(json.dumps(order) + "\n")
        return json.loads(self._process.stdout.readline())

    def start(
        self, module: str, words: Sequence[object], log: Path, *, room: int | None = None, errors: str = ""
    ) -> Process:
        """Start a command.

        Args:
            log: the file of its output.
            room: bytes that a file of it may have, as on a disk that is nearly full.
            errors: where its standard error goes instead.
        """
        order = {"module": module, "words": [str(word) for word in words], "log": str(log), "room": room}
        return Process(self.ask({**order, "errors": errors}), log, self)

    def run(self, module: str, words: Sequence[object], log: Path, **options: object) -> tuple[int, str]:
        """Start a command and wait for it; its exit code and what it said."""
        process = self.start(module, words, log, **options)
        return process.wait(), process.output


def tend() -> None:
    """The nursery's own loop: orders come in and answers go out as lines of JSON."""
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        answer = _ended(order["wait"]) if "wait" in order else _fork(order)
        sys.stdout.write(f"{json.dumps(answer)}\n")
        sys.stdout.flush()


def _ended(pid: int) -> int | None:
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _fork(order: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        errors = os.open(order["errors"], os.O_WRONLY) if order["errors"] else log
        null = os.open(os.devnull, os.O_RDONLY)
        for given, own in ((null, 0), (log, 1), (errors, 2)):
            os.dup2(given, own)
        if order["room"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["room"], order["room"]))
        code = importlib.import_module(f"wancore.{order['module']}").main(order["words"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def files(folder: Path) -> dict[str, bytes]:
    """The content of every file below `folder`, by name."""
    found = (path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else ()
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def partial_files(folder: Path) -> list[str]:
    """What is still being written, or was left."""
    return sorted(name for name in files(folder) if ".wancore-part" in name or ".draft/" in name)


@contextlib.contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """A folder for a trial, gone afterwards."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix=f"wancore_{prefix}_") as folder:
        yield Path(folder)
