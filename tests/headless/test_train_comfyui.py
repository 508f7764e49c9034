"""Training inside a real ComfyUI: from data to a video, interrupted and queued again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import wait_for
from wan_core.media import probe
from wancore.headless.client import run_on_server
from wancore.headless.core_nodes import core_nodes
from wancore.headless.overrides import apply_tiny
from wancore.headless.server import Server
from wancore.headless.workflow import Workflow
from wancore.nodes import NODE_CLASS_MAPPINGS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module", autouse=True)
def equipped():
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import accelerate, av, peft"], capture_output=True, check=False).returncode:
        pytest.skip("ComfyUI's Python lacks what training needs: install requirements.txt")


def workflow(folders, **training) -> Workflow:
    classes = {**core_nodes(folders), **NODE_CLASS_MAPPINGS}
    found = apply_tiny(Workflow.load(ROOT / "workflows" / "api" / "train_lora_t2v.json"), classes)
    for title, inputs in {"Train": training, "Sampler": {"steps": 2}}.items():
        node = next(node for node in found.nodes.values() if node.title == title)
        found = found.with_inputs(node.id, inputs)
    return found


def steps(folder: Path, name: str = "step") -> list[int]:
    """The steps of the events of that name."""
    file = folder / "events.jsonl"
    told = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [event["step"] for event in map(json.loads, told) if event["event"] == name]


def test_a_training_is_interrupted_continued_and_shown(comfy_server, folders):
    server = Server(comfy_server.url)
    run = comfy_server.base / "output" / "training" / "中文 run"
    prompt = workflow(folders, name="中文 run", max_steps=200).to_api()
    queued = server.submit(prompt, "a test")["prompt_id"]
    wait_for(lambda: len(steps(run)) >= 2)
    server.stop(queued)
    found = wait_for(lambda: server.history(queued))
    assert "execution_interrupted" in json.dumps(found["status"])
    done = steps(run)[-1]
    assert done < 200 and list((run / "states").iterdir())

    (video,) = [
        file
        for file in run_on_server(workflow(folders, name="中文 run", max_steps=done + 2), server, folders).files
        if file.suffix == ".mp4"
    ]
    assert steps(run) == list(range(1, done + 3))
    assert probe(video).num_frames == 17


def test_a_training_outlives_its_comfyui(serve, folders, tmp_path):
    """ComfyUI is killed: the training saves and ends by itself, and a new ComfyUI continues it."""
    run = tmp_path / "output" / "training" / "a run"
    with serve(tmp_path) as first:
        Server(first.url).submit(workflow(folders, name="a run", max_steps=200).to_api(), "a test")
        wait_for(lambda: len(steps(run)) >= 2)
        first.process.kill()
    (begun,) = wait_for(lambda: steps(run, "end"))
    assert begun == steps(run)[-1] < 200 and (run / "states" / f"step-{begun:07}").is_dir()
    with serve(tmp_path) as second:
        files = run_on_server(workflow(folders, name="a run", max_steps=begun + 1), Server(second.url), folders).files
    assert steps(run) == list(range(1, begun + 2))
    assert any(file.suffix == ".mp4" for file in files)
