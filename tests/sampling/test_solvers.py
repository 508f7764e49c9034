"""Every solver against the published ones, and against flows whose end is known."""

import dataclasses
import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from tests.reference import load_case, relative_error
from tests.sampling.runs import sample
from tests.sampling.variants import SMALL, conditioning, small_dit
from wan_core.cache_settings import TeaCacheSettings
from wan_core.runtime import Runtime
from wan_core.sampling.compose import build_solver
from wan_core.sampling.run import denoise
from wan_core.sampling.solvers import SOLVERS, Euler, Heun
from wan_core.settings import GuidanceSettings, SamplerSettings
from wan_core.types import Conditioning, LatentSize

RUNTIME = Runtime(device=torch.device("cpu"), dtype=torch.float32)
SHAPE = (1, 16, 2, 4, 4)
SIZE = LatentSize(2, 4, 4)
PUBLISHED = {
    "unipc": lambda **options: UniPCMultistepScheduler(solver_order=2, solver_type="bh2", **options),
    "dpm++": lambda **options: DPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++", **options),
    "dpm++_sde": lambda **options: DPMSolverMultistepScheduler(
        solver_order=2, algorithm_type="sde-dpmsolver++", **options
    ),
}
DRAW_NOISE = {"lcm", "euler_ancestral", "dpm++_sde", "er_sde"}
"""Their path is not that of the flow; only where it ends is."""


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
    fresh = {"variance_noise": torch.randn(SHAPE)} if name in DRAW_NOISE else {}
    solver.noise = lambda index, x: fresh["variance_noise"]
    for index, t in enumerate(published.timesteps):
        expected = published.step(curved(expected, t.item()), t, expected, **fresh).prev_sample
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


COMFYUI = load_case("solvers_comfyui")
SOLVERS_OF_COMFYUI = ("euler_ancestral", "res_multistep", "er_sde", "lcm", "heun")


@pytest.mark.parametrize("schedule", ["4", "6", "part"])
@pytest.mark.parametrize("name", SOLVERS_OF_COMFYUI)
def test_solvers_give_the_values_of_comfyui(name, schedule):
    sigmas, noise = COMFYUI[f"sigmas.{schedule}"], COMFYUI[f"noise.{schedule}"]
    solver = build_solver(SamplerSettings(solver=name, sigmas=tuple(sigmas.tolist())))
    solver.noise = lambda index, x: noise[index]
    out = denoise(lambda x, t, *_: curved(x, t), solver, COMFYUI["x"], Conditioning(), RUNTIME)
    assert relative_error(out, COMFYUI[f"{name}.{schedule}"]) < 1e-5


SCHEDULES = load_case("schedules22")


@pytest.mark.parametrize("name", [name for name in SCHEDULES.tensors if name.endswith("_t")])
def test_schedules_are_those_of_the_authors_of_wan_22(name):
    solver, steps, shift, _ = name.split("_")
    built = build_solver(SamplerSettings(solver=solver, steps=int(steps), shift=float(shift)))
    timesteps, sigmas = SCHEDULES[name], SCHEDULES.get(f"{name[:-2]}_sigma")
    assert built.timesteps == pytest.approx(timesteps.tolist(), abs=1e-3)
    if sigmas is not None:
        assert built.timesteps == timesteps.tolist()
        assert built.sigmas == pytest.approx(sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize("sigmas", [None, (1.0, 0.6, 0.35, 0.0), (0.8, 0.2, 0.1), (1.0, 0.0)])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_recovers_a_straight_flow(name, sigmas):
    clean, noise = torch.randn(2, *SHAPE)
    solver = build_solver(SamplerSettings(solver=name, steps=7, sigmas=sigmas, seed=3))
    x = torch.lerp(clean, noise, solver.sigmas[0])

    def straight(x, t, cond, info):
        return (x - clean) / solver.levels(info.index)[info.evaluation]

    out = denoise(straight, solver, x, Conditioning(), RUNTIME)
    remaining = solver.sigmas[-1]
    if remaining == 0:
        assert torch.allclose(out, clean, atol=2e-5)
    elif name not in DRAW_NOISE:
        assert torch.allclose(out, torch.lerp(clean, noise, remaining), atol=2e-5)


MEAN, SPREAD = 0.7, 0.4


def velocity_to_a_bell(x, t):
    """The velocity of the flow from noise to normal numbers of mean 0.7 and standard deviation 0.4."""
    sigma = t / 1000
    rest, variance = x - (1 - sigma) * MEAN, ((1 - sigma) * SPREAD) ** 2 + sigma**2
    clean = MEAN + (1 - sigma) * SPREAD**2 / variance * rest
    return sigma / variance * rest - clean


def follow(velocity, solver, x):
    solver.evaluations = [  # no solver's own rounding of timesteps
        tuple(1000 * sigma for sigma in solver.levels(index)) for index in range(len(solver.sigmas) - 1)
    ]
    return denoise(lambda x, t, *_: velocity(x, t), solver, x, Conditioning(), RUNTIME)


def error_of(name, steps):
    """The relative error of a run from sigma 0.9 to 0.4.

    Against the end of the flow to a bell, which is known; of a solver that leaves the flow, with its fresh noise left
    out and against a fine run.
    """
    x, velocity = torch.linspace(-2, 2, 9, dtype=torch.float64), curved if name in DRAW_NOISE else velocity_to_a_bell

    def run(steps):
        sigmas = torch.linspace(0.9, 0.4, steps + 1, dtype=torch.float64)
        solver = build_solver(SamplerSettings(solver=name, sigmas=tuple(sigmas.tolist())))
        solver.noise = lambda index, x: torch.zeros_like(x)
        return follow(velocity, solver, x)

    deviation = [math.hypot((1 - sigma) * SPREAD, sigma) for sigma in (0.9, 0.4)]
    exact = 0.6 * MEAN + deviation[1] / deviation[0] * (x - 0.1 * MEAN)
    return ((run(steps) - (run(1024) if name in DRAW_NOISE else exact)).norm() / exact.norm()).item()


ORDERS = {
    "euler": 1, "heun": 2, "unipc": 2, "dpm++": 2, "res_multistep": 2, "euler_ancestral": 1, "dpm++_sde": 2,
    "er_sde": 2,  # its first step is of order 1
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_halving_the_steps_divides_the_error_as_the_order_says(name):
    order = math.log2(error_of(name, 32) / error_of(name, 64))
    assert order == pytest.approx(ORDERS[name], abs=0.2)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "lcm"])  # right for distilled models only
