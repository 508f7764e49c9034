import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.reference import DITS, filled, relative_error
from tests.trainer.runs import config, events, losses, run, weights
from wan_core.models.dit import WanDiT
from wan_core.runtime import OutOfMemoryError
from wancore.trainer.config import TrainConfig
from wancore.trainer.data import conditions
from wancore.trainer.data.choices import Plan, learning_rate
from wancore.trainer.objective import Objective
from wancore.trainer.run import loop as loop_module
from wancore.trainer.run.loop import LoadError, NonFiniteError, SaveError


def difference(first, second):
    """The largest relative error between the weights of two runs."""
    a, b = weights(first)[0], weights(second)[0]
    assert a.keys() == b.keys()
    return max(relative_error(a[name], b[name]) for name in a)


def test_a_run_writes_what_it_promises(shared, tmp_path):
    settings = config(
        shared, tmp_path, num_epochs=2, learning_rate=1e-3, validation_clips=1, validate_steps=2, sample_steps=4,
        sample_inference_steps=2,
    )  # fmt: skip
    result = run(settings)
    assert (result.steps, result.total, result.stopped) == (4, 4, False)
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json", "epoch-0.safetensors", "epoch-1.safetensors", "events.jsonl", "first_samples", "loss.png",
        "samples", "states",
    }  # fmt: skip
    assert [e["lr"] for e in events(tmp_path)] == [1e-3] * 4
    assert [e["step"] for e in events(tmp_path, "validation")] == [2, 4]
    assert set(events(tmp_path, "validation")[0]["by_timestep"]) == {"100", "300", "500", "700", "900"}
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["step-0000004_00.mp4"]
    assert len(list((tmp_path / "first_samples").iterdir())) == 1
    assert Image.open(tmp_path / "loss.png").size == (960, 640)
    assert TrainConfig.from_mapping(json.loads((tmp_path / "config.json").read_text())) == settings
    assert events(tmp_path, "start")[0]["memory"] > 0 and events(tmp_path, "end")[0]["stopped"] is False


@pytest.fixture
def few_text_rows(monkeypatch):
    """Most of the time of a large batch would go into the rows of zeros after a caption."""
    monkeypatch.setattr(conditions, "TEXT_TOKENS", 32)


LEARNERS = {
    "lora": dict(lora_rank=128, lora_alpha=512.0, batch_size=16, max_steps=90, lr_scheduler="cosine"),
    "full": dict(trainable_models=("dit",), batch_size=8, max_steps=80, learning_rate=5e-3),
}


@pytest.mark.parametrize("mode", LEARNERS)
def test_two_clips_are_learned_by_heart(shared, tmp_path, few_text_rows, mode):
    """By their held-out loss, which has noise that training never sees."""
    data = Path(config(shared, tmp_path).dataset_base_path)
    rows = (data / "metadata.csv").read_text(encoding="utf-8").splitlines()
    twice = tmp_path / "twice.csv"
    twice.write_text("\n".join([*rows, *rows[1:]]), encoding="utf-8")
    settings = config(
        shared, tmp_path / "run", dataset_metadata_path=str(twice), validation_clips=2, loss_weighting="none",
        num_frames=1, use_gradient_checkpointing=False, dataset_repeat=2000,
        **{"learning_rate": 2e-3, **LEARNERS[mode]},
    )  # fmt: skip
    if mode == "lora":  # beside weights that are drawn at random: narrower ones leave it too little to learn with
        wide = tmp_path / "wide.safetensors"
        save_file(filled(WanDiT, dataclasses.replace(DITS["t2v"], num_layers=2)).state_dict(), wide)
        others = settings.model_id_with_origin_paths[1:]
        settings = dataclasses.replace(settings, model_paths=((str(wide),),), model_id_with_origin_paths=others)
    run(dataclasses.replace(settings, max_steps=1, learning_rate=0.0))
    run(settings)
    first, last = (event["loss"] for event in events(tmp_path / "run", "validation"))
    assert last < first / 4


