"""`headless batch` on actors of Ray: the same films as in one process, whatever is killed."""

import os
import signal
import sys
import threading

import psutil
import pytest

from tests.headless.test_batch import SMALLEST, films, made, words
from tests.programs import PATIENCE, wait_for
from wancore.headless.cli import main

pytest.importorskip("ray")


def actors() -> list[psutil.Process]:
    """The processes of this one's actors."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if "ray::FilmWorker" in "".join(process.cmdline())]


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG but not for long")
    # Sockets below it must have short names, which pytest's folders may not leave room for.
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    # A busy machine may start Ray's own processes slowly.
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", "600")
    return tmp_path


def test_a_killed_actor_loses_no_film_and_a_bad_job_stops_nothing(place, one_thread, capsys):
    arguments = [*SMALLEST, "--set", "Sampler.steps=12", "--checkpoint-every", "1"]
    jobs = films(6)
    assert main(words(place, jobs, *arguments, out="plain")) == 0
    bad = {"id": "bad", "workflow": "i2v_480p", "Start image.image": "broken.png"}
    codes = []
    command = words(place, [*jobs, bad], *arguments, "--workers", "2")
    driver = threading.Thread(target=lambda: codes.append(main(command)))
    driver.start()
    at_work = ".batch/work/*/wancore/unfinished_*"
    killed = wait_for(lambda: codes or (list((place / "out").glob(at_work)) and actors()))
    assert not codes, capsys.readouterr().err
    os.kill(killed[0].pid, signal.SIGKILL)
    driver.join(PATIENCE)
    out, err = capsys.readouterr()
    assert codes == [1] and made(place / "out") == made(place / "plain"), err
    assert "its worker worker " in err and "is lost" in err
    assert "  bad: Node #" in out and "is not a picture" in out and not actors()


def test_without_a_cluster_and_without_ray(place, capsys, monkeypatch):
    assert main(words(place, films(1), *SMALLEST, "--address", "127.0.0.1:9", "--workers", "1")) == 1
    assert "No Ray cluster answers at 127.0.0.1:9: " in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(words(place, films(1), *SMALLEST, "--workers", "2")) == 2
    assert "pip install .[batch]" in capsys.readouterr().err
