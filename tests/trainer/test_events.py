import json
import logging
import sys

import pytest
from PIL import Image

from wancore.trainer.config import TrainConfig
from wancore.trainer.run.chart import by_timestep, draw_chart, save_chart, smooth
from wancore.trainer.run.events import Events, StepTimer, latest_steps, open_trackers, read_events, validation_points


def step(number, loss=0.5, **more):
    return {"event": "step", "step": number, "loss": loss, "lr": 1e-4, **more}


def test_events_are_lines_of_json(tmp_path):
    events = Events(tmp_path / "run" / "events.jsonl")
    events.emit("start", folder=tmp_path, missing=float("nan"), nested={"a": (1, float("inf"))})
    events.step(1, 10, loss=0.25, lr=1e-4, timesteps=[500.0])
    found = list(read_events(tmp_path / "run" / "events.jsonl"))
    assert [e["event"] for e in found] == ["start", "step"]
    assert (
        found[0]["folder"] == str(tmp_path) and found[0]["missing"] is None and found[0]["nested"] == {"a": [1, None]}
    )
    assert found[1]["loss"] == 0.25 and found[1]["total"] == 10


def test_processes_without_a_file_are_silent(tmp_path, capsys):
    events = Events(None, show=True)
    events.emit("start")
    events.step(1, 2, loss=0.5, lr=1e-4)
    events.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == ""


def test_a_line_that_a_kill_cut_off_costs_that_line_alone(tmp_path):
    file = tmp_path / "events.jsonl"
    file.write_text(json.dumps(step(1)) + "\n" + json.dumps(step(2))[:20], encoding="utf-8")
    Events(file).emit("step", step=3)
    assert [e["step"] for e in read_events(file)] == [1, 3]


def test_steps_that_ran_twice_count_once(tmp_path):
    file = tmp_path / "events.jsonl"
    lines = [step(1, 0.9), step(2, 0.8), step(3, 0.7), {"event": "resume", "step": 1}, step(2, 0.5)]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert [(e["step"], e["loss"]) for e in latest_steps(file)] == [(1, 0.9), (2, 0.5), (3, 0.7)]


def test_a_full_disk_costs_events_and_not_the_run(tmp_path, monkeypatch, caplog):
    events = Events(tmp_path / "events.jsonl")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.open", full)
    with caplog.at_level(logging.WARNING, "wancore"):
        events.emit("start")
        events.emit("start")
    assert len(caplog.records) == 1 and "No space left" in caplog.text


def test_a_tracker_that_cannot_close_does_not_fail_the_run(tmp_path, caplog):
    class Broken:
        def add(self, number, numbers): ...

        def close(self):
            raise ConnectionError("no network")

    Events(tmp_path / "events.jsonl", [Broken()]).close()
    assert "Broken may lack the last numbers (no network)" in caplog.text


def test_trackers_get_the_numbers_of_the_main_process(tmp_path):
    class Recorder:
        def __init__(self):
            self.seen = []

        def add(self, number, numbers):
            self.seen.append((number, dict(numbers)))

        def close(self):
            self.seen.append("closed")

    recorder = Recorder()
    Events(None, [recorder]).step(1, 2, loss=0.5, lr=1e-4)
    assert recorder.seen == []
    events = Events(tmp_path / "events.jsonl", [recorder])
    events.step(1, 2, loss=0.5, lr=1e-4, timesteps=[3.0])
    events.close()
    assert recorder.seen == [(1, {"loss": 0.5, "lr": 1e-4}), "closed"]


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_tracker_that_is_not_installed_is_an_error_that_names_it(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"--log_with {name} .* pip install {name}"):
        open_trackers(TrainConfig(log_with=(name,)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_pace_is_the_median_of_the_last_steps():
    timer = StepTimer()
    assert timer.remaining(3) != timer.remaining(3)
    for seconds in (100.0, 2.0, 2.0, 2.0):
        timer.add(seconds)
    assert timer.remaining(5) == 10


def test_tensorboard_reads_what_is_written(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = Events(tmp_path / "events.jsonl", open_trackers(TrainConfig(log_with=("tensorboard",)), tmp_path))
    events.step(1, 2, loss=0.5, lr=1e-4, timesteps=[3.0])
    events.step(2, 2, loss=0.25, lr=1e-4, timesteps=[3.0])
    events.numbers(2, {"validation": 0.75})
    events.close()
    found = reader.EventAccumulator(str(tmp_path / "logs" / "tensorboard"))
    found.Reload()
    told = {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert told.keys() == {"loss", "lr", "validation"}
    assert told["loss"] == [(1, 0.5), (2, 0.25)] and told["validation"] == [(2, 0.75)]


@pytest.mark.parametrize(
    ("steps", "held_out"),
    [
        ([], []),
        ([step(1)], []),
        ([step(1, 0.0), step(2, 0.0)], [(1, 0.0)]),
        ([step(5, None), step(6, 0.2)], [(6, 0.3)]),
    ],
    ids=["nothing", "one step", "flat at zero", "a step without a number"],
)
def test_a_chart_can_be_drawn_of_anything(tmp_path, steps, held_out):
    file = save_chart(tmp_path / "loss.png", steps, held_out)
    assert Image.open(file).size == (960, 640)
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_a_chart_shows_the_held_out_points_in_blue():
    steps = [step(n, 1 / n) for n in range(1, 50)]
    colours = {colour for _, colour in draw_chart(steps, [(10, 0.4), (40, 0.2)]).getcolors(100000)}
    assert (31, 95, 208) in colours
    assert (31, 95, 208) not in {colour for _, colour in draw_chart(steps).getcolors(100000)}


def test_smoothing_keeps_a_constant_and_follows_a_step():
    assert [y for _, y in smooth([(i, 2.0) for i in range(30)])] == pytest.approx([2.0] * 30)
    line = smooth([(i, float(i >= 50)) for i in range(200)])
    assert line[49][1] == 0 and 0 < line[60][1] < 1 and line[199][1] > 0.99


def test_errors_are_sorted_by_timestep():
    found = by_timestep([step(1, timesteps=[5.0, 1000.0], errors=[1.0, 3.0]), step(2, timesteps=[50.0], errors=[2.0])])
    assert found[0] == 1.5 and found[9] == 3.0 and found[1:9] == [None] * 8


@pytest.mark.parametrize(
    "line",
    [
        "3", "null", "[1]", '"step"', "[" * 10_000, "{}", '{"event": 3}', '{"event": "step"}', "\x00\xff",
        '{"event": "step", "step": "one", "loss": 1}', '{"event": "step", "step": 1, "loss": "low"}',
        '{"event": "step", "step": true, "loss": [1]}', '{"event": "step", "step": 2, "loss": 1, "errors": [{}]}',
        '{"event": "validation", "step": {}, "loss": 1}', '{"event": "step", "step": 1e400, "loss": 1}',
    ],
)  # fmt: skip
def test_what_is_no_event_is_passed_over(tmp_path, line):
    file = tmp_path / "events.jsonl"
    file.write_text(f'{line}\n{{"event": "step", "step": 7, "loss": 0.5}}\n', encoding="utf-8")
    assert [event["step"] for event in latest_steps(file)] == [7]
    assert validation_points(file) == []
    draw_chart(latest_steps(file), validation_points(file))
    assert list(read_events(tmp_path)) == [], "a folder holds no events"


def test_events_need_a_file(tmp_path):
    with pytest.raises(ValueError, match="is no file"):
        Events(tmp_path)
