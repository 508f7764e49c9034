"""`headless batch --servers`: jobs go to the least busy server, and none is lost with one."""

import contextlib
import json
import signal
import threading

import pytest
from PIL import Image

from tests.headless.test_batch import made, place, words  # noqa: F401  # a fixture
from tests.programs import PATIENCE, wait_for
from wancore.headless import client
from wancore.headless.batch import fleet
from wancore.headless.cli import main


@pytest.fixture
def fakes(fake_comfies, monkeypatch):
    """Three servers that say that every run has made one picture, each with what closes it."""
    monkeypatch.setattr(client, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(fleet, "PATIENCE", 0.3)
    monkeypatch.setattr(fleet, "LOOK_SECONDS", 0.5)
    for server, _ in fake_comfies:
        server.outputs = {"2": {"images": [{"filename": "x.png", "subfolder": "", "type": "output"}]}}
        server.files = {("x.png", "", "output"): b"picture"}
    return fake_comfies


def prompts(fake) -> int:
    return sum(path == "prompt" for path, _ in fake.posted)


def test_a_server_that_goes_away_loses_no_job_and_a_busy_one_gets_few(place, fakes, capsys):  # noqa: F811
    (dying, end), (busy, _), (free, _) = fakes
    dying.polls_until_done = 10**9
    busy.ahead = [f"of another {n}" for n in range(50)]
    jobs = [{"id": f"j{n}"} for n in range(20)]
    codes = []
    command = words(place, jobs, "--servers", *(fake.url for fake, _ in fakes))
    driver = threading.Thread(target=lambda: codes.append(main(command)))
    driver.start()
    wait_for(lambda: prompts(dying) >= 1)
    end.close()
    driver.join(PATIENCE)
    err = capsys.readouterr().err
    assert codes == [0] and len(made(place / "out")) == 20, err
    assert f"its worker {dying.url} is lost" in err and "No ComfyUI server answers" in err
    assert prompts(busy) + prompts(free) == 20
    assert prompts(busy) <= fleet.AHEAD, "none, unless it was the first that answered"
    record = json.loads((place / "out" / "j0.json").read_text())
    assert record["worker"] in (busy.url, free.url) and record["versions"]["comfyui"] == "0.0"


def test_a_run_that_a_server_forgot_is_made_again_and_a_refused_job_fails(place, fakes, capsys):  # noqa: F811
    (server, _), *_ = fakes
    server.known = False
    codes = []
    command = words(place, [{"id": "x"}], "--servers", server.url)
    driver = threading.Thread(target=lambda: codes.append(main(command)))
    driver.start()
    wait_for(lambda: prompts(server) >= 2)
    server.known = True
    driver.join(PATIENCE)
    assert codes == [0] and "The server no longer knows this run" in capsys.readouterr().err
    server.prompt_answer = (400, {"error": {"type": "x", "message": "it is full", "details": ""}, "node_errors": {}})
    assert main(words(place, [{"id": "y"}], "--servers", server.url)) == 1
    assert "it is full" in (place / "out" / "summary.csv").read_text()


@pytest.mark.comfyui
def test_three_real_servers_of_which_one_is_killed(place, serve, tmp_path_factory, capsys):  # noqa: F811
    jobs = [{"id": f"j{n}", "image": ("a.png", "b.png")[n % 2]} for n in range(30)]
    with contextlib.ExitStack() as running:
        servers = [running.enter_context(serve(tmp_path_factory.mktemp(f"comfy{n}"))) for n in range(3)]
        codes = []
        command = words(place, jobs, "--servers", *(server.url for server in servers))
        driver = threading.Thread(target=lambda: codes.append(main(command)))
        driver.start()
        wait_for(lambda: len(list((place / "out").glob("j*.json"))) >= 5)
        servers[1].process.send_signal(signal.SIGKILL)
        driver.join(PATIENCE)
    assert codes == [0] and sorted(made(place / "out")) == sorted(f"j{n}.png" for n in range(30)), (
        capsys.readouterr().err
    )
    for job in jobs:
        with Image.open(place / "out" / f"{job['id']}.png") as film, Image.open(place / "in" / job["image"]) as given:
            assert film.tobytes() == given.tobytes()
    workers = {json.loads(path.read_text())["worker"] for path in (place / "out").glob("j*.json")}
    assert {servers[0].url, servers[2].url} <= workers
