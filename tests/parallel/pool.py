"""Ranks over gloo, started once for a session and used by every case: each case is one function that all ranks run.

`Pool.run(count, function, ...)` runs `function(ranks, ...)` of the module `tests.parallel.cases` on the first `count`
processes, which meet anew for it as a run's ranks do, and returns what rank 0 returned.
"""

import base64
import contextlib
import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from tests import fork_server

MOST = 8


class Pool:
    """`MOST` processes that wait for work."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        words = ["-m", "tests.parallel.pool"]
        self.processes = [
            fork_server.start(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for _ in range(MOST)
        ]

    def run(self, count: int, function: str, /, *arguments: Any) -> Any:
        """What `function(ranks, *arguments)` returned on rank 0.

        Raises:
            AssertionError: a rank failed; the message is its traceback.
        """
        self._number += 1
        meeting, result = (str(self._folder / f"{self._number}.{name}") for name in ("meeting", "result"))
        for rank in range(count):
            words = pickle.dumps((meeting, result, rank, count, function, arguments))
            process = self.processes[rank]
            process.stdin.write(base64.b64encode(words).decode() + "\n")
            process.stdin.flush()
        for rank in range(count):
            lines = []
            while (line := self.processes[rank].stdout.readline()) not in ("done\n", "failed\n", ""):
                lines.append(line)
            assert line == "done\n", f"rank {rank}: {''.join(lines)}"
        return torch.load(result, weights_only=False)

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait(20)


def serve() -> None:
    """The loop of one process."""
    from tests.parallel import cases
    from wan_core.parallel.mesh import Ranks

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for line in sys.stdin:
        meeting, result, rank, count, function, arguments = pickle.loads(base64.b64decode(line))
        try:
            ranks = Ranks.join(torch.device("cpu"), rank, count, Path(meeting))
            found = getattr(cases, function)(ranks, *arguments)
            if rank == 0:
                torch.save(found, result)
            ranks.leave()
            print("done", flush=True)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            print("failed", flush=True)
            sys.exit(1)


if __name__ == "__main__":
    serve()
