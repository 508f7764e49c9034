"""A page of hostile workflows queued on a real ComfyUI, whose processes, files and connections are watched.

With `strace` on the machine every file, program and address is seen; without it, what became of the decoys.
"""

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attack.hostile import FLAGS
from tests.attack.watch import SYSTEM, aged, mark
from tests.attack.workflows import RAW, Place, base, table
from wancore.headless.core_nodes import core_nodes
from wancore.headless.schema import schemas_of
from wancore.headless.server import RefusedError, Server
from wancore.nodes import NODE_CLASS_MAPPINGS, host

pytestmark = pytest.mark.comfyui

COUNT = 150
SINK = "HeadlessTestSink"
DATA = {"folder": "data", "width": 32, "height": 32, "num_frames": 5, "fps": 0.0}
TRAINED = ("--lora_target_modules '(a+)+$'", "--data_file_keys ../x", "--remove_prefix_in_ckpt ../../x", "--")
"""Flags that a training of its own looks at, which takes long; one training is enough."""
OWN = ("trainer.check", "trainer.supervised")
TRACED = (
    "execve,connect,open,openat,creat,mkdir,mkdirat,unlink,unlinkat,rename,renameat,renameat2,link,linkat,symlink,"
    "symlinkat"
)
FILE = re.compile(r'^(?:\d+ +)?(\w+)\((?:AT_FDCWD, |\d+(?:<[^>]*>)?, )?"([^"]*)"(.*)$')
ADDRESS = re.compile(r'connect\(.*(?:inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)")')


@pytest.fixture(scope="module")
def watched(serve, tmp_path_factory) -> Iterator[tuple[Server, Place, Path | None]]:
    """A server whose base directory has decoys beside it, and the file that its system calls are written to."""
    place = Place.made(tmp_path_factory.mktemp("hostile"))
    trace = place.root / "trace.txt" if shutil.which("strace") else None
    before = (
        ["strace", "-f", "-qq", "--seccomp-bpf", "-s", "4096", "-e", f"trace={TRACED}", "-o", str(trace)]
        if trace
        else []
    )
    with serve(place.root, before) as server:
        yield Server(server.url), place, trace
        if trace:
            # strace ends with what it watches, and passes no signal on.
            children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
            for child in map(int, children.split()):
                os.kill(child, signal.SIGTERM)
            server.process.wait(60)


@pytest.fixture(scope="module")
def page(watched) -> list[tuple[str, dict]]:
    """Names and prompts: every flag, and a draw from the table of nodes, widgets and values."""
    _, place, _ = watched
    host.configure(models_dir=place.root / "models", input_dir=place.folders.input, output_dir=place.folders.output)
    try:
        schemas = schemas_of({**core_nodes(place.folders), **NODE_CLASS_MAPPINGS})
        train = base("WanCoreTrainLora", schemas, SINK, DATA)
        rows = [
            (flags, _with_flags(train, flags.replace("{outside}", str(place.root / "outside"))))
            for flags in FLAGS
            if flags not in TRAINED
        ]
        others = (row for row in table(place, schemas, SINK, DATA) if row[0].startswith("WanCore"))
        drawn = [(name, json.loads(text)) for name, text in others if not name.startswith("WanCoreTrain")]
    finally:
        host.configure()
    return [*rows, *random.Random(14).sample(drawn, COUNT - len(rows))]


def _with_flags(prompt: dict, flags: str) -> dict:
    it = prompt["it"]
    return {**prompt, "it": {**it, "inputs": {**it["inputs"], "flags": flags}}}


def outcome(server: Server, prompt: dict) -> str:
    """What became of a prompt: "refused", "failed", "done", or a fault in words."""
    try:
        answer = server.submit(prompt, "hostile")
        told = answer.get("node_errors") or {}
    except RefusedError as error:
        answer, told = {}, error.body.get("node_errors") or {}
        if not told and "error" not in error.body:
            return f"no reason: {error}"
    own = [entry for node in told.values() for entry in node["errors"]]
    raw = [e for e in own if e["type"] == "exception_during_validation" and any(w in json.dumps(e) for w in RAW)]
    if raw or "prompt_id" not in answer:
        return f"raw: {raw[0]['details']}" if raw else "refused"
    until = time.monotonic() + 240
    while not (record := server.history(answer["prompt_id"])):
        if time.monotonic() > until:
            return "hang"
        time.sleep(0.05)
    errors = [data for kind, data in record["status"]["messages"] if kind == "execution_error"]
    if not errors:
        return "refused" if told else "done"
    kind = errors[0]["exception_type"].rpartition(".")[2]
    said = f"{errors[0]['node_type']}: {kind}: {errors[0]['exception_message'][:200]}"
    return "failed" if kind in ("ValueError", "ChildError") else f"raw: {said}"


