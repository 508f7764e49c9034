import pytest
import torch

from tests.reference import load_case, relative_error
from wan_core.types import Conditioning
from wancore.trainer.data.conditions import EncodedSample
from wancore.trainer.objective import Objective, errors, generator_for, noisy, weighted
from wancore.trainer.run.validate import held_out_errors

SHAPE = (16, 2, 4, 4)


@pytest.mark.parametrize(("name", "shift"), [("schedule_50_5.0_1.0", 5.0), ("schedule_20_3.0_1.0", 3.0)])
def test_weights_are_those_of_the_reference(name, shift):
    assert relative_error(Objective(shift=shift).weights, load_case(name)["training_weights"]) < 1e-4


def test_schedule_is_that_of_the_sampler():
    sigmas = Objective(shift=5.0).sigmas
    u = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    assert torch.allclose(sigmas.double(), 5 * u / (1 + 4 * u), atol=1e-6)
    assert sigmas[0] == 1


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_a_sample_draws_the_same_in_any_batch(sampling):
    objective = Objective(sampling=sampling)
    alone = [objective.draw(SHAPE, 7, 1, [p]) for p in (0, 1, 2)]
    together = objective.draw(SHAPE, 7, 1, [2, 0, 1])
    for name in ("noise", "sigmas", "timesteps", "weights"):
        expected = torch.cat([getattr(alone[p], name) for p in (2, 0, 1)])
        assert torch.equal(getattr(together, name), expected)


@pytest.mark.parametrize("changed", [(8, 1, 0), (7, 2, 0), (7, 1, 1)])
def test_seed_epoch_and_position_all_matter(changed):
    objective = Objective()
    seed, epoch, position = changed
    first, second = objective.draw(SHAPE, 7, 1, [0]), objective.draw(SHAPE, seed, epoch, [position])
    correlation = torch.corrcoef(torch.stack((first.noise.flatten(), second.noise.flatten())))[0, 1]
    assert correlation.abs() < 0.2


def indices(objective, count=4000):
    found = [objective._index(generator_for("test", 0, 0, i)) for i in range(count)]
    return torch.tensor(found)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.25, 0.5), (0.9, 1.0), (0.0, 0.001)])
def test_indices_stay_inside_the_boundaries_and_reach_them(sampling, low, high):
    found = indices(Objective(sampling=sampling, low=low, high=high), 1000)
    assert found.min() >= int(low * 1000)
    assert found.max() <= max(int(high * 1000) - 1, 0)
    if sampling == "uniform":
        assert found.max() - found.min() >= 0.9 * (int(high * 1000) - 1 - int(low * 1000))


def test_uniform_is_even_and_logit_normal_is_normal_in_the_logit():
    even = indices(Objective()).double()
    assert abs(even.mean() - 499.5) < 20 and abs(even.std() - 288.7) < 10
    logits = torch.logit(1 - (indices(Objective(sampling="logit_normal")).double() + 0.5) / 1000)
    assert abs(logits.mean()) < 0.06 and abs(logits.std() - 1) < 0.05


def test_half_of_a_logit_normal_is_cut_not_moved():
    whole = indices(Objective(sampling="logit_normal"))
    expected = whole[whole < 500].double()
    found = indices(Objective(sampling="logit_normal", high=0.5)).double()
    assert abs(found.mean() - expected.mean()) < 8 and abs(found.std() - expected.std()) < 8


def test_loss_is_the_weighted_error_of_the_velocity():
    objective = Objective()
    latents = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    draw = objective.draw(SHAPE, 0, 0, [0, 1])
    x = noisy(latents, draw)
    sigma = draw.sigmas.reshape(-1, 1, 1, 1, 1)
    velocity = (x - latents) / sigma
    assert errors(velocity, latents, draw).max() < 1e-8
    off = errors(velocity + torch.tensor([1.0, 2.0]).reshape(-1, 1, 1, 1, 1), latents, draw)
    assert torch.allclose(off, torch.tensor([1.0, 4.0]), atol=1e-4)
    assert torch.allclose(weighted(off, draw), off * draw.weights)


def test_errors_are_float32_whatever_the_model_gives():
    draw = Objective().draw(SHAPE, 0, 0, [0])
    found = errors(torch.zeros(1, *SHAPE, dtype=torch.bfloat16), torch.zeros(1, *SHAPE), draw)
    assert found.dtype == torch.float32
    assert torch.allclose(found, draw.noise.square().mean().reshape(1))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 1.0, (0, 1000)), (0.0, 0.417, (874.85, 1000)), (0.417, 1.0, (0, 874.85)), (0.25, 0.5, (833.33, 937.5))],
)
def test_the_loss_on_held_out_clips_is_measured_where_is_trained(low, high, expected):
    objective = Objective(low=low, high=high)
    assert objective.timestep_range == pytest.approx(expected, abs=0.01)
    sample = EncodedSample(
        latents=torch.zeros(SHAPE), cond=Conditioning(text=torch.zeros(1, 2, 8)), caption="", position=0, name="a"
    )
    seen = held_out_errors(
        lambda latents, noising, *_, expert: noising.timesteps, [sample], torch.device("cpu"), objective
    )
    assert list(seen) == pytest.approx(list(seen.values()), abs=1e-3)
    bottom, top = objective.timestep_range
    assert list(seen) == pytest.approx([bottom + place * (top - bottom) for place in (0.1, 0.3, 0.5, 0.7, 0.9)])
