"""The shipped workflows: both forms agree, use registered nodes, and run to a playable video."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import wancore
from wancore.headless.core_nodes import core_nodes
from wancore.headless.folders import Folders
from wancore.headless.schema import schemas_of
from wancore.headless.validate import validate
from wancore.headless.workflow import Workflow
from wancore.wan_core.media import probe_video

from workflows import build
from workflows.graph import declared_inputs, is_widget

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
CLASSES = {**core_nodes(Folders()), **wancore.NODE_CLASS_MAPPINGS}


def load(*parts: str) -> dict:
    return json.loads(FOLDER.joinpath(*parts).read_text(encoding="utf-8"))


def test_files_are_what_their_descriptions_say(tmp_path):
    build.write(tmp_path)
    built = {p.relative_to(tmp_path): p.read_text(encoding="utf-8") for p in tmp_path.rglob("*.json")}
    shipped = {p.relative_to(FOLDER): p.read_text(encoding="utf-8") for p in FOLDER.rglob("*.json")}
    assert built == shipped
    assert NAMES


@pytest.mark.parametrize("name", NAMES)
def test_editor_links_join_matching_slots(name):
    workflow = load(f"{name}.json")
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert workflow["last_node_id"] == max(nodes)
    assert workflow["last_link_id"] == max(link[0] for link in workflow["links"])
    for link_id, source, output, target, slot, kind in workflow["links"]:
        assert link_id in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link_id
        assert nodes[source]["outputs"][output]["type"] == nodes[target]["inputs"][slot]["type"] == kind


def as_api(workflow: dict) -> dict:
    """The editor's form read as the front end reads it: widget values by position, links by slot."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        values, inputs = iter(node["widgets_values"]), {}
        slots = {entry["name"]: entry for entry in node["inputs"]}
        for name, (kind, options, _) in declared_inputs(CLASSES[node["type"]]).items():
            if is_widget(kind):
                inputs[name] = next(values)
                if options.get("control_after_generate"):
                    assert next(values) in ("fixed", "randomize", "increment", "decrement")
            if slots[name]["link"] is not None:
                inputs[name] = sources[slots[name]["link"]]
        assert next(values, None) is None
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": node["title"]}}
    return prompt


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_are_the_same_workflow(name):
    assert as_api(load(f"{name}.json")) == load("api", f"{name}.json")


@pytest.mark.parametrize("name", NAMES)
def test_the_api_form_is_valid(name):
    workflow = Workflow.load(FOLDER / "api" / f"{name}.json")
    for node_id in workflow.nodes:
        tiny = getattr(CLASSES[workflow.nodes[node_id].class_type], "tiny", None)
        if tiny:
            workflow = workflow.with_inputs(node_id, tiny({}))
    validate(workflow, schemas_of(CLASSES))


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_to_a_playable_video(name, tmp_path):
    """Twice, into the same folder: the second run takes the next number."""
    command = [sys.executable, "-m", "headless", "run", f"workflows/api/{name}.json", "--tiny", "--out", str(tmp_path)]
    command += ["--device", "cpu", "--quiet", "--set", "Sampler.steps=2"]
    videos = []
    for seed in (1, 2):
        done = subprocess.run(
            [*command, "--set", f"Sampler.seed={seed}"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert not done.returncode, done.stderr
        videos.append(Path(done.stdout.strip()))
    assert [v.name for v in videos] == [f"wancore_{name}_0000{i}_.mp4" for i in (1, 2)]
    info = probe_video(videos[0])
    assert (info.codec, info.fps, info.num_frames, info.width, info.height) == ("h264", 16.0, 17, 96, 64)
    assert videos[0].read_bytes() != videos[1].read_bytes()
