"""`python -m tests.headless.chaos FOLDER`: a long batch on a Ray cluster of two nodes, with whatever can die dying.

Cut into pieces of some minutes, each of which a driver begins and does not end: it is killed when its time is over.
`--plain` makes the same films undisturbed, by several drivers of one worker each. Every piece ends with a comparison.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil
from PIL import Image

import pack

pack.register()

from wancore.headless.folders import workflow_file  # noqa: E402
from wancore.headless.overrides import apply_sets, apply_tiny  # noqa: E402
from wancore.headless.schema import schemas_of  # noqa: E402
from wancore.headless.workflow import Workflow  # noqa: E402
from wancore.nodes import NODE_CLASS_MAPPINGS  # noqa: E402

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]


def write_jobs(folder: Path, count: int) -> Path:
    """Of ten jobs three are films, in four prompts and two lengths; six store a picture; one has a damaged picture."""
    (folder / "in").mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    for n in range(50):
        Image.frombytes("RGB", (16, 16), chance.randbytes(3 * 16 * 16)).save(folder / "in" / f"{n}.png")
    (folder / "in" / "broken.png").write_bytes(b"\x89PNG but not for long")
    (folder / "copy.json").write_text(json.dumps({
        "1": {"class_type": "LoadImage", "inputs": {"image": "0.png"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }))  # fmt: skip
    film = apply_tiny(Workflow.load(workflow_file("t2v")), NODE_CLASS_MAPPINGS)
    film = apply_sets(
        film, ["Sampler.width=16", "Sampler.height=16", "Sampler.steps=2"], schemas_of(NODE_CLASS_MAPPINGS)
    )
    (folder / "film.json").write_text(json.dumps(film.to_api()))
    prompts = [f"a {colour} {shape} over the sand" for colour in ("red", "blue") for shape in ("ball", "box")]
    lines = [
        {
            "id": f"job{n:04}",
            "workflow": str(folder / "film.json"),
            "prompt": prompts[n % 4],
            "seed": n,
            "Sampler.num_frames": 1 + 4 * (n % 2),
        }
        if n % 10 < 3
        else {"id": f"job{n:04}", "workflow": str(folder / "copy.json"), "image": f"{n % 50}.png"}
        if n % 10 < 9
        else {"id": f"job{n:04}", "workflow": str(folder / "copy.json"), "image": "broken.png"}
        for n in range(count)
    ]
    (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "jobs.jsonl"


def command(folder: Path, out: str, *more: str) -> list[str]:
    words = [sys.executable, "-m", "headless", "batch", str(folder / "jobs.jsonl"), "--device", "cpu"]
    return [*words, "--input", str(folder / "in"), "--out", str(folder / out), *more]


def made(folder: Path) -> dict[str, str]:
    """The digest of each film, after a look at its bytes."""
    found = {}
    for path in folder.glob("job*.json"):
        for file in json.loads(path.read_text())["files"]:
            assert hashlib.sha256((folder / file["name"]).read_bytes()).hexdigest() == file["sha256"], file
            found[file["name"]] = file["sha256"]
    return found


def patiently(start: Callable[[], T]) -> T:
    """What `start` gives: Ray waits 30 seconds for its own processes, which may be too few on a busy machine."""
    for _ in range(5):
        with suppress(Exception):
            return start()
    return start()


@contextmanager
def cluster(workers: int) -> Iterator[object]:
    """Two nodes with half of the workers each."""
    os.environ.update({"RAY_worker_register_timeout_seconds": "600"})
    from ray.cluster_utils import Cluster

    node = {"num_cpus": workers // 2, "object_store_memory": 100 << 20, "include_dashboard": False}
    found = patiently(lambda: Cluster(initialize_head=True, head_node_args=node))
    found.node = patiently(lambda: found.add_node(num_cpus=workers // 2, object_store_memory=100 << 20))
    try:
        yield found
    finally:
        found.shutdown()


def actors() -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if "ray::FilmWorker" in "".join(p.info["cmdline"] or ())]


def piece(folder: Path, workers: int, seconds: float, chance: random.Random, told: Counter) -> bool:
    """Let a driver work for a while, kill workers and a node, and then it; True when it ended by itself."""
    end, node_at = time.monotonic() + seconds, time.monotonic() + chance.uniform(0.4, 0.7) * seconds
    with cluster(workers) as nodes, (folder / "log.txt").open("a") as log:
        words = command(folder, "out", "--address", nodes.address, "--workers", str(workers), "--checkpoint-every", "1")
        driver = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log)
        kill_at = time.monotonic() + 40
        while driver.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
            if time.monotonic() > kill_at and (there := actors()):
                chance.choice(there).kill()
                told["actors killed"] += 1
                kill_at = time.monotonic() + chance.uniform(10, 40)
            if nodes.node is not None and time.monotonic() > node_at:
                nodes.remove_node(nodes.node, allow_graceful=False)
                nodes.node = None
                told["nodes killed"] += 1
        if driver.poll() is None:
            driver.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
            driver.wait()
            told["drivers killed"] += 1
            return False
    told[f"ended with {driver.returncode}"] += 1
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=240, help="of this piece")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_jobs(options.folder, options.jobs)
    if options.plain:
        words = ["timeout", str(options.seconds), *command(options.folder, "plain", "--workers", "1")]
        with (options.folder / "plain.txt").open("a") as log:
            drivers = [subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log) for _ in range(options.workers)]
            for driver in drivers:
                driver.wait()
    else:
        told = Counter()
        piece(options.folder, options.workers, options.seconds, random.Random(options.seed), told)
        sys.stdout.write(f"{dict(told)}\n")
    plain, out = made(options.folder / "plain"), made(options.folder / "out")
    both = plain.keys() & out.keys()
    different = [name for name in both if plain[name] != out[name]]
    sys.stdout.write(f"plain {len(plain)}, disturbed {len(out)}, in both {len(both)}, different {len(different)}\n")


if __name__ == "__main__":
    main()
