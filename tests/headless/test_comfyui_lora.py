"""LoRAs inside a real ComfyUI: stacked, curved, described and saved, with the same frames as in this process."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.lora.fixtures import WRITERS, factors, linear_paths
from tests.reference import tiny_dit
from wancore.headless.client import run_on_server
from wancore.headless.core_nodes import core_nodes
from wancore.headless.overrides import apply_tiny
from wancore.headless.runner import run
from wancore.headless.server import Server
from wancore.headless.workflow import Workflow
from wancore.nodes import NODE_CLASS_MAPPINGS, host

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.comfyui


@pytest.fixture
def models(tmp_path):
    host.configure(device="cpu", models_dir=tmp_path / "models", output_dir=tmp_path / "output")
    yield tmp_path / "models"
    host.configure()


def frames(files: list[Path]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)).astype(int) for file in files])


def test_stacked_loras_give_the_same_frames_here_and_there(comfy_server, folders, models):
    made = factors(tiny_dit("t2v"), linear_paths(tiny_dit("t2v")))
    for root in (comfy_server.base / "models", models):
        (root / "loras").mkdir(parents=True, exist_ok=True)
        for name in ("diffusers", "kohya"):
            save_file(WRITERS[name](made), root / "loras" / f"{name}.safetensors")
    classes = {**core_nodes(folders), **NODE_CLASS_MAPPINGS}
    prompt = apply_tiny(Workflow.load(ROOT / "workflows" / "api" / "t2v.json"), classes).to_api()
    node = {entry["class_type"]: node_id for node_id, entry in prompt.items()}
    for name in ("CreateVideo", "SaveVideo"):
        del prompt[node[name]]
    for entry in prompt.values():
        entry["inputs"] |= {
            k: v for k, v in {"dtype": "fp32", "negative_prompt": "blurry"}.items() if k in entry["inputs"]
        }
    prompt["save"] = {
        "class_type": "SaveImage", "inputs": {"images": [node["WanCoreVAEDecode"], 0], "filename_prefix": "frame"},
    }  # fmt: skip
    plain = run(Workflow.from_api(prompt), classes, folders=folders).files
    first = {"model": [node["WanCoreModelLoader"], 0], "lora": "diffusers.safetensors", "strength": 0.8}
    second = {
        "model": ["one", 0],
        "lora": "kohya.safetensors",
        "strength": -0.5,
        "strength_curve": "1, 0",
        "blocks": "0-2",
    }
    prompt["one"] = {"class_type": "WanCoreLoraLoader", "inputs": first}
    prompt["two"] = {"class_type": "WanCoreLoraLoader", "inputs": second}
    prompt["info"] = {"class_type": "WanCoreLoraInfo", "inputs": {"lora": "kohya.safetensors", "model": ["one", 0]}}
    saved = {"lora": "kohya.safetensors", "strength": 1.0, "filename": "new", "second_lora": "diffusers.safetensors"}
    prompt["keep"] = {"class_type": "WanCoreLoraSave", "inputs": saved}
    prompt[node["WanCoreSampler"]]["inputs"]["model"] = ["two", 0]
    workflow = Workflow.from_api(prompt)
    here = run(workflow, classes, folders=folders)
    there = run_on_server(workflow, Server(comfy_server.url), folders)
    assert np.abs(frames(here.files) - frames(there.files)).max() <= 1
    assert np.abs(frames(here.files) - frames(plain)).max() > 10
    assert here.ui["info"] == there.ui["info"] and "in the same way" in there.ui["info"]["text"][0]
    merged = load_file(comfy_server.base / "output" / "loras" / "new_00001.safetensors")
    assert merged["diffusion_model.blocks.0.ffn.0.lora_A.weight"].dtype == torch.bfloat16