def test_a_controller_learns_two_clips_by_heart(shared, tmp_path, few_text_rows, monkeypatch):
    """With the same noise in every step. It only shifts the time modulation of a model whose weights are drawn at
    random, and no shift makes such a model remove noise that it has not seen: that alone is a third of the loss.
    """
    draw = Objective.draw
    monkeypatch.setattr(
        Objective,
        "draw",
        lambda self, shape, seed, _, positions: draw(self, shape, seed, 0, [p % 2 for p in positions]),
    )
    run(config(
        shared, tmp_path, "speed", batch_size=2, loss_weighting="none", trainable_models=("motion_controller",),
        learning_rate=2e-2, dataset_repeat=60, num_frames=1,
    ))  # fmt: skip
    found = losses(tmp_path)
    last = [found[step] for step in sorted(found)[-3:]]
    assert sum(last) / 3 < found[1] / 4


LINEAR = dict(learning_rate=1.0, optimizer="torch.optim.SGD")


@pytest.fixture(scope="module")
def plain(shared, tmp_path_factory):
    """The folder of a run that the others are compared with."""
    out = tmp_path_factory.mktemp("plain")
    run(config(shared, out, batch_size=2, **LINEAR))
    return out


@pytest.mark.parametrize(
    "changes",
    [
        dict(gradient_accumulation_steps=2),
        dict(use_gradient_checkpointing=False, batch_size=2),
        dict(use_gradient_checkpointing_offload=True, batch_size=2),
        dict(cache="off", batch_size=2),
        dict(num_workers=2, batch_size=2),
        dict(stream_base=True, batch_size=2),
        dict(vram_limit=0.016, use_gradient_checkpointing_offload=True, batch_size=2),
    ],
    ids=str,
)
def test_how_a_step_is_computed_does_not_change_it(shared, plain, tmp_path, changes):
    """By SGD, whose step is linear in the gradient. AdamW divides each gradient by its own size, so that one within
    rounding of zero moves its weight by the whole learning rate, either way: an error e of the gradients becomes up to
    2 sqrt(e) of the weights, and how much of that is chance.

    Forward and backward pass are about 250 operations deep, with sums of up to 512 terms. Another order of the terms
    adds about sqrt(250 * 512) units in the last place, 4e-5.
    """
    run(config(shared, tmp_path, **LINEAR, **changes))
    for name in ("loss", "grad_norm"):
        expected = [event[name] for event in events(plain)]
        assert [event[name] for event in events(tmp_path)] == pytest.approx(expected, rel=1e-4)
    assert difference(plain, tmp_path) < 1e-4


def test_a_base_in_8_bits_is_trained_nearly_like_another(shared, tmp_path):
    for name, changes in (("plain", {}), ("eight", {"fp8_base": True, "stream_base": True})):
        run(config(shared, tmp_path / name, learning_rate=1e-3, **changes))
    assert losses(tmp_path / "eight") == pytest.approx(losses(tmp_path / "plain"), rel=0.03)


def test_the_loss_of_a_sample_does_not_depend_on_its_batch(shared, tmp_path):
    def errors(out, **changes):
        run(config(shared, out, learning_rate=0.0, **changes))
        return sorted(error for event in events(out) for error in event["errors"])

    assert errors(tmp_path / "one") == pytest.approx(errors(tmp_path / "four", batch_size=4), rel=1e-5)


def test_frozen_weights_and_the_data_stay_as_they_were(shared, tmp_path):
    kept = {p: p.read_bytes() for folder in ("data", "models") for p in (shared / folder).rglob("*") if p.is_file()}
    run(config(shared, tmp_path, mixed_precision="bf16", max_steps=2))
    assert kept and all(path.read_bytes() == content for path, content in kept.items())


@pytest.mark.parametrize("variant", ["i2v", "flf2v", "fun_control", "fun_v1_1_control", "fun_camera", "vace", "speed"])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_every_kind_of_model_is_trained(shared, tmp_path, variant, mode):
    trained = {"vace": "vace", "speed": "motion_controller"}.get(variant, "dit")
    base = "dit" if variant == "speed" else trained
    changes = dict(lora_base_model=base) if mode == "lora" else dict(trainable_models=(trained,))
    run(config(shared, tmp_path, variant, max_steps=2, learning_rate=1e-3, **changes))
    (file,) = tmp_path.glob("step-2.safetensors")
    assert all(t.isfinite().all() for t in load_file(file).values())
    assert len(losses(tmp_path)) == 2


