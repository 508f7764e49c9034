"""The pack loads quickly and anywhere, and each of its modules once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wancore.headless import cli

ROOT = Path(__file__).parents[1]

LOAD = """
import importlib.util, sys, time
started = time.process_time()
import torch
there = time.process_time()
root = sys.argv[1]
name = "custom_nodes_x_pack"
spec = importlib.util.spec_from_file_location(name, root + "/__init__.py", submodule_search_locations=[root])
pack = importlib.util.module_from_spec(spec)
sys.modules[name] = pack
spec.loader.exec_module(pack)
print((time.process_time() - there) / (there - started), len(pack.NODE_CLASS_MAPPINGS))
foreign = {"nodes", "server", "transformers", "modelscope", "imageio", "av", "diffusers",
           "accelerate", "peft"} & set(sys.modules)
assert not foreign, foreign
"""


def load(folder: Path) -> tuple[float, int]:
    """The processor's time for the pack at `folder`, over that for torch, and the number of nodes."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", LOAD, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=env, check=False)
    assert not done.returncode, done.stderr
    share, count = done.stdout.split()
    return float(share), int(count)


def test_import_is_quick_once_torch_is_there():
    load(ROOT)  # writes the bytecode files
    # What else the machine does at the time makes a share larger or smaller by a tenth.
    assert min(load(ROOT)[0] for _ in range(2)) < 0.5


COMFYUI = """
import importlib.util
def load(folder):
    name = folder.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
pack = load(folder)
assert pack.WEB_DIRECTORY and pack.NODE_CLASS_MAPPINGS and pack.NODE_DISPLAY_NAME_MAPPINGS
try:
    load(root)
except ImportError as error:
    assert root in str(error) and folder in str(error), error
else:
    raise AssertionError("two copies in one process")
"""

PROGRAM = """
import runpy
try:
    {start}
except SystemExit as end:
    assert not end.code
"""

LIBRARY = """
sys.path.insert(0, folder)
import wan_core, pack
pack.register()
"""

ONE_IDENTITY = """
import collections, pathlib, wan_core, wancore.headless.cli, wancore.nodes, wancore.trainer.model.load
assert wan_core.ModelConfig is wancore.trainer.model.load.ModelConfig
try:
    import wancore.wan_core
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the library has a second name")
names = collections.defaultdict(set)
for name, module in list(sys.modules.items()):
    if getattr(module, "__file__", None) is not None:
        names[pathlib.Path(module.__file__).resolve()].add(name)
for file, known in names.items():
    if file.is_relative_to(folder) and file.parent != pathlib.Path(folder) and not known & {"__main__", "__mp_main__"}:
        name = ".".join(file.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        expected = name if name.startswith("wan") else "wancore." + name
        assert known - {"headless"} <= {expected}, (file, known)
assert any(file.is_relative_to(folder) for file in names)
"""

ENTRIES = {
    "ComfyUI": COMFYUI,
    "headless": PROGRAM.format(start="sys.path.insert(0, folder); runpy.run_module('headless', run_name='__main__')"),
    "trainer": PROGRAM.format(start="runpy.run_path(folder + '/trainer/recipe.py', run_name='__main__')"),
    "library": LIBRARY,
    "pip": "sys.path.insert(0, folder)",
}


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The pack in a folder whose name no package can have."""
    folder = tmp_path_factory.mktemp("custom_nodes") / "ComfyUI-Wan 2.1 Core"
    for part in ("nodes", "trainer", "headless", "wan_core", "workflows"):
        shutil.copytree(ROOT / part, folder / part)
    for file in ("__init__.py", "pack.py", "setup.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder)
    return folder


@pytest.fixture(scope="module")
def installed(copied, tmp_path_factory):
    """The folder into which pip installed the pack."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run([*pip, "--target", folder, copied], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return folder


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_process_has_each_module_once(entry, copied, request):
    folder = request.getfixturevalue("installed") if entry == "pip" else copied
    code = "import sys; root, folder = sys.argv[1:]; sys.argv[1:] = ['--help']\n" + ENTRIES[entry] + ONE_IDENTITY
    command = [sys.executable, "-c", code, ROOT, folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert not done.returncode, done.stderr


def test_pip_installs_the_library_and_one_command(installed, tmp_path):
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"bin", "wan_core", "wancore"}
    command = [sys.executable, installed / "bin" / "wancore", "run", "t2v", "--tiny", "--set", "Sampler.steps=1"]
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
    assert not done.returncode, done.stderr
    assert (tmp_path / done.stdout.strip()).suffix == ".mp4" and (tmp_path / done.stdout.strip()).is_file()


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ((), ["usage: wancore "]),
        (("train",), ["usage: wancore train ", "--dataset_base_path"]),
        (("recipe",), ["usage: wancore recipe ", "--dry-run"]),
        (("plan",), ["usage: wancore plan ", "--vram"]),
    ],
)
def test_the_command_shows_the_help_of_each_part(words, shown, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/wancore", *words, "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    text = capsys.readouterr().out
    assert not ended.value.code and all(part in text for part in shown)


def test_the_library_stands_alone(tmp_path):
    shutil.copytree(ROOT / "wan_core", tmp_path / "wan_core")
    code = "from wan_core import WanVideoPipeline, ModelConfig, save_video, load_video"
    check = "import sys; assert not {'comfy', 'nodes', 'folder_paths'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{code}; {check}"], cwd=tmp_path, check=True)


@pytest.mark.parametrize("command", [("-m", "headless"), ("-m", "trainer.recipe"), ("trainer/train.py",)])
def test_a_python_without_torch_is_told_in_a_line(command):
    """`-S` leaves installed packages out."""
    done = subprocess.run([sys.executable, "-S", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "has no package" in done.stderr and ".venv" in done.stderr
    assert len(done.stderr.splitlines()) == 1
