"""The shipped workflows: both forms agree, use registered nodes, and run to a playable video."""

import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests import fork_server
from tests.lora.fixtures import trained_weights
from tools import workflows
from tools.film_workflows import FILMS
from tools.graph import inputs, is_widget
from tools.templates import TEMPLATES, template
from tools.training_workflows import VALIDATIONS
from tools.workflow_texts import WORKFLOWS
from wan_core.catalog import published
from wan_core.media import probe
from wancore.headless.core_nodes import core_nodes
from wancore.headless.folders import Folders
from wancore.headless.overrides import apply_tiny
from wancore.headless.runner import run
from wancore.headless.schema import schemas_of, validate
from wancore.headless.workflow import Workflow
from wancore.nodes import NODE_CLASS_MAPPINGS, host
from wancore.nodes.places import OWNERS_FOLDERS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "workflows"
NAMES = sorted(path.stem for path in (FOLDER / "api").glob("*.json"))
CLASSES = {**core_nodes(Folders()), **NODE_CLASS_MAPPINGS}


def load(*parts: str) -> dict:
    return json.loads(FOLDER.joinpath(*parts).read_text(encoding="utf-8"))


def editor_form(name: str) -> dict:
    return load(f"{template(name)}.json")


def test_files_are_what_their_descriptions_say(tmp_path):
    workflows.write(tmp_path)
    built = {p.relative_to(tmp_path): p.read_text(encoding="utf-8") for p in tmp_path.rglob("*.json")}
    shipped = {p.relative_to(FOLDER): p.read_text(encoding="utf-8") for p in FOLDER.rglob("*.json")}
    assert built == shipped
    assert set(NAMES) == set(TEMPLATES), "each has a name in the template browser"
    pictures = {path.stem for path in FOLDER.glob("*.jpg")}
    assert pictures == {template(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_editor_links_join_matching_slots(name):
    workflow = editor_form(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert workflow["last_node_id"] == max(nodes)
    assert workflow["last_link_id"] == max(link[0] for link in workflow["links"])
    for link_id, source, output, target, slot, kind in workflow["links"]:
        assert link_id in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link_id
        assert nodes[source]["outputs"][output]["type"] == nodes[target]["inputs"][slot]["type"] == kind


LOADERS = {
    "WanCoreModelLoader": "diffusion_models",
    "WanCoreTextEncoderLoader": "text_encoders",
    "WanCoreVAELoader": "vae",
    "WanCoreImageEncoderLoader": "clip_vision",
    "WanCoreSpeedControl": "diffusion_models",
    "WanCoreLoraLoader": "loras",
}
"""Where the files of a loader belong."""
OWN_FILES = ("WanCoreSpeedControl", "WanCoreLoraLoader")
"""Loaders whose first input is another node's, or whose lists hold no published files."""


@pytest.mark.parametrize("name", NAMES)
def test_nodes_say_where_they_and_their_files_come_from(name):
    workflow = editor_form(name)
    note, *nodes = workflow["nodes"]
    assert note["type"] == "MarkdownNote" and note["widgets_values"][0].startswith("## ")
    for node in nodes:
        ours = node["type"] in NODE_CLASS_MAPPINGS
        expected = ("wancore", workflows.version()) if ours else ("comfy-core", "0.3.64")
        assert (node["properties"]["cnr_id"], node["properties"]["ver"]) == expected
        assert node["color"] != node["bgcolor"]
        links = node["properties"].get("models", [])
        assert {link["directory"] for link in links} == {LOADERS[kind] for kind in LOADERS if kind == node["type"]}
        is_pair = "a14b" in name and node["type"] in ("WanCoreModelLoader", "WanCoreLoraLoader")
        assert len(links) == (2 if is_pair else len({link["directory"] for link in links}))
        for link in links:
            assert link["name"].endswith((".safetensors", ".pth"))
            assert link["url"].startswith(("https://huggingface.co/", "https://modelscope.cn/"))
    inside = [
        any(x <= node["pos"][0] and node["pos"][0] + node["size"][0] <= x + width and y <= node["pos"][1]
            and node["pos"][1] + node["size"][1] <= y + height
            for x, y, width, height in (group["bounding"] for group in workflow["groups"]))
        for node in nodes
    ]  # fmt: skip
    assert all(inside), "every node stands in a group"


@pytest.mark.parametrize("name", NAMES)
def test_loaders_name_what_they_list(name, tmp_path):
    """On a machine without any model, where a list holds what is published."""
    host.configure(models_dir=tmp_path, input_dir=tmp_path)
    try:
        lists = {kind: next(inputs(CLASSES[kind])) for kind in LOADERS if kind not in OWN_FILES}
    finally:
        host.configure()
    for node in load("api", f"{name}.json").values():
        if node["class_type"] in lists:
            widget, choices, *_ = lists[node["class_type"]]
            assert node["inputs"][widget] in choices


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_has_a_picture(name):
    path = FOLDER / f"{template(name)}.jpg"
    assert path.is_file(), "run python -m tools.workflows --thumbnails"
    assert path.stat().st_size < 40_000
    with Image.open(path) as picture:
        assert (picture.format, picture.size) == ("JPEG", workflows.SIZE)


def test_the_picture_is_of_the_workflows_own_run(tmp_path):
    workflows.thumbnail("speed_1.3b", tmp_path / "again.jpg")
    shown = [
        np.asarray(Image.open(path), np.float32)
        for path in (tmp_path / "again.jpg", FOLDER / f"{template('speed_1.3b')}.jpg")
    ]
    other = np.asarray(Image.open(FOLDER / f"{template('i2v_480p')}.jpg"), np.float32)
    assert np.abs(shown[0] - shown[1]).mean() < 5 < np.abs(shown[0] - other).mean()


def as_api(workflow: dict) -> dict:
    """The editor's form read as the front end reads it: widget values by position, links by slot."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        values, given = iter(node["widgets_values"]), {}
        slots = {entry["name"]: entry for entry in node["inputs"]}
        for name, kind, options, _ in inputs(CLASSES[node["type"]]):
            if is_widget(kind):
                given[name] = next(values)
                if options.get("control_after_generate"):
                    assert next(values) in ("fixed", "randomize", "increment", "decrement")
                if any(option.endswith("_upload") for option in options):
                    assert next(values) == "image"
            if slots[name]["link"] is not None:
                given[name] = sources[slots[name]["link"]]
        assert next(values, None) is None
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": given}
    return prompt


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_are_the_same_workflow(name):
    twin = load("api", f"{name}.json")
    titles = {key: node.pop("_meta")["title"] for key, node in twin.items()}
    assert as_api(editor_form(name)) == twin
    assert len(set(titles.values())) == len(titles), "a shell names nodes by them"


def loaded(name: str, classes: dict[str, type], weights: Path, file: Path | None = None) -> Workflow:
    """A workflow in its tiny form, or that in `file`; one that shows what the shell has trained gets `weights`."""
    workflow = apply_tiny(Workflow.load(file or FOLDER / "api" / f"{name}.json"), classes)
    return with_inputs(workflow, "Trained weights", {"weights": str(weights)}) if name in VALIDATIONS else workflow


def with_inputs(workflow: Workflow, title: str, inputs: dict) -> Workflow:
    node = next(node for node in workflow.nodes.values() if node.title == title)
    return workflow.with_inputs(node.id, inputs)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """What the shell has trained, in a folder from which the machine's owner lets workflows read."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(OWNERS_FOLDERS, str(folder))
        yield trained_weights(folder)


@pytest.mark.parametrize("name", NAMES)
def test_the_api_form_is_valid(name, weights):
    workflow = loaded(name, CLASSES, weights.get(name))
    assert validate(workflow, schemas_of(CLASSES)).nodes.keys() == workflow.nodes.keys()


def test_the_command_runs_twice_into_numbered_videos(tmp_path):
    command = [fork_server.python(), "-m", "headless", "run", "workflows/api/t2v.json", "--tiny", "--quiet"]
    command += ["--out", str(tmp_path), "--device", "cpu", "--set", "Sampler.steps=2"]
    videos = []
    for seed in (1, 2):
        set_seed = ["--set", f"Sampler.seed={seed}"]
        done = subprocess.run([*command, *set_seed], cwd=ROOT, capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr
        videos.append(Path(done.stdout.strip()))
    assert [v.name for v in videos] == ["wancore_t2v_00001_.mp4", "wancore_t2v_00002_.mp4"]
    check_video(videos[0])
    assert videos[0].read_bytes() != videos[1].read_bytes()


def check_video(path: Path, fps: float = 16.0, frames: int = 17) -> None:
    info = probe(path)
    assert (info.codec, info.fps, info.num_frames, info.width, info.height) == ("h264", fps, frames, 96, 64)


def frames_of_film(name: str) -> int:
    """Frames of a workflow of several clips: two of 17, which share one frame, or take over five of a film's."""
    if name.startswith("segments"):
        return 2 * 17 - 1
    return probe(FOLDER / "assets" / "source.mp4").num_frames + 2 * (17 - 5)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def run_tiny(models, weights, tmp_path, monkeypatch):
    """Runs a shipped workflow on tiny models with changes {title: {input: value}}; returns the video's path."""
    monkeypatch.setattr(sys, "executable", fork_server.python())  # which trains

    def execute(name: str, changes: dict[str, dict] | None = None, file: Path | None = None) -> Path:
        host.configure(device="cpu", models_dir=models, output_dir=tmp_path / "out")
        folders = Folders(tmp_path / "in", tmp_path / "out")
        nodes = {**core_nodes(folders), **NODE_CLASS_MAPPINGS}
        workflow = loaded(name, nodes, weights.get(name), file)
        for title, given in {"Sampler": {"steps": 2, "cfg": 1.5}, **(changes or {})}.items():
            workflow = with_inputs(workflow, title, given)
        return run(workflow, nodes, folders=folders, on_event=lambda _: None).files[-1]

    yield execute
    host.configure()


# What each input of a workflow of a kind can be changed to.
CHANGES = {
    "t2v_a14b": [{"Prompt": {"prompt": "rain"}}, {"Sampler": {"cfg_low": 4.0}}],
    "ti2v_5b": [{"Start image": {"image": "end.png"}}],
    "t2v_1.3b": [{"Prompt": {"prompt": "rain"}}, {"Prompt": {"negative_prompt": "snow"}}],
    "i2v_480p": [{"Start image": {"image": "end.png"}}],
    "flf2v_720p": [{"Start image": {"image": "end.png"}}, {"End image": {"image": "start.png"}}],
    "fun_inp_1.3b": [{"Start image": {"image": "reference.png"}}, {"End image": {"image": "reference.png"}}],
    "fun_control_1.3b": [{"Control video": {"file": "source.mp4"}}],
    "fun_v1.1_control_1.3b": [{"Control video": {"file": "mask.mp4"}}, {"Reference image": {"image": "start.png"}}],
    "fun_v1.1_camera_1.3b": [{"Camera path": {"direction": "In"}}, {"Start image": {"image": "end.png"}}],
    "extend_vace_1.3b": [{"Film": {"file": "control.mp4"}}, {"Prompts": {"prompts": "rain\nsnow"}}],
    "vace_1.3b": [
        {"Source video": {"file": "control.mp4"}},
        {"Mask video": {"file": "control.mp4"}},
        {"Reference image": {"image": "start.png"}},
        {"VACE encode": {"strength": 0.5}},
    ],
    "speed_1.3b": [{"Speed control": {"motion_bucket_id": 0.0}}],
    "validate_lora": [{"Trained weights": {"strength": 0.0}}],
    "validate_full": [{"Trained weights": {"strength": 0.0}}],
    "train_lora_t2v": [{"Trained weights": {"strength": 0.0}}],
}


def latents_of(path: Path) -> str:
    """The digest of the latents that a video was decoded from, as its metadata tells it.

    Pixels of the file do not serve: libx264 writes other bytes for the same frames once in a hundred runs.
    """
    with av.open(str(path)) as container:
        return json.loads(container.metadata["wancore"])[0]["latents"]["sha256"]


# With a LoRA that is not there a workflow is the one without it, on bundled models: one of one file and one of a pair.
RUN = [name for name in NAMES if not name.endswith("_4step") or name in ("t2v_1.3b_4step", "t2v_a14b_4step")]


@pytest.mark.parametrize("name", RUN)
def test_it_runs_to_a_playable_video_which_every_input_changes(name, run_tiny):
    film = FILMS.get(name)
    video, row = run_tiny(name), published(film.model_id) if film else WORKFLOWS.get(name)
    check_video(video, row.preset.fps if row else 16.0, frames_of_film(name) if film else 17)
    if changes := CHANGES.get(name):
        before = latents_of(video)
        assert latents_of(run_tiny(name)) == before
        for change in changes:
            assert latents_of(run_tiny(name, change)) != before, change


FIRST_RELEASE = ROOT / "tests" / "data" / "first_release"


KEPT = ["t2v", "i2v_480p", "vace_1.3b"]


@pytest.mark.parametrize("name", KEPT)
def test_a_workflow_of_the_first_release_gives_the_same_latents(name, run_tiny):
    assert latents_of(run_tiny(name, file=FIRST_RELEASE / f"{name}.api.json")) == latents_of(run_tiny(name))


@pytest.mark.parametrize("name", KEPT)
def test_a_workflow_of_the_first_release_is_valid_and_means_the_same(name):
    """Its saved values land in the widgets that they were saved from, and its links in the inputs of those names."""
    old = json.loads((FIRST_RELEASE / f"{name}.json").read_text(encoding="utf-8"))
    shell = Workflow.load(FIRST_RELEASE / f"{name}.api.json")
    tiny = apply_tiny(shell, CLASSES)
    assert validate(tiny, schemas_of(CLASSES)).nodes.keys() == shell.nodes.keys()
    kept = json.loads((FIRST_RELEASE / f"{name}.api.json").read_text(encoding="utf-8"))
    # It runs as today's workflow does: what it does not say is a default, which changes nothing.
    for key, now in load("api", f"{name}.json").items():
        declared = {entry[0]: entry[2].get("default") for entry in inputs(CLASSES[now["class_type"]])}
        assert kept[key]["class_type"] == now["class_type"]
        before, after = ({**declared, **node["inputs"]} for node in (kept[key], now))
        # Exact kernels agree up to rounding; which is the default has changed since.
        assert {**before, "attention": None} == {**after, "attention": None}
    for node in old["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        values = iter(node["widgets_values"])
        for input_name, kind, options, _ in inputs(CLASSES[node["type"]]):
            if not is_widget(kind) or (value := next(values, None)) is None:
                continue
            if options.get("control_after_generate") or any(option.endswith("_upload") for option in options):
                next(values, None)
            assert kept[str(node["id"])]["inputs"].get(input_name, value) == value, (node["type"], input_name)
