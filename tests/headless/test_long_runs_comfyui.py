"""Previews, kept latents and cancelling of the sampler inside a real ComfyUI."""

import io
import json
import threading
import time
import uuid
from pathlib import Path

import av
import pytest
import torch
import websocket
from PIL import Image
from safetensors.torch import save_file
from wancore.headless.client import run_on_server
from wancore.headless.core_nodes import core_nodes
from wancore.headless.server import Server
from wancore.headless.tiny import apply_tiny
from wancore.headless.workflow import Workflow
from wancore.nodes import NODE_CLASS_MAPPINGS
from wancore.wan_core.models.config import PreviewDecoderConfig
from wancore.wan_core.models.preview_decoder import PreviewDecoder
from wancore.wan_core.sampling.checkpoint import load_latents

from tests.programs import wait_for

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.comfyui


@pytest.fixture
def server(comfy_server) -> Server:
    return Server(comfy_server.url)


@pytest.fixture
def prompt(folders) -> dict:
    """Text to video on the tiny model, with options connected to the sampler."""
    classes = {**core_nodes(folders), **NODE_CLASS_MAPPINGS}
    prompt = apply_tiny(Workflow.load(ROOT / "workflows" / "api" / "t2v.json"), classes).to_api()
    (sampler,) = (node for node in prompt.values() if node["class_type"] == "WanCoreSampler")
    prompt["run"] = {"class_type": "WanCoreLongRun", "inputs": {"checkpoint_every": 1, "keep_latents": True}}
    prompt["cache"] = {"class_type": "WanCoreEasyCache", "inputs": {"threshold": 0.05, "start_step": 2}}
    sampler["inputs"] |= {"run": ["run", 0], "cache": ["cache", 0], "seed": uuid.uuid4().int % 2**32, "steps": 6}
    return prompt


def pictures_during(server: Server, work) -> list[Image.Image]:
    """The preview pictures that the server sends to a watcher while `work` goes on."""
    name = uuid.uuid4().hex
    watcher = websocket.create_connection(server.socket_url(name), timeout=1)
    found, done = [], threading.Event()

    def watch():
        while not done.is_set():
            try:
                message = watcher.recv()
            except websocket.WebSocketTimeoutException:
                continue
            if isinstance(message, bytes):
                found.append(message)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work(name)
        time.sleep(1)
    finally:
        done.set()
        thread.join()
        watcher.close()
    # Four bytes of event (1: a preview picture), four of format (1: JPEG, 2: PNG), then the file.
    return [Image.open(io.BytesIO(message[8:])) for message in found if message[:4] == b"\x00\x00\x00\x01"]


def test_previews_come_and_latents_stay(server, prompt, folders, comfy_server):
    def queue_and_wait(client_id):
        server.submit(prompt, client_id)
        wait_for(lambda: list((comfy_server.base / "output" / "wancore").glob("*.latent")))

    pictures = pictures_during(server, queue_and_wait)
    assert len(pictures) == 6
    assert {picture.size for picture in pictures} == {(512, 341)}  # enlarged by the host from 12x8 cells
    next(node for node in prompt.values() if node["class_type"] == "WanCoreSampler")["inputs"]["seed"] += 1
    (video,) = run_on_server(Workflow.from_api(prompt), server, folders).files
    _, record = load_latents(max((comfy_server.base / "output" / "wancore").glob("*.latent")))
    assert record["settings"]["steps"] == 6
    with av.open(str(video)) as container:
        assert "prompt" in container.metadata
        assert record in json.loads(container.metadata["wancore"])


def test_previews_are_those_of_the_tiny_autoencoder(server, prompt, comfy_server):
    file = comfy_server.base / "models" / "vae_approx" / "taew2_1.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    weights = PreviewDecoder(PreviewDecoderConfig(widths=(8, 6, 4, 4))).state_dict()
    red = {key: torch.zeros_like(value) for key, value in weights.items()}
    save_file({**red, "decoder.22.bias": torch.tensor([1.0, 0, 0])}, file)
    before = len(list((comfy_server.base / "output" / "wancore").glob("*.latent")))

    def queue_and_wait(client_id):
        server.submit(prompt, client_id)
        wait_for(lambda: len(list((comfy_server.base / "output" / "wancore").glob("*.latent"))) > before)

    try:
        pictures = pictures_during(server, queue_and_wait)
    finally:
        file.unlink()
    assert 1 <= len(pictures) <= 6
    for picture in pictures:
        red, green, blue = picture.convert("RGB").getpixel((200, 200))
        assert red > 240 > 15 > max(green, blue)


def test_a_run_that_is_stopped_goes_on(server, prompt, folders, comfy_server):
    sampler = next(node for node in prompt.values() if node["class_type"] == "WanCoreSampler")
    sampler["inputs"] |= {"steps": 400, "width": 256, "height": 256}

    def stop(event):
        if event.kind == "progress" and event.total == 400 and event.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_on_server(Workflow.from_api(prompt), server, folders, on_event=stop)
    resumed = []

    def watch(event):
        if event.kind == "progress" and event.total == 400:
            resumed.append(event.done)
            if len(resumed) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_on_server(Workflow.from_api(prompt), server, folders, on_event=watch)
    assert resumed[0] >= 5
    assert list((comfy_server.base / "output" / "wancore").glob("unfinished_*.safetensors"))
