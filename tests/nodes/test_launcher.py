"""Processes that the training nodes start: good ones, and those that hang, die, or write what is no text."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.programs import wait_for
from tests.trainer.runs import ROOT
from wancore.nodes import launcher
from wancore.nodes.launcher import ChildError, Launch, pack_command, supervise

SPEAK = """
import json, sys, time
def tell(**event):
    with open("events.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\\n")
"""


def child(folder, code, **environment) -> Launch:
    return Launch([sys.executable, "-c", SPEAK + code], folder, environment)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "with space 训练"


class Stop(Exception):
    pass


def stopping(when):
    """A check that raises once `when()` holds."""

    def check():
        if when():
            raise Stop

    return check


def never():
    pass


def gone(pid) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with Path(f"/proc/{pid}/stat").open() as file:
        return file.read().split(")")[1].split()[0] == "Z"


WAIT = "import pathlib\nwhile not pathlib.Path('go').exists(): time.sleep(0.05)\n"


def test_events_are_passed_on_while_it_works(folder):
    seen = []
    code = f"tell(event='step', step=1)\nprint('说话')\n{WAIT}tell(event='end')"

    def see(event):
        seen.append(event["event"])
        (folder / "go").touch()

    told = supervise(child(folder, code), see, never)
    assert [event["event"] for event in told] == seen == ["step", "end"]
    assert "说话" in (folder / "log.txt").read_text(encoding="utf-8")


def test_only_new_events_are_passed_on_and_half_lines_wait(folder):
    folder.mkdir()
    (folder / "events.jsonl").write_text('{"event": "old"}\n', encoding="utf-8")
    code = """
file = open("events.jsonl", "ab", buffering=0)
file.write('{"event": "st'.encode()); time.sleep(0.6); file.write('ep", "name": "模型"}\\nno json\\n[1]\\n'.encode())
file.write(b'\\xff\\xfe\\n{"event": "e\\xffnd"}\\n{"event": "cut')
"""
    told = supervise(child(folder, code), lambda event: None, never)
    assert [event["event"] for event in told] == ["step", "e\ufffdnd"]
    assert told[0]["name"] == "模型"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("tell(event='error', message='The disk is full.'); sys.exit(1)", "The disk is full."),
        ("sys.stderr.buffer.write(b'caf\\xe9 \\xff'); sys.exit(2)", "caf\ufffd \ufffd"),
        ("raise RuntimeError('what happened')", "RuntimeError: what happened"),
        ("import os; os.kill(os.getpid(), 9)", "It wrote no message."),
        ("print('x\\n' * 100 + 'last'); sys.exit(1)", "last"),
    ],
    ids=["event", "no text", "traceback", "killed", "long"],
)
def test_what_goes_wrong_is_told_with_the_place_of_the_log(folder, code, message):
    folder.mkdir()
    (folder / "log.txt").write_text("an earlier run\n", encoding="utf-8")
    with pytest.raises(ChildError) as error:
        supervise(child(folder, code), lambda event: None, never)
    assert message in str(error.value) and str(folder / "log.txt") in str(error.value)
    assert "an earlier run" not in str(error.value)
    assert len(str(error.value).splitlines()) <= launcher.TAIL + 2
    assert "an earlier run" in (folder / "log.txt").read_text(encoding="utf-8", errors="replace")


@pytest.mark.parametrize("name", ["log.txt", "events.jsonl"])
@pytest.mark.parametrize("make", [Path.mkdir, *([os.mkfifo] if hasattr(os, "mkfifo") else [])])
def test_what_is_no_file_is_refused_before_it_is_opened(folder, name, make):
    """Opening a named pipe without a reader waits without end."""
    folder.mkdir()
    make(folder / name)
    with pytest.raises(ValueError, match=rf"{name} must be a file"):
        supervise(child(folder, "open('started', 'w')"), lambda event: None, never)
    assert not (folder / "started").exists()


def test_cancelling_lets_it_finish_its_step(folder):
    code = """
import pathlib
while not pathlib.Path("stop").exists(): time.sleep(0.05)
time.sleep(0.5)
pathlib.Path("saved").touch()
"""
    seen = []
    with pytest.raises(Stop):
        supervise(
            child(folder, code), lambda e: seen.append(e["event"]), stopping(lambda: (folder / "log.txt").exists())
        )
    assert (folder / "saved").exists() and "stopping" in seen


STUBBORN = """
import os, signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
tell(event="step", pids=[os.getpid(), helper.pid])
time.sleep(3600)
"""


def test_one_that_hangs_is_ended_with_all_that_it_started(folder, monkeypatch):
    monkeypatch.setattr(launcher, "GRACE", 0.5)
    pids = []
    with pytest.raises(Stop):
        supervise(
            child(folder, STUBBORN), lambda e: pids.extend(e.get("pids", ())), stopping(lambda: pids), patience=0.5
        )
    assert len(pids) == 2
    wait_for(lambda: all(map(gone, pids)))


def test_a_stop_that_nobody_obeyed_does_not_stop_the_next_run(folder):
    folder.mkdir()
    (folder / "stop").touch()
    code = "import pathlib; tell(event='end', stopped=pathlib.Path('stop').exists())"
    assert [event["stopped"] for event in supervise(child(folder, code), lambda event: None, never)] == [False]


def test_two_never_work_in_one_folder(folder):
    """The second waits for the first, also when whoever started the first is gone."""
    code = f"tell(event='begin')\n{WAIT}tell(event='done')"
    first = threading.Thread(target=supervise, args=(child(folder, code), lambda event: None, never))
    first.start()
    wait_for((folder / "events.jsonl").exists)
    seen = []

    def see(event):
        seen.append(event["event"])
        (folder / "go").touch()

    supervise(child(folder, code), see, never)
    first.join()
    assert seen[0] == "waiting" and seen[-2:] == ["begin", "done"]
    told = (folder / "events.jsonl").read_text().splitlines()
    assert [line.split('"')[3] for line in told] == ["begin", "done", "begin", "done"]


def test_the_environment_is_one_for_training(folder, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    code = "import os; tell(event='e', a=os.environ['PYTORCH_CUDA_ALLOC_CONF'], b=os.environ['X'])"
    (told,) = supervise(child(folder, code, X="模 型"), lambda event: None, never)
    assert (told["a"], told["b"]) == ("expandable_segments:True", "模 型")


def test_the_pack_runs_by_a_python_that_knows_no_current_folder(folder):
    """ComfyUI's portable Python leaves the current folder out of its path; -I does the same."""
    folder.mkdir()
    words = pack_command(ROOT, "trainer.check", ["--dataset_base_path", str(folder)])
    done = subprocess.run([words[0], "-I", *words[1:]], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "holds no samples" in done.stderr


def test_several_processes_are_launched_by_accelerate():
    words = pack_command(ROOT, "trainer.supervised", ["--config", "a b.json"], processes=3)
    assert (
        words[1:4] == [str(ROOT / "pack.py"), "-m", "accelerate.commands.launch"]
        and words[words.index("--num_processes") + 1] == "3"
    )
    assert words[-4:] == [str(ROOT / "pack.py"), "trainer.supervised", "--config", "a b.json"]


def test_signals_do_not_reach_the_child(folder):
    """Ctrl-C in the terminal of ComfyUI is ComfyUI's; the child is in a group of its own."""
    seen = []
    code = "import os; tell(event='group', own=os.getpgid(0)); time.sleep(0.3)"
    supervise(child(folder, code), seen.append, never)
    assert seen[0]["own"] != os.getpgid(0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
