"""The test pack, workflows of its nodes, and ComfyUI servers: a real one where there is a checkout."""

import importlib.util
import json
import os
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.comfyui import comfyui
from tests.programs import PATIENCE, wait_for
from wancore.headless.core_nodes import core_nodes
from wancore.headless.folders import Folders
from wancore.headless.workflow import Workflow

HERE = Path(__file__).parent


def _load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def pack():
    """The test pack as a module."""
    return _load("headless_test_pack", HERE / "pack" / "__init__.py")


@pytest.fixture
def calls(pack) -> list:
    pack.CALLS.clear()
    return pack.CALLS


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    (tmp_path / "in").mkdir()
    return Folders(tmp_path / "in", tmp_path / "out")


@pytest.fixture
def nodes(pack, folders: Folders) -> dict[str, type]:
    return {**core_nodes(folders), **pack.NODE_CLASS_MAPPINGS}


def full_names(prompt: dict) -> dict:
    """The prompt with the test pack's prefix before class names that are not core nodes."""
    core = core_nodes(Folders())
    return {
        node_id: {
            **node,
            "class_type": node["class_type"] if node["class_type"] in core else "HeadlessTest" + node["class_type"],
        }
        for node_id, node in prompt.items()
    }


@pytest.fixture(scope="session")
def bad_workflows() -> dict[str, dict]:
    table = json.loads((HERE / "data" / "bad_workflows.json").read_text())
    return {name: {**case, "prompt": full_names(case["prompt"])} for name, case in table.items()}


@pytest.fixture
def graph() -> Callable[..., Workflow]:
    """Builds a workflow: graph(id=("Class", {inputs}), ...), where ids may be any keyword."""
    return lambda **specs: Workflow.from_api(
        full_names({key.lstrip("n"): {"class_type": name, "inputs": inputs} for key, (name, inputs) in specs.items()})
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bad_case" in metafunc.fixturenames:
        metafunc.parametrize("bad_case", json.loads((HERE / "data" / "bad_workflows.json").read_text()))


@pytest.fixture
def fake_comfy(nodes):
    """A server of the standard library that answers as ComfyUI does; see fake_comfy.py for what can be scripted."""
    module = _load("headless_fake_comfy", HERE / "fake_comfy.py")
    with module.served(module.FakeComfy(nodes)) as fake:
        yield fake


@pytest.fixture
def fake_comfies():
    """Three such servers for the core nodes, each with the stack that closes it."""
    module = _load("headless_fake_comfy", HERE / "fake_comfy.py")
    stacks = [ExitStack() for _ in range(3)]
    yield [(stack.enter_context(module.served(module.FakeComfy(core_nodes(Folders())))), stack) for stack in stacks]
    for stack in stacks:
        stack.close()


@dataclass(frozen=True)
class ComfyServer:
    """A running ComfyUI with its base directory (`input`, `output`, `custom_nodes`)."""

    url: str
    base: Path
    log: Path
    process: subprocess.Popen


@pytest.fixture(scope="session")
def comfy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A real ComfyUI on the CPU with this pack and the test pack in its custom_nodes."""
    with serving(tmp_path_factory.mktemp("comfy")) as server:
        yield server


@pytest.fixture(scope="session")
def serve() -> Callable[..., AbstractContextManager[ComfyServer]]:
    """Starts further ComfyUIs, each for a block, with their base directories; see `serving`."""
    return serving


@contextmanager
def serving(base: Path, before: Sequence[str] = ()) -> Iterator[ComfyServer]:
    """A ComfyUI in `base` for the length of a block; `before` stands before its command: a program that watches it."""
    host = comfyui()
    packs = base / "custom_nodes"
    if not packs.exists():
        packs.mkdir()
        (packs / "wancore").symlink_to(HERE.parents[1], target_is_directory=True)
        (packs / "headless_test_pack").symlink_to(HERE / "pack", target_is_directory=True)
        (base / "input").mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*before, host.python, "main.py", "--cpu", "--disable-api-nodes"]
    command += ["--preview-method", "latent2rgb"]
    if os.environ.get("COMFYUI_FRONTEND"):
        command += ["--front-end-root", os.environ["COMFYUI_FRONTEND"]]
    command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:", "--port", str(port)]
    log = base / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=host.folder, stdout=file, stderr=subprocess.STDOUT)
    try:
        _wait_for(f"http://127.0.0.1:{port}/system_stats", process, log)
        yield ComfyServer(f"http://127.0.0.1:{port}", base, log, process)
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE)


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    def answers() -> bool:
        try:
            urllib.request.urlopen(url, timeout=PATIENCE).close()
        except urllib.error.URLError:
            return False
        return True

    try:
        wait_for(answers, process)
    except AssertionError:
        pytest.fail(f"ComfyUI did not start:\n{log.read_text()[-3000:]}")
