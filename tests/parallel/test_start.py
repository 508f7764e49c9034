"""A command on several ranks, started by `--gpus` and by torchrun, writes the film of one process."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests import fork_server
from tests.programs import PATIENCE
from wancore.headless.cli import main

SMALL = ["t2v", "--tiny", "--device", "cpu", "--set", "Sampler.steps=2", "--set", "Sampler.num_frames=5", "--quiet"]


def films(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob("*.mp4"))]


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("alone")
    assert fork_server.run(["-m", "headless", "run", *SMALL, "--out", folder]).returncode == 0
    return films(folder)


def test_gpus(tmp_path, expected):
    done = fork_server.run(["-m", "headless", "run", *SMALL, "--out", tmp_path, "--gpus", 2], timeout=PATIENCE)
    assert (done.returncode, done.stdout.splitlines()) == (0, [str(path) for path in tmp_path.rglob("*.mp4")]), done
    assert films(tmp_path) == expected


def test_torchrun(tmp_path, expected):
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    done = fork_server.run([*ranks, "-m", "headless", "run", *SMALL, "--out", tmp_path], timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert films(tmp_path) == expected


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="finds the processes by pgrep")
def test_a_killed_rank_ends_the_command_with_a_sentence(tmp_path):
    many = ["t2v", "--tiny", "--device", "cpu", "--set", "Sampler.steps=1000", "--out", tmp_path, "--gpus", 2]
    process = fork_server.start(["-m", "headless", "run", *many], stderr=subprocess.STDOUT, stdout=subprocess.PIPE)
    while "2/1000" not in process.stdout.readline():
        assert process.poll() is None
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    assert len(children.stdout.split()) == 2
    os.kill(int(children.stdout.split()[1]), signal.SIGKILL)
    text, _ = process.communicate(PATIENCE)
    assert process.returncode != 0
    assert "Rank 1 (cpu) was ended by SIGKILL. All ranks have ended; run the command again." in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0", "--device", "cpu"], "--gpus must be 1 or more; got 0"),
        (["--gpus", "2", "--server", "http://127.0.0.1:1"], "--gpus holds for runs in this process"),
    ],
)
def test_a_number_that_cannot_be_is_refused(capsys, words, message):
    assert main(["run", "t2v", *words]) == 2
    assert message in capsys.readouterr().err