def test_everything_at_once(shared, tmp_path):
    run(config(
        shared, tmp_path, "speed", lora_base_model="dit", max_steps=2, cache="off",
        trainable_models=("motion_controller", "text_encoder", "vae"), mixed_precision="bf16",
    ))  # fmt: skip
    assert {p.name for p in tmp_path.glob("*.safetensors")} == {
        f"step-2.{part}.safetensors" for part in ("lora", "motion_controller", "text_encoder", "vae")
    }


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_learning_rate_is_what_was_typed(scheduler, rates):
    settings = TrainConfig(lr_scheduler=scheduler, warmup_steps=2, learning_rate=1.0)
    assert [learning_rate(settings, step, 6) for step in range(1, 7)] == pytest.approx(rates, abs=1e-6)
    assert learning_rate(dataclasses.replace(settings, warmup_steps=0), 1, 6) == 1.0


@pytest.mark.parametrize("accumulation", [1, 2, 3, 7])
@pytest.mark.parametrize("world", [1, 2])
def test_a_plan_takes_every_sample_once_per_epoch_and_continues_anywhere(accumulation, world):
    settings = TrainConfig(num_epochs=2, batch_size=2, gradient_accumulation_steps=accumulation)
    plans = [Plan(settings, lambda epoch: ["a"] * 8 + ["b"] * 4, rank, world) for rank in range(world)]
    steps = list(plans[0].steps())
    assert [s.number for s in steps] == list(range(1, plans[0].total + 1))
    for epoch in range(2):
        positions = [p for plan in plans for s in plan.steps() if s.epoch == epoch for b in s.batches for p in b]
        assert sorted(positions) == list(range(12))
        assert sum(s.samples for s in steps if s.epoch == epoch) == 12
        assert [s.ends_epoch for s in steps if s.epoch == epoch].count(True) == 1
    for done in range(len(steps) + 1):
        assert list(plans[0].steps(done)) == steps[done:]


def break_a_loss(monkeypatch, at, value):
    """Make the loss of step `at` another number."""
    calls = []
    real = loop_module.weighted

    def spoiled(error, draw):
        calls.append(1)
        return real(error, draw) * (value if len(calls) == at else 1)

    monkeypatch.setattr(loop_module, "weighted", spoiled)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stops_the_run_and_names_the_files(shared, tmp_path, monkeypatch, value):
    break_a_loss(monkeypatch, 3, value)
    with pytest.raises(NonFiniteError, match=r"Step 3 .*00[01]_video\.mp4"):
        run(config(shared, tmp_path, save_steps=1))
    monkeypatch.undo()
    assert all(t.isfinite().all() for t in weights(tmp_path)[0].values())
    assert "Step 3" in events(tmp_path, "error")[0]["message"]
    assert run(config(shared, tmp_path, save_steps=1)).steps == 4


def test_a_device_that_is_too_small_is_told_what_helps(shared, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop_module, "weighted", full)
    with pytest.raises(OutOfMemoryError, match="--use_gradient_checkpointing_offload"):
        run(config(shared, tmp_path))


def test_a_file_that_goes_bad_is_named_and_the_run_saved_before(shared, tmp_path):
    data = tmp_path / "data"
    out = tmp_path / "out"
    settings = config(shared, out, cache="off", dataset_base_path=str(data))
    shutil.copytree(shared / "data", data)

    class Spoil(loop_module.Evaluator):
        def after_step(self, step, is_last):
            if step == 2:
                for file in data.rglob("*.mp4"):
                    file.write_bytes(b"gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wancore.trainer.train.Evaluator", Spoil)
        with pytest.raises(LoadError, match=r"Step 3 .*row [12] "):
            run(settings)
    assert (out / "states" / "step-0000002").is_dir()


