"""`headless batch`: what becomes of jobs that are right, wrong, failing, killed, shared, or without room."""

import csv
import json
import random
import re
import signal
from pathlib import Path

import pytest
from PIL import Image

from tests import fork_server
from tests.disks import full_disk
from tests.programs import PATIENCE, wait_for
from wan_core.models.text_encoder import UMT5Encoder
from wancore.headless.batch import command
from wancore.headless.batch.drive import MOST_LOSSES, Finished, Schedule, drive
from wancore.headless.batch.jobs import Job, Row, make_jobs, read_rows, with_shared
from wancore.headless.batch.results import MADE, Results
from wancore.headless.batch.worker import CHECKPOINTS, Outcome, resumable
from wancore.headless.cli import main
from wancore.headless.folders import workflow_file
from wancore.headless.overrides import apply_tiny
from wancore.headless.schema import schemas_of, validate
from wancore.headless.workflow import Workflow
from wancore.nodes import NODE_CLASS_MAPPINGS

COPY = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}, "_meta": {"title": "Picture"}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "sub/copy"}},
}
SMALLEST = ["--tiny", "--device", "cpu"] + [
    word for value in ("width=16", "height=16", "num_frames=1", "steps=2") for word in ("--set", f"Sampler.{value}")
]
"""The shipped text-to-video workflow in a quarter of a second of one core."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name, level in (("a", 255), ("b", 128)):
        Image.new("RGB", (8, 8), (level, 0, 0)).save(tmp_path / "in" / f"{name}.png")
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG but not for long")
    (tmp_path / "copy.json").write_text(json.dumps(COPY))
    return tmp_path


def words(place: Path, jobs: list[dict] | str, *arguments: str, out: str = "out") -> list[str]:
    """The words of the command. Jobs without a workflow copy a picture."""
    if not isinstance(jobs, str):
        (place / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
        jobs = "jobs.jsonl"
    folders = ["--input", str(place / "in"), "--out", str(place / out)]
    return ["batch", str(place / jobs), "--workflow", str(place / "copy.json"), *folders, *arguments]


def films(count: int) -> list[dict]:
    prompts = ["a red ball moves to the right over a green field", "a blue box gets bigger slowly over the sand"]
    return [{"id": f"f{n}", "workflow": "t2v", "prompt": prompts[n % 2], "seed": n} for n in range(count)]


def made(folder: Path) -> dict[str, str]:
    """The digest of every film in a folder, by its name."""
    files = (json.loads(path.read_text())["files"] for path in folder.glob("*.json"))
    return {file["name"]: file["sha256"] for each in files for file in each}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("j.jsonl", '{"id": "x", "prompt": "a cat", "seed": 7}\n\n{"id": "y", "on": true, "cfg": 1.5}\n',
         [("x", "t2v", {"prompt": "a cat", "seed": "7"}), ("y", "t2v", {"on": "true", "cfg": "1.5"})]),
        ("j.csv", 'id,workflow,prompt,Sampler.seed\nx,i2v,"a cat,\nat night",3\ny,,a dog,\n',
         [("x", "i2v", {"prompt": "a cat,\nat night", "Sampler.seed": "3"}), ("y", "t2v", {"prompt": "a dog"})]),
        ("j.tsv", "id\tprompt\nx\ta cat\n", [("x", "t2v", {"prompt": "a cat"})]),
        ("j.txt", "A cat, at night!\n\n 雨中的猫 \n",
         [("a-cat-at-night-9ff13cbd", "t2v", {"prompt": "A cat, at night!"}),
          ("雨中的猫-2c8a1b26", "t2v", {"prompt": "雨中的猫"})]),
    ],
)  # fmt: skip
def test_jobs_are_read_from_lines_tables_and_prompts(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, encoding="utf-8")
    rows = read_rows(tmp_path / name, "t2v")
    assert [(row.workflow, row.values) for row in rows] == [each[1:] for each in expected]
    # The digest in an id follows from the text; what stands before it is for people.
    assert [row.id[: len(each[0]) - 8] for row, each in zip(rows, expected, strict=True)] == [
        e[0][:-8] for e in expected
    ]


def test_a_further_line_renames_no_job(tmp_path):
    (tmp_path / "j.txt").write_text("a cat\na dog\n")
    before = {row.id for row in read_rows(tmp_path / "j.txt", "t2v")}
    (tmp_path / "j.txt").write_text("a bird\na cat\na dog\n")
    assert before < {row.id for row in read_rows(tmp_path / "j.txt", "t2v")}


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("j.jsonl", "", "holds no jobs. Write one object a line"),
        ("j.jsonl", '{"id": "x"}\n["y"]\n{"id": "x"', r"(?s)2 jobs are wrong.*:2: expected an object.*:3: .*JSON"),
        ("j.jsonl", '{"id": "x"}\n{"id": "X"}', "j.jsonl:2: the id 'X' is also that of j.jsonl:1"),
        ("j.jsonl", '{"id": "../x"}', "id: write a plain name"),
        ("j.jsonl", '{"id": "x~2"}', "a name without ~"),
        ("j.jsonl", '{"id": "x", "seed": null}', "seed must be text, a number, true or false; got None"),
        ("j.txt", "a cat\na cat\n", "j.txt:2: the id 'a-cat-.*' is also that of j.txt:1"),
        ("j.csv", "id,prompt\nx,a,b\n", "j.csv:2: expected 2 cells"),
        ("j.csv", 'id,prompt\nx,"a', "is not a row of a table"),
    ],
)  # fmt: skip
def test_a_list_that_is_wrong_is_refused_with_its_lines(tmp_path, name, text, problem):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_rows(tmp_path / name, "t2v")


def test_a_name_alone_is_that_input_of_every_node_and_jobs_come_on_top_of_set():
    rows = [
        Row("1", "a", "Wan2.1-I2V-14B-480P", {"width": "64", "prompt": "a cat", "Sampler.steps": "3"}),
        Row("2", "b", "Wan-AI/Wan2.1-T2V-14B", {}),
        Row("3", "c", "t2v", {"widht": "64"}),
        Row("4", "d", "t2v", {"seed": "many"}),
    ]
    nodes = {**NODE_CLASS_MAPPINGS, **command.core_nodes(command.Folders())}
    known = schemas_of(nodes)
    jobs, wrong = make_jobs(
        rows, lambda w: apply_tiny(w, nodes), lambda _: known, ["Sampler.steps=9", "Sampler.seed=5"]
    )
    first, second = (job.prompt.values() for job in jobs)
    widths = [node["inputs"]["width"] for node in first if "width" in node["inputs"]]
    assert len(widths) > 1 and set(widths) == {64}
    assert [node["inputs"]["steps"] for node in (*first, *second) if "steps" in node["inputs"]] == [3, 9]
    assert jobs[0].seeds == jobs[1].seeds == [5]
    assert [row.id for row, _ in wrong] == ["c", "d"]
    assert "'widht' is an input of no node of t2v. Write one of" in wrong[0][1] and "width" in wrong[0][1]
    assert "seed expects a whole number, not 'many'" in wrong[1][1]


def test_jobs_of_one_model_and_size_are_together_and_know_what_they_share():
    nodes = {**NODE_CLASS_MAPPINGS, **command.core_nodes(command.Folders())}
    known = schemas_of(nodes)
    values = [("x", 64, 1), ("x", 96, 2), ("y", 64, 3), ("z", 64, 4)]
    rows = [
        Row("", str(n), "t2v", {"prompt": p, "width": str(w), "seed": str(s)}) for n, (p, w, s) in enumerate(values)
    ]
    jobs, _ = make_jobs(rows, lambda w: apply_tiny(w, nodes), lambda _: known)
    ordered = with_shared(jobs)
    assert [job.id for job in ordered] == ["0", "2", "3", "1"]
    shared = {job.id: {job.prompt[node]["_meta"]["title"] for node in job.shared} for job in ordered}
    loaders = {"Load model", "Load text encoder", "Load VAE"}
    assert shared == {"0": loaders | {"Prompt"}, "1": loaders | {"Prompt"}, "2": loaders, "3": loaders}


def test_a_worker_stays_with_a_group_and_a_new_one_goes_where_most_is_left():
    jobs = [
        Job(f"{group}{n}", "", {}, {}, group) for group, count in (("a", 5), ("b", 4), ("c", 1)) for n in range(count)
    ]
    schedule = Schedule(jobs)
    order = [(worker, schedule.next(worker).id) for worker in "1212121212"]
    assert [id for worker, id in order if worker == "1"] == ["a0", "a1", "a2", "a3", "a4"]
    assert [id for worker, id in order if worker == "2"] == ["b0", "b1", "b2", "b3", "c0"]
    assert schedule.next("1") is None and not schedule


def test_a_job_that_loses_every_worker_is_given_up_and_stops_nothing():
    class Losing:
        def __init__(self):
            self.given = []

        def free(self):
            return [] if self.given else ["w"]

        def start(self, worker, job):
            self.given.append(job)

        def finished(self, seconds):
            job = self.given.pop()
            return [Finished("w", job, None if job.id == "bad" else Outcome("done"), "out of memory")]

        def alive(self):
            return True

    told = []
    drive([Job("bad", "", {}, {}), Job("good", "", {}, {})], Losing(), told.append)
    ended = {each.job.id: each.outcome for each in told if each.outcome}
    assert ended["good"].status == "done" and ended["bad"].status == "failed"
    assert "5 workers were lost with this job, the last because: out of memory" in ended["bad"].error
    assert len(told) == MOST_LOSSES + 1


def test_a_bad_job_in_three_stops_nothing_and_a_rerun_tries_it_alone(place, capsys):
    jobs = [{"id": f"j{n}", "image": "broken.png" if n % 3 == 2 else "a.png"} for n in range(6)]
    assert main(words(place, jobs)) == 1
    out, err = capsys.readouterr()
    assert (
        re.search(r"finished +4\n.*4 in .*\n.*\nfailed +2\n", out) and "  j2: Node #1 LoadImage 'Picture' failed" in out
    )
    assert "[6/6]" in err and ", 2 failed" in err
    assert sorted(made(place / "out")) == ["j0.png", "j1.png", "j3.png", "j4.png"]
    rows = {row["id"]: row for row in csv.DictReader((place / "out" / "summary.csv").open())}
    assert rows["j0"]["status"] == "done" and rows["j5"]["status"] == "failed" and rows["j5"]["attempts"] == "1"
    page = (place / "out" / "index.html").read_text()
    assert page.count("<img") == 4 and page.count('class="failed"') == 2 and 'href="j0.png"' in page
    before = made(place / "out")
    (place / "in" / "broken.png").write_bytes((place / "in" / "b.png").read_bytes())
    assert main(words(place, jobs)) == 0
    assert "of these now            2 in" in capsys.readouterr().out
    record = json.loads((place / "out" / "j2.json").read_text())
    assert record["attempts"] == 2 and len(record["versions"]) == 4 and record["seconds"] > 0 and record["seeds"] == []
    assert made(place / "out").items() >= before.items() and not (place / "out" / ".batch").exists()


def test_nothing_runs_when_a_job_is_wrong_unless_it_may_be_left_out(place, capsys):
    jobs = [{"id": "good"}, {"id": "bad", "image": "none.png"}, {"id": "worse", "workflow": "no_such"}]
    assert main(words(place, jobs)) == 2
    err = capsys.readouterr().err
    assert "Nothing has run: 2 jobs are wrong.\njobs.jsonl:2 (bad): The workflow cannot run" in err
    assert "jobs.jsonl:3 (worse): Cannot read the workflow no_such" in err and not (place / "out").exists()
    assert main(words(place, jobs, "--check", "--skip-invalid")) == 1
    assert capsys.readouterr().out == "1 jobs in 1 groups of one model and size; 0 finished before.\n"
    assert main(words(place, jobs, "--skip-invalid")) == 1
    assert sorted(made(place / "out")) == ["good.png"] and "  bad: The workflow cannot run" in capsys.readouterr().out


def test_nothing_is_overwritten_not_by_other_settings_either(place, capsys):
    assert main(words(place, [{"id": "x"}])) == 0
    (place / "out" / "mine.png").write_bytes(b"a picture of my own")
    capsys.readouterr()
    assert main(words(place, [{"id": "x", "image": "b.png"}, {"id": "mine"}, {"id": "y"}])) == 2
    err = capsys.readouterr().err
    assert "x.json is of a job with other settings" in err and "mine.png exists and is no result of a batch" in err
    (place / "out" / "y.json").write_text("[1, 2]")
    assert main(words(place, [{"id": "y"}])) == 2
    assert "y.json is no sidecar of a batch: expected an object. Move it away." in capsys.readouterr().err
    assert (place / "out" / "mine.png").read_bytes() == b"a picture of my own" and not (
        place / "out" / "y.png"
    ).exists()


def test_a_full_disk_ends_the_batch_and_leaves_nothing_half_written(place, capsys):
    jobs = [{"id": f"j{n}", "image": "big.png"} for n in range(3)]
    Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(3 * 64 * 64)).save(place / "in" / "big.png")
    with full_disk(8000):
        assert main(words(place, jobs)) == 1
    err = capsys.readouterr().err
    assert "There is no room for j0: " in err and "Make room and run the same command." in err
    assert not made(place / "out") and not list((place / "out").glob("*.png"))
    assert main(words(place, jobs)) == 0 and len(made(place / "out")) == 3


def test_a_film_that_was_made_is_published_by_the_next_attempt(place, monkeypatch):
    """The writer is killed after the film is whole and before its sidecar is there."""
    job = [{"id": "x"}]
    assert main(words(place, job, out="plain")) == 0
    results = Results(place / "out")
    file = results.work("x") / "a.png"
    file.parent.mkdir(parents=True)
    file.write_bytes((place / "plain" / "x.png").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(Results, "publish_made", lambda *_: {})
        results.publish("x", [file], json.loads((place / "plain" / "x.json").read_text()))
    assert (results.work("x") / MADE).is_file() and not (place / "out" / "x.png").exists()
    assert main(words(place, job)) == 0
    assert made(place / "out") == made(place / "plain") and not results.work("x").exists()


def test_added_checkpoints_do_not_reach_the_files(place):
    nodes = {**NODE_CLASS_MAPPINGS, **command.core_nodes(command.Folders())}
    workflow = validate(apply_tiny(Workflow.load(workflow_file("t2v")), nodes), schemas_of(nodes))
    changed = resumable(workflow, nodes, 3).nodes
    assert changed[CHECKPOINTS].inputs == {"checkpoint_every": 3, "keep_latents": False}
    assert changed["5"].inputs["run"].node_id == CHECKPOINTS and changed["4"].inputs["cache_on_disk"] is True
    assert main(words(place, films(1), *SMALLEST)) == 0
    assert CHECKPOINTS.encode() not in (place / "out" / "f0.mp4").read_bytes()
    assert b"WanCoreSampler" in (place / "out" / "f0.mp4").read_bytes()


def test_killed_again_and_again_a_batch_ends_as_an_undisturbed_one(place):
    """Each time in the middle of a film, whose sampling the next run continues."""
    jobs, arguments = films(2), [*SMALLEST, "--set", "Sampler.steps=8", "--checkpoint-every", "1"]
    assert fork_server.run(["-m", "headless", *words(place, jobs, *arguments, out="plain")]).returncode == 0
    unfinished = ".batch/work/*/wancore/unfinished_*"
    for kill in range(2):
        process = fork_server.start(["-m", "headless", *words(place, jobs, *arguments)])
        wait_for(lambda done=kill: len(list((place / "out").glob("*.mp4"))) == done, process)
        wait_for(lambda: list((place / "out").glob(unfinished)), process)
        process.kill()
        assert process.wait(PATIENCE) == -signal.SIGKILL
    assert fork_server.run(["-m", "headless", *words(place, jobs, *arguments)]).returncode == 0
    assert made(place / "out") == made(place / "plain") and len(made(place / "out")) == 2
    sidecars = [json.loads((place / "out" / f"f{number}.json").read_text()) for number in range(2)]
    assert any(record["continued"] for record in sidecars)
    left = {path.name for path in (place / "out").iterdir()}
    assert left == {
        *(f"f{n}{end}" for n in range(2) for end in (".mp4", ".json")),
        "stills",
        "index.html",
        "summary.csv",
    }


def test_two_drivers_make_each_film_once(place):
    jobs = [{"id": f"j{n}", "image": "broken.png" if n == 7 else "a.png"} for n in range(24)]
    arguments = ["-m", "headless", *words(place, jobs)]
    both = [fork_server.start(arguments) for _ in range(2)]
    outputs = [process.communicate(PATIENCE)[0] for process in both]
    counts = [int(re.search(r"of these now +(\d+)", text)[1]) for text in outputs]
    assert sum(counts) == 23 and len(made(place / "out")) == 23, outputs
    assert all(re.search(r"finished +23\n", text) and "  j7: " in text for text in outputs)
    # Once, or twice where one driver began after the other had failed with it.
    assert json.loads((place / "out" / ".batch" / "failed" / "j7.json").read_text())["attempts"] in (1, 2)


def test_models_and_prompts_are_computed_once_for_all_jobs(place, monkeypatch):
    loads, encoded = [], []
    load, encode = NODE_CLASS_MAPPINGS["WanCoreModelLoader"].load, UMT5Encoder.encode
    monkeypatch.setattr(
        NODE_CLASS_MAPPINGS["WanCoreModelLoader"], "load", lambda *a, **k: loads.append(1) or load(*a, **k)
    )
    monkeypatch.setattr(UMT5Encoder, "encode", lambda self, ids: encoded.extend(ids) or encode(self, ids))
    assert main(words(place, films(4), *SMALLEST)) == 0
    assert (len(loads), len(encoded)) == (1, 3), "one model; two prompts and what to avoid in both"
