"""`python -m headless run` as a process: paths on stdout, progress on stderr, exit codes."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests import fork_server
from tests.programs import PATIENCE
from wancore.headless import cli
from wancore.headless.cli import main
from wancore.headless.overrides import apply_to_samplers
from wancore.headless.workflow import Workflow
from wancore.nodes import NODE_CLASS_MAPPINGS, host

ROOT = Path(__file__).resolve().parents[2]

COPY = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}, "_meta": {"title": "Picture"}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "copy"}},
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG but not for long")
    (tmp_path / "copy.json").write_text(json.dumps(COPY))
    return tmp_path


def command(place: Path, *arguments: str, files: tuple[str, ...] = ("copy.json",)) -> list[str]:
    folders = ["--input", str(place / "in"), "--out", str(place / "out")]
    paths = [str(place / file) for file in files]
    return [fork_server.python(), "-m", "headless", "run", *paths, *folders, *arguments]


def headless(place: Path, *arguments: str, **files: tuple[str, ...]) -> subprocess.CompletedProcess:
    words = command(place, *arguments, **files)
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)


def test_run_prints_paths_and_progress(place):
    done = headless(place, "--set", "Picture.image=a.png", "--set", "2.filename_prefix=sub/red", "--device", "cpu")
    assert (done.returncode, done.stdout.splitlines()) == (0, [str(place / "out" / "sub" / "red_00001_.png")])
    assert done.stderr.splitlines() == ["[1/2] #1 LoadImage 'Picture'", "[2/2] #2 SaveImage"]
    with Image.open(done.stdout.strip()) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_several_workflows_run_one_after_the_other(place):
    other = {**COPY, "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "other"}}}
    (place / "other.json").write_text(json.dumps(other))
    done = headless(place, "--set", "Picture.image=a.png", "--quiet", files=("copy.json", "other.json"))
    names = [Path(line).name for line in done.stdout.splitlines()]
    assert (done.returncode, names) == (0, ["copy_00001_.png", "other_00001_.png"])


def test_no_workflow_runs_when_one_of_them_cannot(place):
    (place / "other.json").write_text(json.dumps({"1": {"class_type": "NoSuchNode", "inputs": {}}}))
    done = headless(place, files=("copy.json", "other.json"))
    assert done.returncode == 2 and "NoSuchNode" in done.stderr
    assert not done.stdout and not (place / "out").exists()


def test_a_failed_node_is_one_line_and_exit_code_1(place):
    done = headless(place, "--set", "Picture.image=broken.png")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()[1:]
    assert line.startswith(f"Node #1 LoadImage 'Picture' failed: {place / 'in' / 'broken.png'} is not a picture ")


def test_quiet_prints_only_paths(place):
    done = headless(place, "--quiet")
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--set", "Picture.image=none.png"], 2, "image - Invalid image file: none.png"),
        (["--set", f"Picture.image={'n' * 300}.png"], 2, "image - Invalid image file: nnn"),
        (["--set", "Pictur.image=a.png"], 2, "no node has the title or id 'Pictur'. Titles: Picture, SaveImage"),
        (["--tiny"], 2, "no node of this workflow has a tiny form"),
        (["--device", "tpu"], 2, "invalid choice: 'tpu'"),
        (["--server", "localhost:8188"], 2, "write it as http://127.0.0.1:8188"),
        (["--server", "http://127.0.0.1:9"], 3, "No ComfyUI server answers at http://127.0.0.1:9: "),
        (["--server", "http://127.0.0.1:9", "--device", "cpu"], 2, "--device holds for runs in this process"),
    ],
)
def test_exit_codes(place, capsys, arguments, code, words):
    assert exit_code(place, *arguments) == code
    out, err = capsys.readouterr()
    assert words in err and out == ""
    assert not (place / "out").exists()


def exit_code(place: Path, *arguments: str) -> int:
    try:
        return main(command(place, *arguments)[3:])
    except SystemExit as stopped:
        return stopped.code


def test_the_editors_format_is_named(place, capsys):
    (place / "copy.json").write_text('{"nodes": [], "links": []}')
    assert exit_code(place) == 2
    assert "editor's format" in capsys.readouterr().err


def test_no_command_is_bad_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2 and "required: COMMAND" in capsys.readouterr().err


def test_a_nodes_defect_shows_where_it_arose(place, capsys, monkeypatch, pack):
    monkeypatch.setattr(cli, "NODE_CLASS_MAPPINGS", pack.NODE_CLASS_MAPPINGS)
    fail = {"class_type": "HeadlessTestFail", "inputs": {"reason": "no luck"}}
    show = {"class_type": "HeadlessTestShow", "inputs": {"value": ["1", 0]}}
    (place / "copy.json").write_text(json.dumps({"1": fail, "2": show}))
    assert exit_code(place) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "    raise KeyError(reason)" in lines
    assert lines[-1] == "Node #1 HeadlessTestFail failed: KeyError: 'no luck'"


def test_tiny_and_set_reach_the_nodes_with_set_on_top(place, capsys, monkeypatch, pack):
    monkeypatch.setattr(cli, "NODE_CLASS_MAPPINGS", pack.NODE_CLASS_MAPPINGS)
    plain = {"width": 64, "height": 64, "frames": 1, "level": 0.5}
    prompt = COPY | {"1": {"class_type": "HeadlessTestPlain", "inputs": plain, "_meta": {"title": "Picture"}}}
    (place / "copy.json").write_text(json.dumps(prompt))
    assert exit_code(place, "--tiny", "--set", "Picture.height=24", "--quiet") == 0
    with Image.open(capsys.readouterr().out.strip()) as image:
        assert image.size == (16, 24)


def test_recommended_settings_reach_every_sampler_and_nothing_else(place, capsys):
    workflow = Workflow.load(ROOT / "workflows" / "api" / "t2v.json")
    changed = apply_to_samplers(workflow, {"recommended": "auto", "more_motion": True}, NODE_CLASS_MAPPINGS)
    differing = [id for id, node in changed.nodes.items() if node != workflow.nodes[id]]
    assert [changed.nodes[id].class_type for id in differing] == ["WanCoreSampler"]
    assert changed.nodes[differing[0]].inputs["recommended"] == "auto"
    assert exit_code(place, "--recommended", "auto") == 2
    assert "no sampler that takes recommended settings" in capsys.readouterr().err


def test_a_node_may_report_progress(place, capsys, monkeypatch, pack):
    class Reporting(pack.NODE_CLASS_MAPPINGS["HeadlessTestPlain"]):
        def run(self, **inputs):
            runtime = host.current.runtime(torch.float32)
            assert runtime.device == torch.device("cpu")
            for step in range(1, 1001):
                runtime.on_progress("sampling", step, 1000, None)
            return super().run(**inputs)

    monkeypatch.setattr(cli, "NODE_CLASS_MAPPINGS", {"Reporting": Reporting})
    plain = {"width": 8, "height": 8, "frames": 1, "level": 0.5}
    (place / "copy.json").write_text(json.dumps(COPY | {"1": {"class_type": "Reporting", "inputs": plain}}))
    assert exit_code(place, "--device", "cpu") == 0
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == "[1/2] #1 Reporting" and lines[-2:] == ["sampling 1000/1000", "[2/2] #2 SaveImage"]
    assert len(lines) < 20


def test_ctrl_c_exits_with_130(place):
    workflow = str(ROOT / "workflows" / "api" / "t2v.json")
    words = command(place, "--tiny", "--set", "Sampler.steps=1000", files=(workflow,))
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    next(line for line in process.stderr if "sampling 1/" in line.lower() or "step 1/" in line.lower())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (130, "") and err.splitlines()[-1] == "Interrupted."


def test_a_pipe_in_the_input_folder_is_no_picture(place, capsys):
    """Who waits for it waits for ever."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs named pipes")
    os.mkfifo(place / "in" / "pipe.png")
    assert exit_code(place, "--set", "Picture.image=pipe.png") == 2
    assert "Invalid image file: pipe.png" in capsys.readouterr().err