def test_every_solver_ends_at_the_numbers_that_the_flow_leads_to(name):
    solver = build_solver(SamplerSettings(solver=name, steps=200, shift=2.0, seed=5))
    out = follow(velocity_to_a_bell, solver, torch.randn(1, 16, 8, 16, 16))
    assert out.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert out.std().item() == pytest.approx(SPREAD, abs=0.015)


@pytest.mark.parametrize("name", sorted(DRAW_NOISE))
def test_noise_is_that_of_the_run(name):
    x, velocity = torch.randn(2, *SHAPE)
    first, again, other = (SOLVERS[name]([0.9, 0.5, 0.0], seed=seed).step(velocity, 0, x) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    solver = SOLVERS[name]([0.9, 0.5, 0.0], seed=1)
    assert solver.noise(0, x).std().item() == pytest.approx(1, abs=0.15)
    assert not torch.equal(solver.noise(0, x), solver.noise(1, x))


def test_heun_takes_the_mean_of_both_ends_and_ends_with_a_step_of_euler():
    solver, asked = Heun([1.0, 0.4, 0.0]), []

    def evaluate(x, number):
        asked.append((x.clone(), number))
        return torch.full((2,), 1.0)

    out = solver.advance(torch.full((2,), 2.0), 0, torch.zeros(2), evaluate)
    assert torch.allclose(out, torch.full((2,), -0.9))
    assert torch.allclose(asked[0][0], torch.full((2,), -1.2)) and asked[0][1] == 1
    assert solver.evaluations == [(1000.0, 400.0), (400.0,)]
    assert torch.allclose(solver.advance(torch.full((2,), 2.0), 1, out, evaluate), torch.full((2,), -1.7))
    assert len(asked) == 1


@pytest.mark.parametrize("cfg_mode", ["sequential", "batched"])
def test_a_run_with_two_evaluations_counts_steps(cfg_mode):
    """Progress, LoRA strengths, guidance and caches speak of steps, of which each evaluation is a part."""
    dit, cond = small_dit(), conditioning("t2v", SIZE, models=SMALL)
    cond = dataclasses.replace(cond, motion_bucket=None)
    ran, seen, before = [], [], []
    dit.blocks[0].register_forward_hook(lambda *_: ran.append(0))
    runtime = dataclasses.replace(
        RUNTIME,
        on_progress=lambda phase, done, total, latents: seen.append((done, total)),
        before_step=lambda index, total: before.append((index, total)),
    )

    def run(cache=None):
        ran.clear()
        guidance = GuidanceSettings(scale=3.0, mode=cfg_mode)
        settings = SamplerSettings(solver="heun", steps=5, seed=1, guidance=guidance, cache=cache)
        return sample(dit, cond, SIZE, settings, runtime)

    passes = 1 if cfg_mode == "batched" else 2
    plain = run()
    assert seen == [(step + 1, 5) for step in range(5)] and before == [(step, 5) for step in range(5)]
    assert len(ran) == (2 * 4 + 1) * passes
    template = "Wan2.1-T2V-1.3B"
    assert torch.equal(run(TeaCacheSettings(threshold=0.0, template=template)), plain)
    cached = run(TeaCacheSettings(threshold=1000.0, template=template))
    assert len(ran) == (2 + 1) * passes, "both evaluations of the first step, and the last step"
    assert not torch.equal(cached, plain)


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
