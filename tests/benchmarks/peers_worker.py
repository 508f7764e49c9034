"""A contestant as a process: `python -m tests.benchmarks.peers_worker <name>`, from the pack's folder.

It imports the contestant once and then takes lines of JSON on its input, answering each by one on its output: a job,
then any number of runs of it, then its end. Every job lives in a forked child: a process of its own, so that peak
memory is that of the job alone, without the time to import everything again.
"""

import ctypes
import gc
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file

from tests.benchmarks.peers import Job


def resident() -> dict[str, int]:
    """Bytes of this process in memory, now and at most since `forget_peak`; empty where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return {}
    lines = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


def forget_peak() -> None:
    """Let the peak be what is in use now (proc(5), clear_refs), after the allocator gave back what is not."""
    gc.collect()
    if Path("/proc/self/clear_refs").exists():
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class Contest:
    """One job in this process, run whenever asked for."""

    def __init__(self, kinds: dict[str, Any], request: dict[str, Any]) -> None:
        job = Job(**request)
        self.gradients = job.kind == "train"
        self.work = kinds[job.kind](job)
        forget_peak()
        self.before = resident()

    def run(self, output: str | None) -> dict[str, Any]:
        """Seconds of one run; `output` is where to put what came out."""
        with torch.set_grad_enabled(self.gradients):
            start = time.perf_counter()
            out = self.work()
            seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "before": self.before.get("now"), "peak": resident().get("peak")}
        if output is not None:
            save_file({name: tensor.detach().float().contiguous() for name, tensor in out.items()}, output)
        return answer


def serve(kinds: dict[str, Any], orders: BinaryIO, answers: BinaryIO) -> None:
    """Answer orders until there are no more."""

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value).encode() + b"\n")
        answers.flush()

    while line := orders.readline():
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            contest = Contest(kinds, json.loads(line))
            answer({})
            while order := json.loads(orders.readline() or "null"):
                answer(contest.run(order["output"]))
            answer({})
        except BaseException:
            answer({"error": traceback.format_exc()})
        os._exit(0)


def main() -> None:
    """What libraries print goes to the error stream, so that the output holds answers alone."""
    orders, answers = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    contestant = importlib.import_module(f".peers_{sys.argv[1]}", __package__)
    serve(contestant.KINDS, orders, answers)


if __name__ == "__main__":
    main()
