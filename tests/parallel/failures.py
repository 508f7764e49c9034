"""Films on a group of processes that are stopped at random steps, and go on: `python -m tests.parallel.failures 50`.

Each is cancelled, has a rank killed, or a rank whose device is full. The next run goes on from the last saved step, on
another number of ranks, and its latents must be those of an undisturbed run, bit for bit.
"""

import os
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("WANCORE_DETERMINISTIC", "1")
if __name__ == "__main__":
    from pack import register

    register()

from tests import fork_server
from tests.parallel import matrix
from tests.parallel.cases import Film, full_at, inputs, loaded
from wan_core.parallel import cards as cards_module
from wan_core.parallel.cards import Cards, CardsError
from wan_core.runtime import Cancelled, OutOfMemoryError, Runtime
from wan_core.sampling.checkpoint import Checkpoint, RunState

RUNTIME = Runtime(device=torch.device("cpu"), dtype=torch.float32)
KINDS = ("cancelled", "killed", "full")


def run(film: Film, cards: Cards | None, runtime: Runtime = RUNTIME, folder: Any = None) -> RunState:
    """A film on these cards, or in this process."""
    checkpoint = None if folder is None else Checkpoint(folder, every=1)
    model = replace(loaded(film), cards=cards)
    return model.sample(inputs(film), film.settings, film.memory, runtime, checkpoint=checkpoint)


def stop(kind: str, film: Film, cards: Cards, folder: Path, step: int, rank: int) -> Exception:
    """The error of a film that something ends in the step after `step`; `rank` is killed, or has a full device."""
    done = 0

    def progress(phase: str, number: int, total: int, latents: Any) -> None:
        nonlocal done
        done = number
        if kind == "killed" and number == step:
            cards_module._groups[cards].processes.all[rank].kill()

    def check() -> None:
        if kind == "cancelled" and done >= step:
            raise Cancelled

    runtime = replace(RUNTIME, on_progress=progress, check_cancelled=check)
    model = replace(loaded(film), cards=cards)
    if kind == "full":
        model = replace(model, source=model.source.then(full_at, rank, step + 1))
    try:
        model.sample(inputs(film), film.settings, film.memory, runtime, checkpoint=Checkpoint(folder, every=1))
    except (Cancelled, CardsError, OutOfMemoryError) as error:
        return error
    raise AssertionError("the film was not stopped")


def main(count: int) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    sys.executable = fork_server.python()
    drawn = random.Random(1)
    with tempfile.TemporaryDirectory() as place:
        film = replace(matrix.stored(Path(place))["lora"], size=matrix.UNEVEN)
        expected = run(film, None).latents
        for number in range(count):
            kind, step, ranks = drawn.choice(KINDS), drawn.randint(1, 4), drawn.choice((2, 2, 3, 4))
            rank, folder = drawn.randrange(ranks), Path(place) / f"run_{number}"
            folder.mkdir()
            cards = Cards(("cpu",) * ranks)
            began = time.monotonic()
            error = stop(kind, film, cards, folder, step, rank)
            took = time.monotonic() - began
            again = drawn.choice((None, Cards(("cpu",) * drawn.choice((2, 3)))))
            same = run(film, again, folder=folder).latents.equal(expected)
            how = f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"
            print(f"{number + 1}: {kind} in step {step + 1}, rank {rank} of {ranks}, {took:.1f} s, {how}; "
                  f"goes on with {1 if again is None else len(again.devices)}: {'equal' if same else 'DIFFERENT'}",
                  flush=True)  # fmt: skip
            assert same
            cards.end()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
