"""Both experts of a pair, trained in one run."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reference import relative_error
from tests.trainer import models
from tests.trainer.material import PAIRS
from tests.trainer.runs import config, events, losses, run
from wan_core import catalog
from wan_core.loading.pairs import find_pairs, resolve_pair
from wan_core.model import VideoModel
from wan_core.model_files import DiTSettings, experts_of, inspect_experts, load_dit
from wan_core.offload.weights import WeightProvider
from wan_core.sampling.experts import Expert, expert_at
from wancore.trainer.config import TrainConfig
from wancore.trainer.data import dataset, report
from wancore.trainer.data.choices import Plan
from wancore.trainer.data.conditions import Examples
from wancore.trainer.model import load, sharding
from wancore.trainer.model.memory import FrozenWeights
from wancore.trainer.model.trainable import prepare
from wancore.trainer.objective import Objective, expert_range
from wancore.trainer.run.estimate import Estimator

BOUNDARY = 0.9
MODES = {
    "own": {}, "shared": {"expert_loras": "shared"}, "full": {"trainable_models": ("dit",), "lora_base_model": None},
}  # fmt: skip
CPU = torch.device("cpu")


def pair(**changes):
    """Trainables of two experts with unlike weights."""
    high, low = models.video_model("i2v_a14b"), models.video_model("i2v_a14b")
    for parameter in low.dit.parameters():
        parameter.data *= 1.1
    experts = (Expert(high.dit, 1000 * BOUNDARY), Expert(low.dit))
    settings = models.config(**{"lora_base_model": "dit", **changes})
    return prepare(replace(high, experts=experts), settings)


def gradients(found, expert):
    latents, _, cond = models.inputs("i2v_a14b")
    noising = Objective().draw(latents.shape[1:], 0, 0, [0, 1])
    found.module(latents, noising, cond, expert=expert).sum().backward()
    grads = {name: p.grad.clone() for name, p in found.parameters().items() if p.grad is not None}
    found.module.zero_grad()
    return grads


def folder(shared, variant="i2v_pair"):
    """The pair's files, written with the first run's configuration."""
    config(shared, shared / "unused", variant)
    return shared / "models" / PAIRS[variant]


@pytest.mark.parametrize("boundary", [0.875, 0.9, 0.0, 1.0])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
def test_the_expert_of_a_timestep_is_that_of_a_run(boundary, shift):
    objective = Objective(shift=shift, boundary=boundary)
    experts = (Expert(None, 1000 * boundary), Expert(None))
    timesteps = (1000 * objective.sigmas).tolist()
    found = [objective.expert_of(timestep) for timestep in timesteps]
    assert found == [expert_at(experts, timestep) for timestep in timesteps]
    assert found.count(0) == round(1000 * expert_range(True, boundary, shift)[1])


def test_a_sample_trains_the_expert_of_its_timestep():
    objective = Objective(boundary=BOUNDARY)
    positions = range(40)
    drawn = [objective.draw((16, 1, 2, 2), 3, 1, [position]).timesteps.item() for position in positions]
    experts = objective.experts(3, 1, positions)
    assert experts == [0 if timestep >= 900 else 1 for timestep in drawn] and set(experts) == {0, 1}
    assert Objective().experts(3, 1, positions) == [0] * 40


@pytest.mark.parametrize("mode", ["own", "full"])
def test_a_pass_gives_the_gradients_of_its_expert_alone(mode):
    """The same as of that expert as a model of its own."""
    found = pair(**MODES[mode])
    for number, owner in enumerate(("dit", "dit2")):
        single = pair(**MODES[mode])
        alone = replace(single.model, experts=(Expert(single.module.experts[number]),))
        expected = gradients(replace(single, module=type(single.module)([alone.experts[0].dit])), 0)
        seen = gradients(found, number)
        assert seen and all(name.startswith(f"{owner}.") for name in seen)
        named = {name.replace(f"{owner}.", "dit.", 1): grad for name, grad in seen.items()}
        assert named.keys() == expected.keys()
        assert all(torch.equal(grad, expected[name]) for name, grad in named.items())


def test_a_shared_lora_is_one_set_of_weights_that_both_experts_train():
    found = pair(expert_loras="shared")
    assert len(found.parts) == 1 and found.parts[0].expert is None
    names = {*found.parameters()}
    assert names == {*found.parts[0].parameter_names()} and len(names) == len(pair().parameters()) / 2
    first, second = gradients(found, 0), gradients(found, 1)
    assert first.keys() == second.keys() == names
    assert any(not torch.equal(first[name], second[name]) for name in names)


@pytest.mark.parametrize(
    ("variant", "mode"), [("i2v_pair", "own"), ("i2v_pair", "shared"), ("i2v_pair", "full"), ("vace_pair", "own")]
)
def test_a_run_of_both_saves_what_inference_reads_as_a_pair(shared, tmp_path, variant, mode):
    run(config(shared, tmp_path, variant, validation_clips=1, validate_steps=1, dataset_repeat=4, **MODES[mode]))
    assert len(losses(tmp_path)) == 4
    drawn = [t for event in events(tmp_path) for t in event["timesteps"]]
    assert min(drawn) < 875 and max(drawn) > 900, "both were trained"
    (held_out, *_) = events(tmp_path, "validation")
    assert min(map(float, held_out["by_timestep"])) < 875 < 900 <= max(map(float, held_out["by_timestep"]))
    experts = experts_of(inspect_experts(folder(shared, variant)))
    model = load_dit(experts, DiTSettings(dtype=torch.float32), "cpu")
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    if mode == "shared":
        assert files == ["epoch-0.safetensors"]
        changed, report = model.with_lora(tmp_path / "epoch-0.safetensors")
        assert not any("noise" in note for note in report.notes)
    else:
        assert list(find_pairs(files)) == ["epoch-0.{high,low}_noise.safetensors"]
        assert resolve_pair(tmp_path / "epoch-0.low_noise.safetensors")[0].name == "epoch-0.high_noise.safetensors"
        changed, reports = model.with_lora_pair(tmp_path)
        assert not any("noise" in note for report in reports for note in report.notes)
        states = [load_file(tmp_path / name) for name in files]
        assert any(not torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert [len(expert.loras) for expert in changed.experts] == [1, 1]


def test_equal_experts_with_one_lora_are_one_model(shared, tmp_path):
    """Losses and weights, bit for bit, of a run that knows no experts."""
    place = tmp_path / "models"
    for expert in ("high", "low"):
        shutil.copytree(folder(shared) / "high_noise_model", place / f"{expert}_noise_model")
    encoders = [f"{catalog.TINY}:{name}" for name in (catalog.TEXT_ENCODER_PATTERN, catalog.VAE_PATTERN)]
    experts = [(str(place / f"{expert}_noise_model" / catalog.DIT_FILE),) for expert in ("high", "low")]
    more = dict(model_id_with_origin_paths=tuple(encoders), dataset_repeat=3, learning_rate=1e-2)
    both, one = tmp_path / "both", tmp_path / "one"
    run(config(shared, both, "i2v_pair", model_paths=tuple(experts), expert_loras="shared", **more))
    run(config(shared, one, "i2v_pair", model_paths=tuple(experts[:1]), **more))
    assert losses(both) == losses(one) and len(losses(one)) == 6
    expected, found = (load_file(out / "epoch-0.safetensors") for out in (one, both))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_streaming_one_expert_at_a_time_changes_nothing(shared, tmp_path):
    more = dict(dataset_repeat=2, gradient_accumulation_steps=4, learning_rate=1e-3)
    plain, other = tmp_path / "plain", tmp_path / "other"
    for out, streams in ((plain, False), (other, True)):
        samples = dict(sample_steps=1, sample_inference_steps=2) if streams else {}
        run(config(shared, out, "i2v_pair", max_steps=1, stream_base=streams, **samples, **more))
    assert losses(plain) == losses(other) and len(events(other, "sample")) == 1
    for side in ("high", "low"):
        first, second = (load_file(out / f"epoch-0.{side}_noise.safetensors") for out in (plain, other))
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_one_expert_at_a_time_is_on_the_device():
    found = pair(stream_base=True)
    dits = found.module.experts

    def at_work():
        return [WeightProvider.of(dit).at_work for dit in dits]

    with FrozenWeights(found.module, models.config(lora_base_model="dit", stream_base=True), CPU) as frozen:
        for expert, expected in ((0, [True, False]), (1, [False, True]), (1, [False, True]), (0, [True, False])):
            frozen.bring(expert)
            assert at_work() == expected
        frozen.leave()
        assert at_work() == [False, False]
        frozen.bring(1)
    assert at_work() == [False, False]


def test_a_streamed_pair_is_counted_as_one_expert():
    found, single = pair(), models.trainables("i2v_a14b", lora_base_model="dit")
    assert isinstance(single.model, VideoModel)
    streamed, resident = (models.config(lora_base_model="dit", stream_base=stream) for stream in (True, False))
    shape = (16, *models.SIZE)
    both, one = Estimator(found, [shape]), Estimator(single, [shape])
    assert both.needs(streamed).frozen == one.needs(streamed).frozen
    assert both.needs(resident).frozen == 2 * one.needs(resident).frozen
    assert both.needs(streamed).trained == 2 * one.needs(streamed).trained
    assert both.needs(streamed).activations == pytest.approx(one.needs(streamed).activations, rel=0.01)


def test_a_pair_of_loras_is_continued_from_its_files(shared, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    more = dict(dataset_repeat=2, learning_rate=1e-2)
    run(config(shared, first, "i2v_pair", **more))
    begun = str(first / "epoch-0.{high,low}_noise.safetensors")
    run(config(shared, second, "i2v_pair", lora_checkpoint=begun, max_steps=1, dataset_repeat=2, learning_rate=0.0))
    for side in ("high", "low"):
        made, kept = (
            load_file(first / f"epoch-0.{side}_noise.safetensors"),
            load_file(second / f"step-1.{side}_noise.safetensors"),
        )
        assert all(relative_error(kept[name], tensor) < 1e-6 for name, tensor in made.items() if tensor.any())


def test_a_run_starts_from_what_a_pair_learned(shared, tmp_path):
    """Each expert gets the weights of its own file: both of them were multiplied."""
    files = {}
    for factor, side in ((2.0, "high"), (3.0, "low")):
        weights = load_file(folder(shared) / f"{side}_noise_model" / catalog.DIT_FILE)
        files[side] = {name: factor * tensor for name, tensor in weights.items()}
        save_file(files[side], tmp_path / f"mine_{side}_noise.safetensors")
    settings = config(
        shared, tmp_path / "out", "i2v_pair", resume_from_checkpoint=str(tmp_path / "mine_{high,low}_noise.safetensors")
    )
    found = load.find(settings)
    model = found.load_dit(torch.float32, "cpu")
    load.change_weights(model, settings)
    for number, side in enumerate(("high", "low")):
        changed = dict(model.expert_dit(number).named_parameters())
        assert all(relative_error(changed[name], tensor) < 1e-6 for name, tensor in files[side].items() if tensor.any())


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("i2v_pair", dict(max_timestep_boundary=0.3), "leave one of them out"),
        ("i2v_a14b", dict(expert_loras="shared"), "is for both experts of a pair"),
        ("i2v_a14b", dict(lora_checkpoint="{high,low}.safetensors"), "does not exist"),
    ],
)
def test_what_is_not_for_both_experts_is_refused(shared, tmp_path, variant, changes, message):
    with pytest.raises(ValueError, match=message):
        run(config(shared, tmp_path, variant, **changes))


@pytest.mark.parametrize("mode", ["own", "shared"])
def test_a_pair_is_not_sharded(mode):
    class Sharded:
        distributed_type = next(iter(sharding.SHARDED_MODELS))
        device = CPU

    settings = TrainConfig(lora_base_model="dit", expert_loras=mode)
    with pytest.raises(ValueError, match="not trained with FSDP"):
        sharding.set_up(Sharded(), pair(**MODES[mode]), settings)


def test_samples_of_one_batch_train_one_expert(shared):
    settings = config(shared, shared / "unused", "i2v_pair", batch_size=2, dataset_repeat=20)
    data = dataset.load(settings)
    rows = report.check(data, settings).rows
    made = Examples(rows, load.find(settings), None, settings)
    plan = Plan(settings, made.shapes, shapes_change=made.shapes_change)
    experts = made.models.objective(settings).experts(settings.seed, 0, range(40))
    groups = [batch for step in plan.steps() for batch in step.batches]
    assert sorted(position for group in groups for position in group) == list(range(40))
    assert all(len({experts[position] for position in group}) == 1 for group in groups)
    assert {len(group) for group in groups} <= {1, 2} and len(set(experts)) == 2
    assert made.shapes(0) != made.shapes(1)
