"""`python -m headless run` as a process: paths on stdout, progress on stderr, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

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


def command(place: Path, *arguments: str) -> list[str]:
    folders = ["--input", str(place / "in"), "--out", str(place / "out")]
    return [sys.executable, "-m", "headless", "run", str(place / "copy.json"), *folders, *arguments]


def headless(place: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(place, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_run_prints_paths_and_progress(place):
    done = headless(place, "--set", "Picture.image=a.png", "--set", "2.filename_prefix=sub/red", "--device", "cpu")
    assert (done.returncode, done.stdout.splitlines()) == (0, [str(place / "out" / "sub" / "red_00001_.png")])
    assert done.stderr.splitlines() == ["[1/2] #1 LoadImage 'Picture'", "[2/2] #2 SaveImage"]
    with Image.open(done.stdout.strip()) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_quiet_prints_only_paths(place):
    done = headless(place, "--quiet")
    assert (done.returncode, done.stderr) == (0, "") and len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--set", "Picture.image=broken.png"], 1, "Node #1 LoadImage 'Picture' failed: UnidentifiedImageError"),
        (["--set", "Picture.image=none.png"], 2, "image - Invalid image file: none.png"),
        (["--set", "Pictur.image=a.png"], 2, "no node has the title or id 'Pictur'. Titles: Picture, SaveImage"),
        (["--tiny"], 2, "no node of this workflow has a tiny form"),
        (["--device", "tpu"], 2, "invalid choice: 'tpu'"),
        (["--server", "localhost:8188"], 2, "write it as http://127.0.0.1:8188"),
        (["--server", "http://127.0.0.1:9"], 3, "No ComfyUI server answers at http://127.0.0.1:9: "),
        (["--server", "http://127.0.0.1:9", "--device", "cpu"], 2, "--device holds for runs in this process"),
    ],
)
def test_exit_codes(place, arguments, code, words):
    done = headless(place, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not (place / "out").exists()


def test_the_editors_format_is_named(place):
    (place / "copy.json").write_text('{"nodes": [], "links": []}')
    done = headless(place)
    assert done.returncode == 2 and "editor's format" in done.stderr


def test_no_command_is_bad_usage():
    done = subprocess.run([sys.executable, "-m", "headless"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "required: COMMAND" in done.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_ctrl_c_exits_with_130(place):
    # A pipe that nobody writes to: the load node waits for it for ever.
    os.mkfifo(place / "in" / "pipe.png")
    arguments = command(place, "--set", "Picture.image=pipe.png")
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    writer = _open_once_read(place / "in" / "pipe.png")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    os.close(writer)
    assert (process.returncode, out) == (130, "") and err.splitlines()[-1] == "Interrupted."


def _open_once_read(pipe: Path) -> int:
    """Open a pipe for writing as soon as another process has it open for reading."""
    for _ in range(1200):
        with suppress(OSError):
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.05)
    raise TimeoutError(f"nobody reads {pipe}")
