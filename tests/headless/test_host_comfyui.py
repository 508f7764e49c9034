"""The pack as a guest of a real ComfyUI: its model folders, its cache, its buttons, and its own Wan nodes."""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import save_file

from tests.lora.fixtures import trained_weights
from tests.programs import PATIENCE, wait_for
from wan_core import bundled, catalog
from wan_core.loading.detect import detect_files
from wan_core.loading.pairs import find_pairs
from wan_core.loading.save_gguf import save_gguf
from wan_core.models.config import DiTConfig, VAEConfig
from wan_core.models.dit import WanDiT
from wan_core.models.vae import WanVAE
from wan_core.runtime import Cancelled
from wancore.headless.client import run_on_server
from wancore.headless.core_nodes import core_nodes
from wancore.headless.folders import Folders
from wancore.headless.overrides import apply_tiny
from wancore.headless.server import Server
from wancore.headless.workflow import Workflow
from wancore.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

ROOT = Path(__file__).resolve().parents[2]
API = ROOT / "workflows" / "api"
FILES = {
    "text_encoder": ("text_encoders", catalog.TEXT_ENCODER_PATTERN),
    "vae": ("vae", catalog.VAE_PATTERN),
    "image_encoder": ("clip_vision", catalog.IMAGE_ENCODER_PATTERN),
    "adapter": ("diffusion_models", catalog.MOTION_CONTROLLER_PATTERN),
}
"""Which loader's input takes which of the bundled files, and ComfyUI's folder for it."""

SMALL = {"width": 32, "height": 32, "num_frames": 5, "steps": 2}
pytestmark = pytest.mark.comfyui


@pytest.fixture
def server(comfy_server) -> Server:
    return Server(comfy_server.url)


@pytest.fixture(scope="module")
def placed(comfy_server, tmp_path_factory) -> Path:
    """ComfyUI's models folder with the bundled checkpoints as files in its own folders."""
    models, source = comfy_server.base / "models", tmp_path_factory.mktemp("tiny")
    for row in catalog.TINY_ROWS:
        folder = bundled.write_model(source, row.model_id)
        for pattern, name in zip(row.files, _files_of(row), strict=True):
            _put(folder / pattern.replace("*", ""), models / "diffusion_models" / name)
    shared = source / catalog.TINY
    for folder, name in FILES.values():
        _put(shared / name, models / folder / Path(name).name)
    _put(source / catalog.TINY_TI2V / catalog.VAE_22_PATTERN, models / "vae" / catalog.VAE_22_PATTERN)
    tokenizer = models / "text_encoders" / catalog.TOKENIZER_PATTERN
    _put(shared / catalog.TOKENIZER_PATTERN / bundled.TOKENIZER_FILE, tokenizer / bundled.TOKENIZER_FILE)
    trained_weights(comfy_server.base / "output")
    return models


