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

from tests.programs import wait_for
from wan_core.models.config import PreviewDecoderConfig
from wan_core.models.preview_decoder import PreviewDecoder
from wan_core.sampling.checkpoint import load_latents
from wancore.headless.client import run_on_server
from wancore.headless.core_nodes import core_nodes
from wancore.headless.folders import Folders
from wancore.headless.overrides import apply_tiny
from wancore.headless.server import Server
from wancore.headless.workflow import Workflow
from wancore.nodes import NODE_CLASS_MAPPINGS

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


@pytest.fixture
def slow_to_decode(prompt) -> Workflow:
    """Two steps, and a video that takes a while to decode."""
    sampler = next(node for node in prompt.values() if node["class_type"] == "WanCoreSampler")
    sampler["inputs"] |= {"steps": 2, "width": 256, "height": 256, "num_frames": 33}
    del sampler["inputs"]["cache"]
    return Workflow.from_api(prompt)


def leave(workflow: Workflow, server: Server, folders: Folders, kind: str, class_type: str, how=lambda: None) -> None:
    """Run `workflow` up to the first event of that kind from a node of that class; then do `how`, and stop the run."""

    def follow(event):
        if event.kind == kind and event.node.class_type == class_type:
            how()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_on_server(workflow, server, folders, on_event=follow)


def finish(workflow: Workflow, server: Server, folders: Folders, kept: Path) -> None:
    """Run `workflow` to its end: nothing is sampled, there is one video, and its latents are kept once."""
    events = []
    (video,) = run_on_server(workflow, server, folders, on_event=events.append).files
    assert "WanCoreVAEDecode" in {event.node.class_type for event in events if event.kind == "progress"}
    assert "WanCoreSampler" not in {event.node.class_type for event in events if event.kind == "progress"}
    with av.open(str(video)) as container:
        assert len(list(container.decode(video=0))) == 33
    wait_for(lambda: not list(kept.glob("unfinished_*")))


def test_after_kills_while_decoding_and_saving_nothing_is_sampled_again(slow_to_decode, folders, serve, tmp_path):
    base = tmp_path / "comfy"
    base.mkdir()
    for kind, class_type in (("progress", "WanCoreVAEDecode"), ("start", "SaveVideo")):
        with serve(base) as comfy:
            leave(slow_to_decode, Server(comfy.url), folders, kind, class_type, comfy.process.kill)
        assert sorted(path.suffix for path in (base / "output" / "wancore").iterdir()) == [".latent", ".safetensors"]
    with serve(base) as comfy:
        finish(slow_to_decode, Server(comfy.url), folders, base / "output" / "wancore")
    assert [path.name for path in (base / "output" / "wancore").iterdir()] == ["wancore_00001_.latent"]
    assert [path.name for path in (base / "output" / "video").iterdir()] == ["wancore_t2v_00001_.mp4"]


def test_a_run_whose_decoding_was_stopped_is_forgotten_once_its_video_is_saved(
    slow_to_decode, server, folders, comfy_server
):
    """Its sampler is not run again then, because ComfyUI has its result in the cache."""
    kept = comfy_server.base / "output" / "wancore"
    for unfinished in kept.glob("unfinished_*"):
        unfinished.unlink()
    for _ in range(2):
        leave(slow_to_decode, server, folders, "progress", "WanCoreVAEDecode")
        wait_for(lambda: not any(server.queue().values()))
        assert len(list(kept.glob("unfinished_*"))) == 1
    finish(slow_to_decode, server, folders, kept)
