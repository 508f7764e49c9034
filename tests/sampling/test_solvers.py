"""Every solver against the published ones, and against flows whose end is known."""

import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from tests.reference import relative_error
from wan_core.runtime import Runtime
from wan_core.sampling.run import denoise
from wan_core.sampling.solvers import SOLVERS, Euler, build_solver
from wan_core.settings import SOLVER_NAMES, SamplerSettings
from wan_core.types import Conditioning

RUNTIME = Runtime(device=torch.device("cpu"), dtype=torch.float32)
SHAPE = (1, 16, 2, 4, 4)
PUBLISHED = {
    "unipc": lambda **options: UniPCMultistepScheduler(solver_order=2, solver_type="bh2", **options),
    "dpm++": lambda **options: DPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++", **options),
}


def curved(x: torch.Tensor, t: float) -> torch.Tensor:
    """A velocity that bends with place and time, like a model's."""
    return torch.sin(x * 1.3 + t / 700) - 0.4 * x * math.cos(t / 300)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("name", PUBLISHED)
def test_multistep_solvers_equal_diffusers(name, shift, steps):
    published = PUBLISHED[name](prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    published.set_timesteps(steps)
    solver = build_solver(SamplerSettings(solver=name, sigmas=tuple(published.sigmas.double().tolist())))
    assert solver.timesteps == pytest.approx(published.timesteps.tolist(), abs=1)  # cut off after another rounding
    x = expected = torch.randn(SHAPE)
    for index, t in enumerate(published.timesteps):
        expected = published.step(curved(expected, t.item()), t, expected).prev_sample
        x = solver.step(curved(x, t.item()), index, x)
        assert relative_error(x, expected) < 1e-5


def test_unipc_has_the_schedule_of_its_authors():
    solver = build_solver(SamplerSettings(solver="unipc", steps=50, shift=5.0))
    u = 0.999 * 49 / 50
    assert solver.sigmas[0] == pytest.approx(5 * 0.999 / (1 + 4 * 0.999), abs=1e-12)
    assert solver.sigmas[1] == pytest.approx(5 * u / (1 + 4 * u), abs=1e-12)
    assert solver.sigmas[-1] == 0
    assert solver.timesteps[:2] == [999.0, 995.0]
    assert all(t == int(t) for t in solver.timesteps)
    assert build_solver(SamplerSettings(solver="unipc", denoise=0.5, shift=1.0)).sigmas[0] == 0.5


@pytest.mark.parametrize("sigmas", [None, (1.0, 0.6, 0.35, 0.0), (0.8, 0.2, 0.1), (1.0, 0.0)])
@pytest.mark.parametrize("name", SOLVER_NAMES)
def test_every_solver_recovers_a_straight_flow(name, sigmas):
    clean, noise = torch.randn(2, *SHAPE)
    solver = build_solver(SamplerSettings(solver=name, steps=7, sigmas=sigmas, seed=3))
    x = torch.lerp(clean, noise, solver.sigmas[0])

    def straight(x, t, cond, info):
        return (x - clean) / solver.sigmas[info.index]

    out = denoise(straight, solver, x, Conditioning(), RUNTIME)
    remaining = solver.sigmas[-1]
    if remaining == 0:
        assert torch.allclose(out, clean, atol=2e-5)
    elif name != "lcm":
        assert torch.allclose(out, torch.lerp(clean, noise, remaining), atol=2e-5)


@pytest.mark.parametrize("name", ["unipc", "dpm++"])
def test_higher_orders_err_less_than_euler(name):
    x = torch.randn(SHAPE)

    def run(name, steps):
        solver = build_solver(SamplerSettings(solver=name, steps=steps, shift=1.0, sigmas=None))
        solver.timesteps = [sigma * 1000 for sigma in solver.sigmas[:-1]]
        return denoise(lambda x, t, *_: curved(x, t), solver, x, Conditioning(), RUNTIME)

    exact = run("euler", 4000)
    assert relative_error(run(name, 20), exact) < 0.5 * relative_error(run("euler", 20), exact)


def test_lcm_draws_noise_of_the_run():
    x, velocity = torch.randn(2, *SHAPE)
    first, again, other = (SOLVERS["lcm"]([1.0, 0.5, 0.0], seed=seed).step(velocity, 0, x) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    noise = (first - 0.5 * (x - velocity)) / 0.5
    assert noise.std().item() == pytest.approx(1, abs=0.15)


def test_euler_moves_along_the_velocity():
    solver = Euler([1.0, 0.4, 0.0])
    assert torch.allclose(solver.step(torch.full((2,), 2.0), 0, torch.zeros(2)), torch.full((2,), -1.2))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sigmas": (0.5,)}, "at least two falling"),
        ({"sigmas": (0.5, 0.7, 0.0)}, "at least two falling"),
        ({"sigmas": (1.5, 0.0)}, "sigmas must be from 0 to 1"),
        ({"steps": 4, "start_step": 4}, "start_step must be"),
        ({"steps": 4, "end_step": 5}, "end_step must be"),
        ({"steps": 4, "start_step": 2, "end_step": 2}, "start_step must be"),
    ],
)
def test_schedules_that_cannot_run_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        SamplerSettings(**values)