def strange(lines: list[str], place: Place) -> list[str]:
    """System calls that reach out of ComfyUI's folders."""
    outside, found = str(place.root / "outside"), []
    kernels = str(Path("~/.cache/wancore/kernels").expanduser())  # which of them are fast, measured once on a machine
    writable = (str(place.root), "/dev/null", "/dev/shm", "/proc/self", "/tmp/torchinductor", kernels)
    # C libraries ask for the user's name and their own settings when a process begins.
    read_by_all = ("/etc/passwd", "/proc/self/environ")
    hidden = (outside, *(path for path in SYSTEM if path not in read_by_all))
    for line in lines:
        if address := ADDRESS.search(line):
            if (address[1] or address[2]) not in ("127.0.0.1", "::1"):
                found.append(line)
        elif match := FILE.match(line):
            call, path, rest = match.groups()
            if call == "execve":
                command = re.findall(r'"([^"]*)"', rest)
                own = command[1:2] and command[1].endswith("pack.py") and set(command[2:3]) <= set(OWN)
                # Looked for along PATH; libraries ask the system's own tools for what it is.
                found += [] if own or "ENOENT" in rest or path.endswith(("/ldconfig", "/uname", "/lscpu")) else [line]
                continue
            writes = call not in ("open", "openat") or re.search(r"O_(WRONLY|RDWR|CREAT|TRUNC|APPEND)", rest)
            forbidden = path.startswith(hidden) and "ENOENT" not in rest
            away = writes and path.startswith("/") and not path.startswith(writable) and "__pycache__" not in path
            found += [line] if forbidden or (away and "= -1" not in rest) else []
    return found


def test_a_page_of_hostile_workflows_stays_in_comfyuis_folders(watched, page):
    server, place, trace = watched
    (place.root / "output" / "training" / "attacked").mkdir()
    for name in ("torch.py", "json.py", "sitecustomize.py"):
        marker = place.root / "outside" / "executed"
        (place.root / "output" / "training" / "attacked" / name).write_text(f"open({str(marker)!r}, 'w')")
    begin = trace.stat().st_size if trace else 0
    decoys = aged(place.root / "outside")
    found = {name: outcome(server, prompt) for name, prompt in page}
    host_files = {path for path in (place.root / "outside").rglob("*")}
    faults = {name: told for name, told in found.items() if told not in ("refused", "failed", "done")}
    assert not faults
    assert {found[flags] for flags in FLAGS if flags not in TRAINED} == {"refused"}
    assert {path: mark(path) for path in decoys} == decoys, "a decoy was read or changed"
    assert {path for path in host_files if path.is_file()} == set(decoys), "something was written outside"
    if trace:
        with trace.open(errors="replace") as file:
            file.seek(begin)
            assert not strange(file.read().splitlines(), place)


def test_a_harmless_training_runs_beside_them(watched):
    """What the page is refused is not refused to everybody; and the trace sees what is started."""
    server, place, trace = watched
    host.configure(models_dir=place.root / "models", input_dir=place.folders.input, output_dir=place.folders.output)
    schemas = schemas_of({**core_nodes(place.folders), **NODE_CLASS_MAPPINGS})
    host.configure()
    prompt = _with_flags(
        base("WanCoreTrainLora", schemas, SINK, DATA), "--lora_alpha 16 --min_free_gb 0 --optimizer torch.optim.SGD"
    )
    prompt["it"]["inputs"] |= {"name": "harmless", "mixed_precision": "no"}
    assert outcome(server, prompt) == "done"
    assert list((place.root / "output" / "training" / "harmless").glob("*.safetensors"))
    if trace:
        assert "trainer.supervised" in trace.read_text(errors="replace")
