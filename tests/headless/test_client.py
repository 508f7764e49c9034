"""The server path against a small HTTP server that speaks ComfyUI's endpoints."""

import json
import os
import signal
import subprocess
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from tests import fork_server
from tests.programs import PATIENCE, wait_for
from wan_core.runtime import Cancelled
from wancore.headless import client
from wancore.headless.client import run_on_server
from wancore.headless.runner import NodeError
from wancore.headless.schema import ValidationError
from wancore.headless.server import RefusedError, Server, ServerUnreachableError

ROOT = Path(__file__).resolve().parents[2]
PROMPT_ID = "11111111-2222-3333-4444-555555555555"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(client, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(client, "PATIENCE_SECONDS", 0.3)


@pytest.fixture(params=["websocket", "polling"])
def transport(request, monkeypatch):
    if request.param == "polling":
        monkeypatch.setattr(client, "websocket", None)
    elif client.websocket is None:
        pytest.skip("websocket-client is not installed")
    return request.param


@pytest.fixture
def go(fake_comfy, folders, graph):
    """Runs a small workflow on the fake server: go(events=None, image="a.png")."""

    def run(on_event=lambda _: None, image="a.png"):
        workflow = graph(
            n1=("LoadImage", {"image": image}), n2=("SaveImage", {"images": ["1", 0], "filename_prefix": "x"})
        )
        return run_on_server(workflow, Server(fake_comfy.url), folders, on_event=on_event)

    Image.new("RGB", (4, 4)).save(folders.input / "a.png")
    return run


def test_success_uploads_posts_and_downloads(fake_comfy, folders, go, transport):
    fake_comfy.polls_until_done = 3
    fake_comfy.outputs = {
        "2": {
            "images": [{"filename": "x_00004_.png", "subfolder": "sub", "type": "output"}],
            "gifs": [{"filename": "clip.mp4", "subfolder": "", "type": "temp", "format": "video/h264-mp4"}],
            "audio": [{"filename": "s.flac", "subfolder": "", "type": "output"}],
            "text": ["not a file"],
        }
    }
    fake_comfy.files = {
        ("x_00004_.png", "sub", "output"): b"picture",
        ("clip.mp4", "", "temp"): b"clip",
        ("s.flac", "", "output"): b"sound",
    }
    (folders.output / "sub").mkdir(parents=True)
    (folders.output / "sub" / "x_00004_.png").write_bytes(b"mine")
    result = go()
    assert fake_comfy.uploads == {"/a.png": (folders.input / "a.png").read_bytes()}
    (path, body), *_ = fake_comfy.posted
    assert path == "prompt" and body["prompt"]["1"]["inputs"] == {"image": "server a.png"} and body["client_id"]
    names = [file.relative_to(folders.output).as_posix() for file in result.files]
    assert names == ["sub/x_00005_.png", "temp/clip.mp4", "s.flac"]
    assert [file.read_bytes() for file in result.files] == [b"picture", b"clip", b"sound"]
    assert (folders.output / "sub" / "x_00004_.png").read_bytes() == b"mine"


def test_socket_messages_become_events(fake_comfy, go):
    if client.websocket is None:
        pytest.skip("websocket-client is not installed")
    fake_comfy.polls_until_done = 3
    mine = {"prompt_id": PROMPT_ID}
    fake_comfy.socket_messages = [
        {"type": "status", "data": {"status": {}}},
        {"type": "execution_cached", "data": {"nodes": ["1"], **mine}},
        {"type": "executing", "data": {"node": "1", "prompt_id": "somebody else's"}},
        {"type": "executing", "data": {"node": "2", "display_node": "2", **mine}},
        {"type": "progress", "data": {"node": "2", "value": 3, "max": 8, **mine}},
        {"type": "execution_success", "data": mine},
    ]
    events = []
    go(events.append)
    seen = [(event.kind, event.node and event.node.id, event.done, event.total) for event in events[1:7]]
    assert seen[:3] == [("cached", "1", 0, 0), ("start", "2", 2, 2), ("progress", "2", 3, 8)]


def test_a_dropped_socket_is_opened_again(fake_comfy, go):
    """The server closes each connection after its messages; every one of them brings them again."""
    if client.websocket is None:
        pytest.skip("websocket-client is not installed")
    fake_comfy.polls_until_done = 5
    fake_comfy.socket_messages = [
        {"type": "progress", "data": {"node": "2", "value": 3, "max": 8, "prompt_id": PROMPT_ID}}
    ]
    events = []
    go(events.append)
    assert fake_comfy.sockets >= 4
    assert [event.kind for event in events].count("progress") >= 4


def test_what_a_run_said_before_anyone_listened_is_heard(fake_comfy, go):
    if client.websocket is None:
        pytest.skip("websocket-client is not installed")
    mine = {"prompt_id": PROMPT_ID}
    fake_comfy.socket_messages = [
        {"type": "execution_cached", "data": {"nodes": ["1", "2"], **mine}},
        {"type": "execution_success", "data": mine},
    ]
    events = []
    go(events.append)
    assert [event.node.id for event in events if event.kind == "cached"] == ["1", "2"]


def test_the_place_in_the_queue_is_told_when_it_changes(fake_comfy, go, transport):
    fake_comfy.polls_until_done, fake_comfy.ahead = 9, ["a", "b", "c"]
    before = []

    def watch(event):
        if event.kind == "queued":
            before.append(event.done)
            fake_comfy.ahead = fake_comfy.ahead[1:]

    go(watch)
    assert before == [3, 2, 1]


def several(fake_comfy, folders, graph, count=3):
    Image.new("RGB", (4, 4)).save(folders.input / "a.png")
    names = [f"x{number}" for number in range(count)]
    workflows = [
        graph(n1=("LoadImage", {"image": "a.png"}), n2=("SaveImage", {"images": ["1", 0], "filename_prefix": name}))
        for name in names
    ]
    return client.run_all_on_server(workflows, Server(fake_comfy.url), folders)


def prompts(fake_comfy):
    return [body["prompt"]["2"]["inputs"]["filename_prefix"] for path, body in fake_comfy.posted if path == "prompt"]


def test_several_workflows_wait_in_the_queue_together(fake_comfy, folders, graph):
    runs = several(fake_comfy, folders, graph)
    next(runs)
    assert prompts(fake_comfy) == ["x0", "x1", "x2"]
    assert len(list(runs)) == 2 and len(fake_comfy.posted) == 3


def test_a_run_that_fails_takes_those_after_it_out_of_the_queue(fake_comfy, folders, graph):
    fake_comfy.messages = [["execution_error", {"node_id": "2", "exception_type": "X", "exception_message": "no"}]]
    with pytest.raises(NodeError):
        list(several(fake_comfy, folders, graph))
    deleted = [body["delete"] for path, body in fake_comfy.posted if path == "queue"]
    assert deleted == [[f"{PROMPT_ID}-3"], [f"{PROMPT_ID}-2"]]


def test_nothing_is_queued_when_one_workflow_cannot_run(fake_comfy, folders, graph):
    Image.new("RGB", (4, 4)).save(folders.input / "a.png")
    good = graph(n1=("LoadImage", {"image": "a.png"}), n2=("SaveImage", {"images": ["1", 0], "filename_prefix": "x"}))
    bad = graph(n2=("SaveImage", {"filename_prefix": "x"}))
    with pytest.raises(ValidationError):
        list(client.run_all_on_server([good, bad], Server(fake_comfy.url), folders))
    assert not fake_comfy.posted and not fake_comfy.uploads


def test_paths_from_a_subfolder_keep_it_and_typed_paths_do_not(fake_comfy, folders, graph, tmp_path):
    (folders.input / "sub").mkdir()
    for path in (folders.input / "sub" / "b.png", tmp_path / "c.png"):
        Image.new("RGB", (4, 4)).save(path)
    typed = replace(folders, typed=frozenset([str(tmp_path / "c.png")]))
    for name in ("sub/b.png", str(tmp_path / "c.png")):
        save = ("SaveImage", {"images": ["1", 0], "filename_prefix": "x"})
        run_on_server(graph(n1=("LoadImage", {"image": name}), n2=save), Server(fake_comfy.url), typed)
    assert list(fake_comfy.uploads) == ["sub/b.png", "/c.png"]
    assert fake_comfy.posted[0][1]["prompt"]["1"]["inputs"]["image"] == "sub/server b.png"


@pytest.mark.parametrize(
    "name", ["{outside}/c.png", "../c.png", "key.pem", "~/.ssh/id_rsa", "/etc/passwd", "/dev/zero"]
)
def test_a_workflow_has_nothing_uploaded_but_media_of_the_input_folder(fake_comfy, folders, go, tmp_path, name):
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    (folders.input / "key.pem").write_text("secret")
    with pytest.raises(ValidationError, match=r"is neither in|is not a picture"):
        go(image=name.format(outside=tmp_path))
    assert not fake_comfy.uploads and not fake_comfy.posted


def test_a_file_only_the_server_has_is_left_to_it(fake_comfy, go, nodes):
    node = nodes["LoadImage"]
    fake_comfy.nodes = {**nodes, "LoadImage": type("LoadImage", (node,), {"INPUT_TYPES": classmethod(_listing_there)})}
    go(image="there.png")
    go(image="anything.png [output]")
    assert fake_comfy.uploads == {}
    with pytest.raises(ValidationError, match=r"image: 'gone.png' is neither in"):
        go(image="gone.png")


def _listing_there(cls):
    return {"required": {"image": (["there.png"], {"image_upload": True})}}


def test_the_servers_schemas_decide(fake_comfy, go):
    del fake_comfy.nodes["SaveImage"]
    with pytest.raises(ValidationError, match="node SaveImage does not exist"):
        go()
    assert fake_comfy.posted == [] and fake_comfy.uploads == {}


ERRORS = {
    "2": {"class_type": "SaveImage", "errors": [{"type": "t", "message": "Value not in list", "details": "d: 1"}]}
}


@pytest.mark.parametrize(
    ("status", "answer", "words"),
    [
        (
            400,
            {"error": {"type": "p", "message": "Outputs failed", "details": ""}, "node_errors": ERRORS},
            "#2 SaveImage: Value not in list: d: 1",
        ),
        (400, {"error": {"type": "p", "message": "Bad", "details": "why"}, "node_errors": {}}, "Bad: why"),
        (400, {"error": "Bad"}, "Bad"),
        (500, {}, "The server refused prompt: 500"),
        (200, {"prompt_id": PROMPT_ID, "node_errors": ERRORS}, "#2 SaveImage: Value not in list: d: 1"),
    ],
)
def test_refusal_is_put_in_words_and_nothing_keeps_running(fake_comfy, go, status, answer, words):
    fake_comfy.prompt_answer = (status, answer)
    with pytest.raises(ValidationError) as refused:
        go()
    assert words in str(refused.value)
    stops = [("queue", {"delete": [PROMPT_ID]}), ("interrupt", {"prompt_id": PROMPT_ID})] if status == 200 else []
    assert fake_comfy.posted[1:] == stops


def test_what_a_node_says_of_all_its_inputs_is_told_once(fake_comfy, go):
    said = [
        {"type": "custom_validation_failed", "message": "Failed", "details": f"{name} - {text}"}
        for text in ("no file - none", "too small")
        for name in ("a", "b", "c")
    ]
    fake_comfy.prompt_answer = (400, {"error": {}, "node_errors": {"2": {"class_type": "SaveImage", "errors": said}}})
    with pytest.raises(ValidationError) as refused:
        go()
    assert [str(refused.value).count(text) for text in ("no file - none", "too small")] == [1, 1]


@pytest.mark.parametrize(
    ("message", "error", "words"),
    [
        (
            [
                "execution_error",
                {
                    "node_id": "2",
                    "node_type": "SaveImage",
                    "exception_type": "a.b.DiskError",
                    "exception_message": "full\n\n",
                },
            ],
            NodeError,
            "Node #2 SaveImage failed: DiskError: full$",
        ),
        (["execution_interrupted", {"node_id": "2"}], Cancelled, "interrupted on the server"),
    ],
)
def test_failure_is_read_from_the_history(fake_comfy, go, transport, message, error, words):
    fake_comfy.messages = [["execution_start", {}], message]
    with pytest.raises(error, match=words):
        go()


def test_a_run_that_the_server_forgot_is_over(fake_comfy, go, transport):
    fake_comfy.known = False
    with pytest.raises(RuntimeError, match="no longer knows this run"):
        go()


def test_a_short_outage_is_survived(fake_comfy, go, transport):
    fake_comfy.polls_until_done, fake_comfy.drop_polls = 5, range(2, 4)
    assert go().files == ()


def test_a_long_outage_is_not(fake_comfy, go, transport):
    fake_comfy.polls_until_done, fake_comfy.drop_polls = 500, range(2, 500)
    with pytest.raises(ServerUnreachableError):
        go()


@pytest.mark.parametrize(("filename", "subfolder"), [("x.png", "../.."), ("../../x.png", ""), ("..", "")])
def test_the_server_cannot_write_outside_of_the_output_folder(fake_comfy, go, folders, filename, subfolder):
    fake_comfy.outputs = {"2": {"images": [{"filename": filename, "subfolder": subfolder, "type": "output"}]}}
    with pytest.raises(ValueError, match=r"leads out of|names no file"):
        go()
    assert not folders.output.exists()


def test_an_upload_too_large_says_what_to_do(fake_comfy, go):
    fake_comfy.upload_status = 413
    with pytest.raises(RefusedError, match="--max-upload-size"):
        go()


def test_something_else_on_that_port_is_not_a_server(fake_comfy):
    fake_comfy.info = lambda name: ["not", "comfy"]
    from wancore.headless.workflow import Workflow

    with pytest.raises(ServerUnreachableError, match="not as a ComfyUI server"):
        Server(fake_comfy.url).schemas(Workflow.from_api({"1": {"class_type": "A"}}))


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [(200, ServerUnreachableError, "not as a ComfyUI server"), (400, RefusedError, "400")],
)
def test_an_answer_that_is_nested_too_deeply_is_refused(status, error, said):
    class Deep(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"[" * 200_000)

        def log_message(self, *_):
            """Keeps the test's output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Deep) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(error, match=said):
            Server(f"http://127.0.0.1:{server.server_port}").history("x")
        server.shutdown()


@pytest.mark.parametrize("url", ["localhost:8188", "ftp://x", "http://", ""])
def test_an_address_must_be_one(url):
    with pytest.raises(ValueError, match="write it as http"):
        Server(url)


def start(fake_comfy, folders, tmp_path, *arguments):
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
        "2": {
            "class_type": "SaveImage",
            "inputs": {"images": ["1", 0], "filename_prefix": "x"},
            "_meta": {"title": "Save"},
        },
    }
    Image.new("RGB", (4, 4)).save(folders.input / "a.png")
    (tmp_path / "w.json").write_text(json.dumps(prompt))
    places = ["--input", str(folders.input), "--out", str(folders.output), "--server", fake_comfy.url]
    command = [fork_server.python(), "-m", "headless", "run", str(tmp_path / "w.json"), *places, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_command_line(fake_comfy, folders, tmp_path):
    fake_comfy.outputs = {"2": {"images": [{"filename": "y_00001_.png", "subfolder": "", "type": "output"}]}}
    fake_comfy.files = {("y_00001_.png", "", "output"): b"picture"}
    process = start(fake_comfy, folders, tmp_path, "--set", "Save.filename_prefix=y")
    out, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out.splitlines()) == (0, [str(folders.output / "y_00001_.png")])
    assert fake_comfy.posted[0][1]["prompt"]["2"]["inputs"]["filename_prefix"] == "y"


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_stops_the_run_on_the_server(fake_comfy, folders, tmp_path):
    fake_comfy.polls_until_done = 10**6
    process = start(fake_comfy, folders, tmp_path)
    wait_for(lambda: fake_comfy.polls >= 2, process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (130, "")
    assert fake_comfy.posted[1:] == [("queue", {"delete": [PROMPT_ID]}), ("interrupt", {"prompt_id": PROMPT_ID})]