def test_a_chart_that_cannot_be_drawn_does_not_cost_the_weights(shared, tmp_path, monkeypatch, caplog):
    """As after an update of the pack without its new packages."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] or ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert run(config(shared, tmp_path)).steps
    assert (tmp_path / "epoch-0.safetensors").is_file() and not (tmp_path / "loss.png").exists()
    assert "The loss chart cannot be written" in caplog.text


def fill_the_disk(monkeypatch, failing):
    """Let those saves fail, counted from 1."""
    from wancore.trainer.run import state

    calls = []
    real = state.write_safetensors

    def write_safetensors(*arguments):
        calls.append(1)
        if len(calls) in failing:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(state, "write_safetensors", write_safetensors)


def test_one_failed_save_costs_that_save_alone(shared, tmp_path, monkeypatch, caplog):
    fill_the_disk(monkeypatch, {2})
    assert run(config(shared, tmp_path, save_steps=1, keep_last=9)).steps == 4
    assert sorted(p.name for p in (tmp_path / "states").iterdir()) == [f"step-000000{n}" for n in (1, 3, 4)]
    assert "SAVING FAILED after step 2" in caplog.text


@pytest.mark.parametrize("keep", [None, 1, 2])
def test_the_last_saves_are_kept_and_nothing_else_is_removed(shared, tmp_path, keep):
    run(config(shared, tmp_path, save_steps=1, max_steps=1, keep_last=keep))
    shutil.copy(tmp_path / "step-1.safetensors", tmp_path / "the best so far.safetensors")
    run(config(shared, tmp_path, save_steps=1, keep_last=keep))
    kept = range(1, 5) if keep is None else range(5 - keep, 5)
    assert sorted(p.name for p in tmp_path.glob("step-*.safetensors")) == [f"step-{n}.safetensors" for n in kept]
    states = sorted(p.name for p in (tmp_path / "states").iterdir())
    assert states == [f"step-000000{n}" for n in range(5 - (keep or 2), 5)]
    assert (tmp_path / "the best so far.safetensors").exists()


def test_a_disk_that_stays_full_ends_the_run_with_the_last_good_state(shared, tmp_path, monkeypatch):
    fill_the_disk(monkeypatch, {2, 3})
    with pytest.raises(SaveError, match=r"step 3: .*No space.* state is that of step 1"):
        run(config(shared, tmp_path, save_steps=1))
    assert [p.name for p in (tmp_path / "states").iterdir()] == ["step-0000001"]
    monkeypatch.undo()
    assert run(config(shared, tmp_path, save_steps=1)).steps == 4


def test_samples_that_fail_cost_themselves_alone(shared, tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OutOfMemoryError("the device is too small")

    monkeypatch.setattr("wancore.trainer.run.validate.draw_samples", full)
    assert run(config(shared, tmp_path, sample_steps=2)).steps == 4
    assert "No samples after step 2: the device is too small" in caplog.text
    assert [e["step"] for e in events(tmp_path, "warning")] == [2, 4]


def test_too_little_room_is_said_before_the_first_step(shared, tmp_path):
    with pytest.raises(OSError, match="--min_free_gb"):
        run(config(shared, tmp_path, min_free_gb=1e9))
    assert not events(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(optimizer_args={"beta": 1}), "--optimizer_args"),
        (dict(dataset_repeat=10**6), "at most 1000000"),
        (dict(validation_clips=2), "leaves nothing"),
        (dict(resume="/nowhere"), "no saved state"),
        (dict(lora_target_modules=("nothing",)), "--lora_target_modules"),
    ],
    ids=str,
)
def test_mistakes_are_refused_before_the_first_step(shared, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(config(shared, tmp_path, **changes))
    assert not events(tmp_path)


def test_another_optimizer_and_its_arguments_are_used(shared, tmp_path):
    run(config(shared, tmp_path, optimizer="torch.optim.SGD", optimizer_args={"momentum": 0.9}, max_steps=1))
    assert weights(tmp_path)[1]["param_groups"][0]["momentum"] == 0.9
