import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.programs import PATIENCE, wait_for
from tests.trainer.runs import config, events, losses, program, run, weights
from wan_core.atomic import locked, partial_path
from wancore.trainer.data.cache import LatentCache
from wancore.trainer.run.loop import QUIT_NOW
from wancore.trainer.run.state import StateError

MODES = {
    "lora": ("t2v", dict(lora_dropout=0.3)),
    "full": ("t2v", dict(trainable_models=("dit",))),
    "controller": ("speed", dict(trainable_models=("motion_controller",))),
    "expert": ("i2v_a14b", dict(max_timestep_boundary=0.358)),
    "both experts": ("i2v_pair", dict(lora_dropout=0.3)),
    "clean first frames, or none": ("ti2v_5b", dict(condition_dropout=0.5)),
}
SCHEDULE = dict(learning_rate=1e-3, lr_scheduler="cosine", warmup_steps=2, caption_dropout=0.3)


def same(first, second):
    """Whether two trees of tensors are equal bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def assert_equal_runs(first, second):
    assert losses(first) == losses(second)
    assert same(weights(first), weights(second))
    names = [p.name for p in sorted(first.glob("epoch-*.safetensors"))]
    assert names == [p.name for p in sorted(second.glob("epoch-*.safetensors"))] and names
    for name in names:
        assert same(load_file(first / name), load_file(second / name))


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(shared, tmp_path, mode):
    """Stopped in the middle of an epoch, between accumulated steps of different size."""
    variant, changes = MODES[mode]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = dict(num_epochs=2, gradient_accumulation_steps=3, validation_clips=0, **SCHEDULE, **changes)
    run(config(shared, whole, variant, **more))
    total = len(losses(whole))
    assert total == 4
    for _ in range(2):
        (parts / "stop").parent.mkdir(exist_ok=True)
        stopper = stop_after(parts, 1)
        with stopper:
            assert run(config(shared, parts, variant, **more)).stopped
        assert not (parts / "stop").exists()
    assert not run(config(shared, parts, variant, **more)).stopped
    assert len(events(parts, "resume")) == 2
    assert_equal_runs(whole, parts)


def stop_after(out, steps):
    """Within the block a run in this process finds a stop file after that many steps."""
    from wancore.trainer import train as module

    class Stopping(module.Evaluator):
        seen = 0

        def after_step(self, step, is_last):
            type(self).seen += 1
            if self.seen == steps:
                (out / "stop").touch()

    patch = pytest.MonkeyPatch.context()

    class Around:
        def __enter__(self):
            self.patch = patch.__enter__()
            self.patch.setattr(module, "Evaluator", Stopping)

        def __exit__(self, *error):
            patch.__exit__(*error)

    return Around()


def wait_for_step(process, out, step):
    wait_for(lambda: any(event["step"] >= step for event in events(out)), process)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["Ctrl-C", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_step_saves_and_exits_well(shared, tmp_path, number):
    settings = config(shared, tmp_path, dataset_repeat=2000)
    process = program(settings)
    wait_for_step(process, tmp_path, 2)
    process.send_signal(number)
    text = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, text
    done = max(losses(tmp_path))
    assert f"Stopped after step {done} of 4000" in text
    assert (tmp_path / "states" / f"step-{done:07}" / "manifest.json").is_file()
    assert (tmp_path / f"step-{done}.safetensors").is_file()


def test_a_second_signal_quits_on_the_spot(shared, tmp_path):
    settings = config(shared, tmp_path, dataset_repeat=2000)
    process = program(settings)
    wait_for_step(process, tmp_path, 1)
    os.kill(process.pid, signal.SIGSTOP)
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    process = program(settings)
    wait_for_step(process, tmp_path, max(losses(tmp_path)) + 1)
    process.send_signal(signal.SIGINT)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    process.communicate()
    assert process.returncode in (QUIT_NOW, 0)


KILLS = int(os.environ.get("WANCORE_KILLS", "3"))


def test_a_killed_run_ends_as_one_that_was_not(shared, tmp_path):
    """Killed at random moments, of which many lie inside a save, as every step is saved."""
    more = dict(num_epochs=2, dataset_repeat=KILLS, save_steps=1, trainable_models=("dit",), **SCHEDULE)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(config(shared, whole, **more))
    moments = random.Random(7)
    kills = inside = 0
    for _ in range(KILLS):
        process = program(config(shared, parts, **more))
        begun = max(losses(parts), default=0)
        try:
            wait_for_step(process, parts, begun + 1)
        except AssertionError:
            assert process.returncode == 0
            break
        time.sleep(moments.random() * 0.4)
        process.kill()
        process.communicate()
        kills += 1
        inside += any((parts / "states").glob(".*.draft")) or any(parts.glob(".*draft*"))
    run(config(shared, parts, **more))
    assert losses(whole) == losses(parts)
    assert same(weights(whole), weights(parts))
    for file in whole.glob("step-*.safetensors"):
        assert same(load_file(file), load_file(parts / file.name))
    print(f"{kills} kills, {inside} of them inside a save")


def test_a_finished_run_has_nothing_left_to_do_until_it_gets_more(shared, tmp_path, caplog):
    settings = config(shared, tmp_path, resume="auto")
    run(settings)
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.suffix in (".json", ".safetensors")}
    assert run(settings).steps == 4
    assert "Nothing was trained" in caplog.text and "changed" not in caplog.text
    assert run(config(shared, tmp_path, learning_rate=3e-5, lora_format="kohya", max_steps=2)).steps == 4
    assert "changed without effect: learning_rate, lora_format" in caplog.text
    assert caplog.text.count("Nothing was trained") == 2 and caplog.text.count("Finished after") <= 1
    assert {file: file.read_bytes() for file in before} == before
    assert run(config(shared, tmp_path, num_epochs=2, learning_rate=1e-5)).steps == 8
    assert [e["lr"] for e in events(tmp_path)][-4:] == [1e-5] * 4


@pytest.mark.parametrize("content", [b"", b"\0\xff" * 99, "{}".encode("utf-16")], ids=["empty", "binary", "UTF-16"])
def test_a_run_whose_events_are_damaged_is_continued(shared, tmp_path, content):
    run(config(shared, tmp_path, max_steps=1))
    assert (tmp_path / "loss.png").is_file()
    (tmp_path / "events.jsonl").write_bytes(content)
    assert run(config(shared, tmp_path, max_steps=2)).steps == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [(dict(seed=3), "seed was 0 and is 3"), (dict(lora_rank=8), "lora_rank was 4"), (dict(batch_size=2), "batch_size")],
    ids=str,
)
def test_another_run_is_not_continued(shared, tmp_path, changes, words):
    run(config(shared, tmp_path, max_steps=1))
    with pytest.raises(StateError, match=words):
        run(config(shared, tmp_path, **changes))


def test_a_changed_run_is_continued_when_forced(shared, tmp_path):
    run(config(shared, tmp_path, max_steps=1, save_steps=9))
    (tmp_path / "step-1.safetensors").unlink()
    assert run(config(shared, tmp_path, seed=3, resume_force=True)).steps == 4


def test_two_trainings_in_one_folder_are_told_of_each_other(shared, tmp_path):
    settings = config(shared, tmp_path)
    with locked(tmp_path / "events.jsonl") as mine, pytest.raises(ValueError, match="Another training is at work in"):
        assert mine
        run(settings)
    assert names(tmp_path) == ["events.jsonl"]
    assert run(settings).steps == 4


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_unrelated_file_of_settings_is_left_alone(shared, tmp_path):
    file = tmp_path / "config.json"
    for content in ('{"_class_name": "WanTransformer3DModel", "num_layers": 30}', "not JSON", "[1]", "[" * 100_000):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"config\.json exists already and is not the record of a training"):
            run(config(shared, tmp_path))
        assert file.read_text() == content and not list(tmp_path.glob("*.safetensors"))


def test_a_chart_of_somebody_else_is_left_alone(shared, tmp_path):
    (tmp_path / "loss.png").write_bytes(b"of my own")
    for _ in range(2):  # what a refused run writes down does not make the chart its own
        with pytest.raises(ValueError, match=r"loss\.png exists already"):
            run(config(shared, tmp_path))
    assert (tmp_path / "loss.png").read_bytes() == b"of my own" and not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("task", ["sft", "sft:data_process"])
def test_a_run_is_stopped_while_it_encodes_and_goes_on_from_there(shared, tmp_path, monkeypatch, task):
    settings = config(shared, tmp_path, cache="disk", cache_dir=str(tmp_path / "cache"), task=task)
    put = LatentCache.put

    def put_and_stop(cache, *arguments):
        put(cache, *arguments)
        (tmp_path / "stop").touch()

    with monkeypatch.context() as patch:
        patch.setattr(LatentCache, "put", put_and_stop)
        result = run(settings)
    assert result.stopped and result.steps == 0 and events(tmp_path, "end")[-1]["stopped"]
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1 and not (tmp_path / "stop").exists()
    assert not run(settings).stopped


def test_a_run_whose_states_are_all_damaged_does_not_start_over(shared, tmp_path):
    settings = config(shared, tmp_path, save_steps=1)
    run(settings)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    for folder in (tmp_path / "states").iterdir():
        (folder / "optimizer.pt").write_bytes(b"damaged")
    with pytest.raises(StateError, match=r"step-0000004 is damaged: optim.*step-0000003 is damaged: optim"):
        run(settings)
    for folder in (tmp_path / "states").iterdir():
        (folder / "manifest.json").unlink()
    with pytest.raises(StateError, match=r"step-0000003 has no manifest\.json.*remove .*states to start over"):
        run(settings)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")} == before


def test_what_killed_trainings_left_goes_away_with_the_next(shared, tmp_path):
    run(config(shared, tmp_path, max_steps=1, save_steps=1))
    left = [
        partial_path(tmp_path / "step-2.safetensors"), partial_path(tmp_path / "loss.png"),
        tmp_path / "states" / ".step-0000002.draft" / "weights.safetensors",
        tmp_path / "states" / "step-0000000" / "weights.safetensors",
    ]  # fmt: skip
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    run(config(shared, tmp_path, max_steps=1, save_steps=1))
    assert not any(path.exists() for path in left)
    assert names(tmp_path / "states") == ["step-0000001"]


def test_what_is_only_shown_costs_no_training(shared, tmp_path, caplog):
    """As on a full disk: files stand where folders and files would be."""
    (tmp_path / "first_samples").write_text("in the way")
    (tmp_path / "loss.png").mkdir()
    assert run(config(shared, tmp_path)).steps == 4
    assert "first samples cannot be written" in caplog.text and "loss chart cannot be written" in caplog.text


def test_nothing_of_an_older_run_is_overwritten(shared, tmp_path):
    run(config(shared, tmp_path, max_steps=1))
    with pytest.raises(ValueError, match="--resume auto"):
        run(config(shared, tmp_path, resume="never"))
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "step-1.safetensors").rename(other / "epoch-7.safetensors")
    with pytest.raises(ValueError, match="not of this run"):
        run(config(shared, other, seed=5))


def test_a_named_state_is_continued(shared, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run(config(shared, first, save_steps=2, learning_rate=1e-3))
    place = str(first / "states" / "step-0000002")
    run(config(shared, second, save_steps=2, learning_rate=1e-3, resume=place))
    assert set(losses(second)) == {3, 4}
    assert same(weights(first), weights(second))
