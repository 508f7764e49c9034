"""The pack loads quickly and anywhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
foreign = {"nodes", "wan_core", "server", "transformers", "modelscope", "imageio", "av", "diffusers",
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
    assert load(ROOT)[0] < 0.5


def test_a_folder_name_with_a_hyphen(tmp_path):
    folder = tmp_path / "ComfyUI-Wan-Core"
    for part in ("nodes", "trainer", "wan_core"):
        shutil.copytree(ROOT / part, folder / part)
    shutil.copy(ROOT / "__init__.py", folder)
    assert load(folder)[1] == load(ROOT)[1] > 0


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