def _put(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def _files_of(row: catalog.CatalogRow) -> list[str]:
    """The names of a bundled model's files in ComfyUI's folder; of a pair two."""
    name = row.model_id.rpartition("/")[2]
    return (
        [f"{name}_{noise}_noise.safetensors" for noise in ("high", "low")] if row.is_pair else [f"{name}.safetensors"]
    )


def _entry_of(model_id: str) -> str:
    """Its entry in the loader's list."""
    files = _files_of(catalog.find_row(model_id))
    return files[0] if len(files) == 1 else next(iter(find_pairs(files)))


def on_files(name: str, **changes) -> Workflow:
    """A shipped workflow whose loaders take files in ComfyUI's folders."""
    classes = {**core_nodes(Folders()), **NODE_CLASS_MAPPINGS}
    workflow = apply_tiny(Workflow.load(API / f"{name}.json"), classes)
    for node in workflow.nodes.values():
        own = {key: value for key, value in {**SMALL, **changes}.items() if key in node.inputs}
        own |= {key: Path(file).name for key, (_, file) in FILES.items() if isinstance(node.inputs.get(key), str)}
        if isinstance(node.inputs.get("model"), str):
            own["model"] = _entry_of(node.inputs["model"])
        if node.inputs.get("vae") == catalog.TINY_TI2V:
            own["vae"] = catalog.VAE_22_PATTERN
        if node.class_type == "WanCoreTrainedWeights" and isinstance(node.inputs["weights"], str):
            own["weights"] = f"{name.removeprefix('validate_')}.safetensors"
        workflow = workflow.with_inputs(node.id, own)
    return workflow


def test_every_node_is_there_beside_comfyuis_own(server):
    with urllib.request.urlopen(f"{server.url}/object_info") as answer:
        listed = json.load(answer)
    assert {"KSampler", "WanImageToVideo", *NODE_CLASS_MAPPINGS} <= set(listed)
    for name, cls in NODE_CLASS_MAPPINGS.items():
        assert listed[name]["display_name"] == NODE_DISPLAY_NAME_MAPPINGS[name]
        assert listed[name]["output"] == list(cls.RETURN_TYPES)


@pytest.mark.parametrize("name", sorted(path.stem for path in API.glob("*.json")))
def test_a_shipped_workflow_makes_a_video_from_files_in_comfyuis_folders(name, placed, server, folders):
    # A seed of its own: the tiny forms of some workflows are the same, and would come from the cache.
    done = run_on_server(on_files(name, seed=sum(name.encode())), server, folders)
    (video,) = [file for file in done.files if file.suffix == ".mp4"]
    with av.open(str(video)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.metadata["prompt"] and container.metadata["wancore"]
    assert len(frames) == SMALL["num_frames"] and frames[0].shape == (32, 32, 3)


def test_a_second_run_is_served_from_the_cache(placed, server, folders):
    pytest.importorskip("websocket")
    workflow = on_files("t2v", seed=4711)
    run_on_server(workflow, server, folders)
    events = []
    again = run_on_server(workflow, server, folders, on_event=events.append)
    assert {event.node.id for event in events if event.kind == "cached"} == set(workflow.nodes)
    assert not [event for event in events if event.kind in ("start", "progress")]
    assert len(again.files) == 1
    changed = []
    run_on_server(on_files("t2v", seed=4712), server, folders, on_event=changed.append)
    started = {event.node.class_type for event in changed if event.kind == "start"}
    assert started == {"WanCoreSampler", "WanCoreVAEDecode", "CreateVideo", "SaveVideo"}


def test_gguf_files_are_in_our_lists_and_not_in_comfyuis(placed, server, folders):
    """A DiT in the old folder `unet` and a text encoder make a video; ComfyUI's own loaders cannot read them."""
    for source, target in (
        ("diffusion_models/tiny", "unet/packed"),
        ("text_encoders/models_t5", "text_encoders/packed_t5"),
    ):
        (file,) = [
            path for path in placed.glob(f"{source}*") if path.stem in ("tiny", Path(catalog.TEXT_ENCODER_PATTERN).stem)
        ]
        (placed / target).parent.mkdir(exist_ok=True)
        save_gguf(detect_files(file), (placed / target).with_suffix(".gguf"), "Q8_0")
    with urllib.request.urlopen(f"{server.url}/object_info") as answer:
        listed = json.load(answer)
    inputs = {name: listed[name]["input"]["required"] for name in ("WanCoreModelLoader", "UNETLoader", "CLIPLoader")}
    assert "packed.gguf" in inputs["WanCoreModelLoader"]["model"][0]
    assert "packed.gguf" not in inputs["UNETLoader"]["unet_name"][0]
    assert "packed_t5.gguf" not in inputs["CLIPLoader"]["clip_name"][0]
    workflow = on_files("t2v", seed=99)
    for node in workflow.nodes.values():
        packed = {"model": "packed.gguf", "text_encoder": "packed_t5.gguf"}
        changes = {key: value for key, value in packed.items() if isinstance(node.inputs.get(key), str)}
        workflow = workflow.with_inputs(node.id, changes)
    done = run_on_server(workflow, server, folders)
    assert [file.suffix for file in done.files] == [".mp4"]


def post(server: Server, path: str, **body) -> None:
    urllib.request.urlopen(urllib.request.Request(f"{server.url}/{path}", json.dumps(body).encode())).close()


def until_idle(server: Server) -> None:
    wait_for(lambda: not any(server.queue().values()))


def test_interrupt_stops_a_run_in_the_middle_of_a_step(placed, server, folders):
    pytest.importorskip("websocket")
    workflow = on_files("t2v", width=448, height=448, num_frames=33, steps=1, seed=1)
    steps = []

    def watch(event):
        if event.kind == "start" and event.node.class_type == "WanCoreSampler":
            threading.Timer(1.5, post, (server, "interrupt")).start()
        if event.kind == "progress" and event.node.class_type == "WanCoreSampler":
            steps.append(event.done)

    with pytest.raises(Cancelled, match="interrupted on the server"):
        run_on_server(workflow, server, folders, on_event=watch)
    assert not any(steps), "the one step there is was finished"
    until_idle(server)
    assert run_on_server(on_files("t2v", seed=2), server, folders).files, "the model works after it"


def test_the_client_in_the_documentation_runs_as_it_is_printed(placed, server, tmp_path):
    """But for its server, and a workflow that asks for small models."""
    page = (ROOT / "docs" / "headless.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert 'SERVER = "http://127.0.0.1:8188"\n' in code
    (tmp_path / "client.py").write_text(code.replace("http://127.0.0.1:8188", server.url))
    (tmp_path / "workflows" / "api").mkdir(parents=True)
    (tmp_path / "workflows" / "api" / "t2v.json").write_text(json.dumps(on_files("t2v", seed=5).to_api()))
    command = [sys.executable, "-I", "client.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert not done.returncode, done.stderr
    with av.open(str(tmp_path / done.stdout.strip())) as container:
        assert len(list(container.decode(video=0))) == SMALL["num_frames"]
        assert "A paper boat on a river" in container.metadata["prompt"]


def test_several_workflows_in_one_command_wait_for_another_run(placed, server, tmp_path):
    slow = {
        "1": {"class_type": "HeadlessTestSlow", "inputs": {"steps": 9999}},
        "2": {"class_type": "HeadlessTestShow", "inputs": {"value": ["1", 0]}},
    }
    other = server.submit(slow, "another client")["prompt_id"]
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for seed, file in enumerate(files, 6):
        file.write_text(json.dumps(on_files("t2v", seed=seed).to_api()))
    command = [sys.executable, "-m", "headless", "run", *map(str, files), "--server", server.url]
    command += ["--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "Waiting: 1 run on the server first." in process.stderr.readline()
    assert len(server.queue()["pending"]) == 2
    server.stop(other)
    out, err = process.communicate(timeout=PATIENCE)
    assert not process.returncode, err
    videos = [Path(line) for line in out.splitlines()]
    assert len(videos) == 2 and videos[0].read_bytes() != videos[1].read_bytes()


MODELS = ("WanDiT", "WanVAE", "UMT5Encoder", "ImageEncoder")


def living(server: Server, folders: Folders) -> dict[str, int]:
    """How many of our models there are in the server's process."""
    prompt = {
        "1": {"class_type": "HeadlessTestLiving", "inputs": {"names": " ".join(MODELS)}},
        "2": {"class_type": "HeadlessTestShow", "inputs": {"value": ["1", 0]}},
    }
    (counts,) = run_on_server(Workflow.from_api(prompt), server, folders).ui["2"]["values"]
    return dict(zip(MODELS, map(int, counts.split()), strict=True))


def test_free_releases_every_model(placed, server, folders):
    workflow = on_files("i2v_480p", seed=3)
    show = {"value": ["living", 0]}
    prompt = {
        **workflow.to_api(),
        "living": {"class_type": "HeadlessTestLiving", "inputs": {"names": " ".join(MODELS)}},
        "show": {"class_type": "HeadlessTestShow", "inputs": show},
    }
    for _ in range(2):
        run_on_server(Workflow.from_api(prompt), server, folders)
    loaded = living_after(prompt, server, folders)
    assert loaded == dict.fromkeys(MODELS, 1), "each model is there once, however often it ran"
    post(server, "free", unload_models=True, free_memory=True)
    time.sleep(1)
    assert living(server, folders) == dict.fromkeys(MODELS, 0)
    assert run_on_server(workflow, server, folders).files


def living_after(prompt: dict, server: Server, folders: Folders) -> dict[str, int]:
    """What `prompt` itself counts, while its models are in ComfyUI's cache."""
    (counts,) = run_on_server(Workflow.from_api(prompt), server, folders).ui["show"]["values"]
    return dict(zip(MODELS, map(int, counts.split()), strict=True))


def _weights(module_class, config, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        module = module_class(config)
    return {name: tensor.to(dtype) for name, tensor in bundled.state_dict(module).items()}


@pytest.fixture(scope="module")
def native_models(comfy_server) -> None:
    """Models that ComfyUI's own loaders take too: with text of width 4096, and the VAE in its full width."""
    config = DiTConfig(dim=256, ffn_dim=512, num_layers=2, in_channels=36, has_image_input=True)
    models = comfy_server.base / "models"
    for folder, name, weights in (
        ("diffusion_models", "both_i2v", lambda: _weights(WanDiT, config)),
        ("vae", "both_vae", lambda: _weights(WanVAE, VAEConfig(), torch.bfloat16)),
    ):
        (models / folder).mkdir(parents=True, exist_ok=True)
        save_file(weights(), models / folder / f"{name}.safetensors")


def native_graph() -> dict:
    """ComfyUI's image-to-video graph, and ours on the same conditioning, each decoded by both."""
    size, run = {"width": 64, "height": 48}, {"seed": 7, "steps": 4, "cfg": 3.0}
    model, vae = "both_i2v.safetensors", "both_vae.safetensors"
    nodes = {
        "text": ("HeadlessTestConditions", {"seed": 5}),
        "grey": ("HeadlessTestPlain", {**size, "frames": 1, "level": 0.7}),
        "their vae": ("VAELoader", {"vae_name": vae}),
        "their model": ("UNETLoader", {"unet_name": model, "weight_dtype": "default"}),
        "shifted": ("ModelSamplingSD3", {"model": ["their model", 0], "shift": 5.0}),
        "wan": (
            "WanImageToVideo",
            {
                **size, "length": 9, "batch_size": 1, "positive": ["text", 0], "negative": ["text", 1],
                "clip_vision_output": ["text", 2], "vae": ["their vae", 0], "start_image": ["grey", 0],
            },
        ),
        "theirs": (
            "KSampler",
            {
                **run, "model": ["shifted", 0], "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
                "positive": ["wan", 0], "negative": ["wan", 1], "latent_image": ["wan", 2],
            },
        ),
        "our vae": ("WanCoreVAELoader", {"vae": vae, "dtype": "fp32"}),
        "adopted vae": ("WanCoreFromVAE", {"vae": ["their vae", 0], "dtype": "fp32"}),
        "our model": ("WanCoreModelLoader", {"model": model, "dtype": "fp32"}),
        "from": ("WanCoreFromConditioning", {"positive": ["wan", 0], "negative": ["wan", 1]}),
        "ours": (
            "WanCoreSampler",
            {
                **run, **size, "num_frames": 9, "shift": 5.0, "solver": "euler", "model": ["our model", 0],
                "conditioning": ["from", 0],
            },
        ),
        "to": ("WanCoreToConditioning", {**size, "num_frames": 9, "conditioning": ["from", 0]}),
    }  # fmt: skip
    again = {"positive": ["to", 0], "negative": ["to", 1], "latent_image": ["to", 2]}
    nodes["theirs again"] = ("KSampler", {**nodes["theirs"][1], **again})
    for latent in ("ours", "theirs"):
        for vae, decode, name in (
            ("their vae", "VAEDecode", "samples"),
            ("our vae", "WanCoreVAEDecode", "latent"),
            ("adopted vae", "WanCoreVAEDecode", "latent"),
        ):
            nodes[f"{latent} by {vae}"] = (decode, {name: [latent, 0], "vae": [vae, 0]})
    nodes["their encoded"] = ("VAEEncode", {"pixels": ["ours by their vae", 0], "vae": ["their vae", 0]})
    nodes["our encoded"] = ("WanCoreVAEEncode", {"images": ["ours by their vae", 0], "vae": ["our vae", 0]})
    return {title: {"class_type": kind, "inputs": inputs} for title, (kind, inputs) in nodes.items()}


COMPARED = {
    "a native graph decodes our latent": ("ours by their vae", "ours by our vae"),
    "we decode a native latent": ("theirs by their vae", "theirs by our vae"),
    "a native VAE is one of ours": ("ours by their vae", "ours by adopted vae"),
    "encoding": ("their encoded", "our encoded"),
    "their conditioning in our sampler": ("theirs", "ours"),
    "our conditioning in their sampler": ("theirs", "theirs again"),
}


@pytest.fixture(scope="module")
def compared(native_models, comfy_server, tmp_path_factory) -> dict[str, tuple[float, float]]:
    """The largest difference of each pair, and the spread of its values."""
    prompt, place = native_graph(), tmp_path_factory.mktemp("compared")
    for name, (first, second) in COMPARED.items():
        inputs = {"first": [first, 0], "second": [second, 0]}
        prompt[name] = {"class_type": "HeadlessTestApart", "inputs": inputs}
        for slot in (0, 1):
            prompt[f"{name} {slot}"] = {"class_type": "HeadlessTestShow", "inputs": {"value": [name, slot]}}
    folders = Folders(place, place)
    ui = run_on_server(Workflow.from_api(prompt), Server(comfy_server.url), folders).ui
    return {name: tuple(ui[f"{name} {slot}"]["values"][0] for slot in (0, 1)) for name in COMPARED}


@pytest.mark.parametrize("name", COMPARED)
def test_our_nodes_and_comfyuis_mix(compared, name):
    difference, spread = compared[name]
    assert spread > 0.05
    assert difference < 1e-4
