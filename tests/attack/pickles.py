"""Damaged and malicious PyTorch checkpoints, through every way in."""

import builtins
import io
import os
import pickle
import random
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from tests.attack import Trial
from tests.attack.child import Child
from tests.attack.mutations import pickle_mutations
from tests.loading import inventories as inv
from tests.loading.test_pickles import HOSTILE, archive, call, state, text

JOBS = ("info", "load", "map", "lora", "convert", "convert lora", "state", "latents", "caches")
KINDS = ("dit_t2v", "vae", "umt5", "clip")

QUICK = 24
"""Trials of a quick run; most of its time is the start of the child."""


class _Calls:
    """Unpickles by a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def malicious(folder: Path) -> dict[str, bytes]:
    """Files that would make a file called `executed` in `folder`, by whoever unpickles them."""
    canary = folder / "executed"
    touch = f"touch {canary}"
    calls = {
        "os.system": (os.system, touch), "eval": (builtins.eval, f"open({str(canary)!r}, 'w')"),
        "exec": (builtins.exec, f"open({str(canary)!r}, 'w')"), "Popen": (subprocess.Popen, ["touch", str(canary)]),
        "open": (builtins.open, str(canary), "w"), "torch.load": (torch.load, str(canary)),
        "import": (builtins.__import__, "antigravity"),
    }  # fmt: skip
    made = {name: pickle.dumps({"a": 1, "b": _Calls(*what)}, 2) for name, what in calls.items()}
    for name, what in calls.items():
        for zipped in (True, False):
            stream = io.BytesIO()
            torch.save({"a": torch.ones(1), "b": _Calls(*what)}, stream, _use_new_zipfile_serialization=zipped)
            made[f"{name}, {'archive' if zipped else 'legacy'}"] = stream.getvalue()
    for name in ("torch.hub load", "torch.serialization load", "runpy run_path", "pty spawn", "importlib import_module",
                 "torch._utils _rebuild_tensor_v2.__globals__", "torch.storage _load_from_bytes"):  # fmt: skip
        made[name] = archive(state(call(name, text(touch))))
    return made


@cache
def whole(kind: str) -> bytes:
    """A sound checkpoint of that kind."""
    stream = io.BytesIO()
    torch.save(inv.tiny(kind), stream)
    return stream.getvalue()


def attack(count: int, seed: int) -> Iterator[Trial]:
    """`count` files, each through one way in: half of them made to do harm, the others damaged."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as place, Child("tests.attack.ways_in") as child:
        folder = Path(place)
        harmful = malicious(folder) | {name: content for name, (content, _) in HOSTILE.items()}
        order = [(name, job) for name in harmful for job in JOBS]
        draw.shuffle(order)
        for number in range(count):
            if number % 2:
                name, job = order[number // 2 % len(order)]
                content = harmful[name]
            else:
                kind, job = draw.choice(KINDS), draw.choice(JOBS)
                name, content = next(pickle_mutations(whole(kind), 1, seed * count + number))
                name = f"{kind}, {name}"
            file = folder / "damaged.pth"
            file.write_bytes(content)
            trial = child.judge(name, job, file)
            yield Trial(trial.name, "executed", "it made its file") if (folder / "executed").exists() else trial
