"""The server path, and the rules that this process shares with the host, against a real ComfyUI."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.programs import PATIENCE, wait_for
from wan_core.runtime import Cancelled
from wancore.headless.client import run_on_server
from wancore.headless.core_nodes import core_nodes
from wancore.headless.overrides import apply_tiny
from wancore.headless.runner import NodeError, run
from wancore.headless.schema import NodeSchema, ValidationError
from wancore.headless.server import Server
from wancore.headless.workflow import Workflow
from wancore.nodes import NODE_CLASS_MAPPINGS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.comfyui


@pytest.fixture
def server(comfy_server) -> Server:
    return Server(comfy_server.url)


def both(workflow, nodes, server, folders):
    """What the output nodes report here and on the server."""
    return run(workflow, nodes, folders=folders).ui, run_on_server(workflow, server, folders).ui


def test_bad_workflows_are_refused_in_the_same_words(bad_case, bad_workflows, server):
    case = bad_workflows[bad_case]
    if case.get("host") == "differs":
        pytest.skip("stricter here, on purpose")
    request = urllib.request.Request(f"{server.url}/prompt", json.dumps({"prompt": case["prompt"]}).encode())
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    answer = json.load(refused.value)
    found = {
        (node_id, error["type"], error["message"], error["details"])
        for node_id, entry in answer["node_errors"].items()
        for error in entry["errors"]
        # The host repeats a class's own error for every parameter of its check.
        if not error["details"].startswith("input_types - ")
    } or {(None, *(answer["error"][key] for key in ("type", "message", "details")))}
    expected = {tuple(error) for error in case["errors"]}
    if case.get("host"):
        # The host's details are the bare Python error, and its type says `inner` when another node asked.
        trimmed = {(kind.replace("inner_", ""), text.replace("inner ", "")) for _, kind, text, _ in found}
        assert trimmed == {error[1:3] for error in expected}
    elif next(iter(expected))[1] == "invalid_prompt":
        assert {error[1:] for error in found} == {error[1:] for error in expected}
    else:
        assert found == expected


def test_graphs_give_the_same_here_and_there(graph, nodes, server, folders):
    workflow = graph(
        n1=("CountTo", {"n": 3}),
        n2=("Number", {"value": "5", "scale": 2, "other": ["1", 0]}),
        n3=("Switch", {"condition": False, "on_true": ["1", 0], "on_false": ["2", 0]}),
        n4=("Total", {"values": ["3", 0], "times": 2}),
        n7=("Show", {"value": ["2", 0]}),
        n8=("Show", {"value": ["3", 0]}),
        n9=("Show", {"value": ["4", 0]}),
    )
    here, there = both(workflow, nodes, server, folders)
    assert here == there and here["9"]["values"] == [72]


def test_core_nodes_declare_what_the_stand_ins_declare(nodes, server):
    core = [name for name in nodes if not name.startswith("HeadlessTest")]
    workflow = Workflow.from_api({str(n): {"class_type": name} for n, name in enumerate(core)})
    there = server.schemas(workflow)
    for name in core:
        here = NodeSchema.of_class(name, nodes[name])
        assert (here.outputs, here.is_output) == (there[name].outputs, there[name].is_output), name
        assert list(here.inputs) == list(there[name].inputs), name
        for mine, theirs in zip(here.inputs.values(), there[name].inputs.values(), strict=True):
            assert (mine.type, mine.required, mine.takes_file) == (theirs.type, theirs.required, theirs.takes_file)
            keys = ("default", "min", "max", "step")
            assert [mine.options.get(key) for key in keys] == [theirs.options.get(key) for key in keys]
            assert mine.takes_file or mine.choices == theirs.choices


def test_images_go_up_and_come_down(graph, server, comfy_server, folders):
    image = Image.linear_gradient("L").convert("RGB")
    image.save(folders.input / "ramp.png")
    workflow = graph(
        n1=("LoadImage", {"image": "ramp.png"}),
        n2=("SaveImage", {"images": ["1", 0], "filename_prefix": "up/down"}),
        n3=("PreviewImage", {"images": ["1", 0]}),
    )
    first = run_on_server(workflow, server, folders).files
    again = run_on_server(workflow, server, folders).files
    assert (comfy_server.base / "input" / "ramp.png").exists()
    assert {path.relative_to(folders.output).parts[0]: path for path in first}.keys() == {"up", "temp"}
    assert len({*first, *again}) == 4
    with Image.open(folders.output / "up" / "down_00001_.png") as saved:
        assert saved.tobytes() == image.tobytes()
        assert json.loads(saved.text["prompt"])["2"]["inputs"]["filename_prefix"] == "up/down"


def test_a_changed_file_of_the_same_name_is_the_one_that_is_used(graph, server, folders):
    workflow = graph(
        n1=("LoadImage", {"image": "same.png"}), n2=("SaveImage", {"images": ["1", 0], "filename_prefix": "same"})
    )
    for level in (10, 200):
        Image.new("RGB", (4, 4), (level,) * 3).save(folders.input / "same.png")
        (path,) = run_on_server(workflow, server, folders).files
        with Image.open(path) as saved:
            assert saved.getpixel((0, 0)) == (level,) * 3


def test_videos_are_made_sent_and_read_alike(graph, nodes, server, folders):
    rest = {"format": "auto", "codec": "auto"}
    make = graph(
        n1=("Plain", {"width": 48, "height": 32, "frames": 5, "level": 0.25}),
        n2=("CreateVideo", {"images": ["1", 0], "fps": 16}),
        n3=("SaveVideo", {"video": ["2", 0], "filename_prefix": "video/Wan", **rest}),
    )
    (theirs,) = run_on_server(make, server, folders).files
    (mine,) = run(make, nodes, folders=folders).files
    assert [path.name for path in (theirs, mine)] == ["Wan_00001_.mp4", "Wan_00002_.mp4"]

    def facts(path):
        with av.open(str(path)) as container:
            context = container.streams.video[0].codec_context
            prompt = json.loads(container.metadata["prompt"])
            size = (context.width, context.height, context.pix_fmt, context.codec.name)
            return size, container.streams.video[0].average_rate, container.streams.video[0].frames, prompt

    assert facts(theirs) == facts(mine)
    for path in (theirs, mine):
        path.rename(folders.input / path.name)
        read = graph(
            n1=("LoadVideo", {"file": path.name}),
            n2=("GetVideoComponents", {"video": ["1", 0]}),
            n3=("PassImage", {"image": ["2", 0]}),
            n8=("Show", {"value": ["3", 1]}),
            n9=("Show", {"value": ["2", 2]}),
        )
        here, there = both(read, nodes, server, folders)
        assert here == there and (here["8"]["values"], here["9"]["values"]) == ([5], [16.0])


def test_a_failing_node_is_named(graph, server, folders):
    with pytest.raises(NodeError, match="#1 HeadlessTestFail failed: KeyError: 'no luck'"):
        run_on_server(graph(n1=("Fail", {"reason": "no luck"}), n9=("Show", {"value": ["1", 0]})), server, folders)


def test_what_only_the_server_can_check_refuses_the_whole_run(graph, server, folders):
    workflow = graph(
        n1=("Checked", {"value": 11}),
        n2=("Slow", {"steps": 10000}),
        n8=("Show", {"value": ["1", 0]}),
        n9=("Show", {"value": ["2", 0]}),
    )
    with pytest.raises(ValidationError, match="#1 HeadlessTestChecked: Custom validation failed for node: value - "):
        run_on_server(workflow, server, folders)
    _until_idle(server)


def _until_idle(server):
    wait_for(lambda: not any(server.queue().values()))


def test_progress_arrives(graph, server, folders):
    pytest.importorskip("websocket")
    events = []
    workflow = graph(n1=("Slow", {"steps": 6}), n9=("Show", {"value": ["1", 0]}))
    run_on_server(workflow, server, folders, on_event=events.append)
    steps = [(event.node.id, event.done, event.total) for event in events if event.kind == "progress"]
    assert steps[-1] == ("1", 6, 6) and len(steps) > 2
    assert [event.node.id for event in events if event.kind == "start"] == ["1", "9"]


def test_an_interruption_on_the_server_ends_the_run(graph, server, folders):
    def interrupt():
        wait_for(lambda: server.queue()["running"])
        time.sleep(0.3)
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/interrupt", b"{}")).close()

    threading.Thread(target=interrupt, daemon=True).start()
    workflow = graph(n1=("Slow", {"steps": 5000}), n9=("Show", {"value": ["1", 0]}))
    with pytest.raises(Cancelled, match="interrupted on the server"):
        run_on_server(workflow, server, folders)


def test_ctrl_c_stops_the_run_there_and_a_waiting_run_is_left_alone(graph, server, folders, tmp_path):
    slow = graph(n1=("Slow", {"steps": 5001}), n9=("Show", {"value": ["1", 0]}))
    (tmp_path / "slow.json").write_text(json.dumps(slow.to_api()))
    command = [sys.executable, "-m", "headless", "run", str(tmp_path / "slow.json"), "--server", server.url]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: server.queue()["running"], process)
    quick = graph(n1=("Slow", {"steps": 3}), n9=("Show", {"value": ["1", 0]}))
    waiting = server.submit(quick.to_api(), "another client")["prompt_id"]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and re.search("Interrupted", err)
    _until_idle(server)
    assert server.history(waiting)["status"]["status_str"] == "success"


def test_the_pack_is_loaded(comfy_server):
    log = comfy_server.log.read_text()
    assert "headless_test_pack" in log
    assert not re.search(r"IMPORT FAILED.*(wancore|headless_test_pack)", log)


def test_the_shipped_workflow_gives_the_same_frames_here_and_there(server, folders):
    """Text to video on the bundled tiny model in float32, in this process and by the pack inside ComfyUI."""
    classes = {**core_nodes(folders), **NODE_CLASS_MAPPINGS}
    prompt = apply_tiny(Workflow.load(ROOT / "workflows" / "api" / "t2v.json"), classes).to_api()
    (decode,) = (node_id for node_id, node in prompt.items() if node["class_type"] == "WanCoreVAEDecode")
    for node_id, node in list(prompt.items()):
        # The two environments may differ in what they have installed: no optional text repair, no rounding to 16 bits.
        plain = {"dtype": "fp32", "negative_prompt": "blurry"}
        node["inputs"] |= {name: value for name, value in plain.items() if name in node["inputs"]}
        if node["class_type"] in ("CreateVideo", "SaveVideo"):
            del prompt[node_id]
    prompt["save"] = {"class_type": "SaveImage", "inputs": {"images": [decode, 0], "filename_prefix": "frame"}}
    workflow = Workflow.from_api(prompt)
    mine = run(workflow, classes, folders=folders).files
    theirs = run_on_server(workflow, server, folders).files
    assert len(mine) == len(theirs) > 1
    for here, there in zip(mine, theirs, strict=True):
        with Image.open(here) as one, Image.open(there) as other:
            levels = np.abs(np.asarray(one).astype(int) - np.asarray(other))
        assert levels.max() <= 1
