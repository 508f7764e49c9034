"""A command on several cards of this machine: `--gpus N`, or torchrun."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from wan_core.parallel.mesh import Ranks
from wan_core.parallel.processes import GRACE, MEETING, POLL, Processes, end_with_parent
from wan_core.parallel.tasks import exit_code_of, serve
from wan_core.runtime import Runtime, default_device

from ..nodes.launcher import pack_command
from .file_commands import Arguments

PACK = Path(__file__).resolve().parents[1]
FAILED, INTERRUPTED = 1, 130

GPUS: Arguments = {
    "--gpus": {
        "metavar": "N",
        "type": int,
        "help": "make each film on N cards of this machine; with --device cpu on N processes",
    }
}

Execute = Callable[[argparse.Namespace], int]


def on_cards(execute: Execute) -> Execute:
    """`execute` on as many cards as the arguments or torchrun say. Rank 0 executes, the others serve it."""

    def run(arguments: argparse.Namespace) -> int:
        kind = arguments.device or "auto"
        kind = default_device().type if kind == "auto" else kind
        if MEETING in os.environ:
            end_with_parent()
        elif arguments.gpus is not None:
            return _start(arguments, kind)
        if (ranks := Ranks.of_environment(kind)) is None:
            return execute(arguments)
        if not ranks.leads:
            try:
                serve(Runtime(device=ranks.device, dtype=torch.bfloat16, ranks=ranks))
            except Exception as error:
                return exit_code_of(error)
            return 0
        arguments.ranks = ranks
        try:
            return execute(arguments)
        finally:
            if not ranks.broken:
                ranks.tell(None)

    return run


def _start(arguments: argparse.Namespace, kind: str) -> int:
    """Run the same command in a process for each card, and attend them."""
    count, cards = arguments.gpus, torch.cuda.device_count()
    if getattr(arguments, "server", None):
        raise ValueError("--gpus holds for runs in this process; a server computes on its own cards.")
    if count < 1:
        raise ValueError(f"--gpus must be 1 or more; got {count}.")
    if kind == "cuda" and count > cards:
        raise ValueError(f"--gpus must be at most {cards}, the cards of this machine; got {count}.")
    if kind not in ("cuda", "cpu"):
        raise ValueError(f"--gpus {count} needs cards, and this machine computes on {kind}; leave it out.")
    devices = [f"cuda:{number}" if kind == "cuda" else "cpu" for number in range(count)]
    return attend(Processes(pack_command(PACK, "headless.cli", arguments.words), devices))


def attend(processes: Processes) -> int:
    """The exit code of rank 0, once all ranks have ended; a sentence about another one that failed goes to stderr."""
    try:
        while processes.alive:
            time.sleep(POLL)
        # Whoever waits for a rank that has ended fails by itself.
        code = processes.wait(0, GRACE)
        failure = processes.failure()
        if failure is not None:
            sys.stderr.write(f"{failure} All ranks have ended; run the command again.\n")
            return code or FAILED
        for rank in range(1, len(processes.all)):
            processes.wait(rank, GRACE)
        return FAILED if code is None else code
    except KeyboardInterrupt:
        with suppress(ProcessLookupError):
            processes.all[0].send_signal(signal.SIGINT)
        processes.wait(0, GRACE)
        return INTERRUPTED
    finally:
        processes.end()
