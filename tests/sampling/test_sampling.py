"""Schedule, solver, guidance and loop."""

import dataclasses

import pytest
import torch

from tests.reference import load_case, relative_error, tiny_dit
from tests.sampling.runs import sample
from wan_core.runtime import Cancelled, Runtime
from wan_core.sampling.solvers import add_noise, initial_noise, shifted_sigmas, training_weights
from wan_core.settings import GuidanceSettings, SamplerSettings
from wan_core.types import Conditioning, LatentSize, VaceInput

CPU = torch.device("cpu")
RUNTIME = Runtime(device=CPU, dtype=torch.float32)
SIZE = LatentSize(3, 4, 6)


def conditioning(batch: int = 1, **fields) -> Conditioning:
    generator = torch.Generator().manual_seed(5)
    text, negative = torch.randn(2, batch, 512, 64, generator=generator)
    return Conditioning(text=text, negative_text=negative, **fields)


@pytest.mark.parametrize("name", ["50_5.0_1.0", "20_3.0_1.0", "4_8.0_1.0", "8_5.0_0.6"])
def test_schedule_equals_the_published_one(name):
    case = load_case(f"schedule_{name}")
    steps, shift, strength = (
        int(case.metadata["steps"]),
        float(case.metadata["shift"]),
        float(case.metadata["denoising_strength"]),
    )
    sigmas = shifted_sigmas(steps, shift, strength)
    assert relative_error(sigmas[:-1], case["sigmas"]) < 1e-5
    assert sigmas[-1] == 0
    assert relative_error(sigmas[:-1] * 1000, case["timesteps"]) < 1e-5
    assert relative_error(training_weights(shift), case["training_weights"]) < 1e-4


def test_schedule_numbers():
    sigmas = shifted_sigmas(50, 5.0)
    assert sigmas[0] == 1
    assert sigmas[1].item() == pytest.approx(0.995935, abs=1e-6)
    assert (sigmas.diff() < 0).all()
    weights = training_weights()
    assert weights.mean().item() == pytest.approx(1, abs=1e-5)
    assert weights[0] == 0
    assert weights.max().item() == pytest.approx(2.0764, abs=1e-4)
    assert weights[-1].item() == pytest.approx(0.0319, abs=1e-4)


def test_adding_noise_interpolates():
    clean, noise = torch.zeros(3), torch.ones(3)
    assert torch.equal(add_noise(clean, noise, 0.25), torch.full((3,), 0.25))


def test_noise_on_the_cpu_is_that_of_comfyui():
    expected = torch.randn((1, 16, 3, 4, 6), generator=torch.manual_seed(7))
    assert torch.equal(initial_noise((1, 16, 3, 4, 6), 7, "cpu", CPU), expected)


@pytest.mark.parametrize("references", [1, 2, 5])
def test_noise_with_references_is_one_draw_whose_last_frames_come_first(references):
    """By the reference's formula, `concat(noise[:, :, -r:], noise[:, :, :-r])`."""
    drawn = torch.randn((1, 16, references + 3, 4, 6), generator=torch.manual_seed(7))
    expected = torch.cat((drawn[:, :, -references:], drawn[:, :, :-references]), 2)
    assert torch.equal(initial_noise((1, 16, 3, 4, 6), 7, "cpu", CPU, references), expected)


def run(dit, cond, **changes):
    guidance = changes.pop("guidance", GuidanceSettings())
    return sample(dit, cond, SIZE, SamplerSettings(steps=3, guidance=guidance, **changes), RUNTIME)


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        ("t2v", {}),
        ("vace", {"vace": (VaceInput(context=torch.randn(2, 96, 3, 4, 6)),)}),
        ("i2v", {"image_tokens": torch.randn(2, 257, 1280), "concat": torch.randn(2, 20, 3, 4, 6)}),
    ],
)
def test_cfg_modes_agree(variant, fields):
    dit, cond = tiny_dit(variant), conditioning(2, **fields)
    results = {m: run(dit, cond, guidance=GuidanceSettings(mode=m)) for m in ("sequential", "interleaved", "batched")}
    assert torch.equal(results["sequential"], results["interleaved"])
    assert relative_error(results["batched"], results["sequential"]) < 1e-5


def test_scale_one_runs_one_branch():
    dit, cond = tiny_dit(), conditioning()
    without = dataclasses.replace(cond, negative_text=None)
    one = GuidanceSettings(scale=1.0)
    assert torch.equal(run(dit, cond, guidance=one), run(dit, without, guidance=one))
    assert not torch.equal(run(dit, cond, guidance=one), run(dit, cond))


def test_guidance_is_linear_in_the_scale():
    dit, cond = tiny_dit(), conditioning()
    settings = {s: SamplerSettings(steps=1, guidance=GuidanceSettings(scale=s)) for s in (0.0, 1.0, 3.0)}
    out = {s: sample(dit, cond, SIZE, value, RUNTIME) for s, value in settings.items()}
    assert relative_error(out[3.0], out[0.0] + 3 * (out[1.0] - out[0.0])) < 1e-5


def test_the_seed_decides_and_inputs_are_left_alone():
    dit, cond = tiny_dit(), conditioning()
    copy = cond.map(lambda t, _: t.clone())
    first = run(dit, cond, seed=1)
    assert torch.equal(first, run(dit, cond, seed=1))
    assert not torch.equal(first, run(dit, cond, seed=2))
    assert torch.equal(cond.text, copy.text)
    assert torch.equal(cond.negative_text, copy.negative_text)


def test_partial_denoising_starts_from_the_given_latents():
    dit, cond, start = tiny_dit(), conditioning(), torch.randn(1, 16, *SIZE.shape)

    def partial(strength):
        return sample(dit, cond, SIZE, SamplerSettings(steps=3, denoise=strength), RUNTIME, start)

    assert torch.equal(partial(0.0), start)
    assert torch.equal(partial(1.0), run(dit, cond))
    assert relative_error(partial(0.1), start) < relative_error(partial(0.6), start)


def test_partial_denoising_needs_latents_of_the_right_size():
    with pytest.raises(ValueError, match="give one"):
        run(tiny_dit(), conditioning(), denoise=0.5)
    with pytest.raises(ValueError, match="this run needs"):
        sample(tiny_dit(), conditioning(), SIZE, SamplerSettings(denoise=0.5), RUNTIME, torch.zeros(1, 16, 1, 4, 6))


def test_progress_reports_each_step_with_its_latents():
    seen = []
    runtime = dataclasses.replace(RUNTIME, on_progress=lambda *report: seen.append(report))
    out = sample(tiny_dit(), conditioning(), SIZE, SamplerSettings(steps=3), runtime)
    assert [report[:3] for report in seen] == [("Sampling", i, 3) for i in (1, 2, 3)]
    assert torch.equal(seen[-1][3], out)


def test_cancel_is_honoured_within_a_block():
    checks = []

    def cancel():
        checks.append(None)
        if len(checks) == 7:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        sample(
            tiny_dit(), conditioning(), SIZE, SamplerSettings(), dataclasses.replace(RUNTIME, check_cancelled=cancel)
        )
    assert len(checks) == 7


NAN = float("nan")


@pytest.mark.parametrize(
    ("settings", "values", "words"),
    [
        (SamplerSettings, {"steps": 0}, "steps must be"),
        (SamplerSettings, {"steps": 2.5}, "steps must be"),
        (SamplerSettings, {"shift": NAN}, "shift must be"),
        (SamplerSettings, {"shift": 0.0}, "shift must be"),
        (SamplerSettings, {"denoise": 1.5}, "denoise must be"),
        (SamplerSettings, {"seed": -1}, "seed must be"),
        (SamplerSettings, {"solver": "rk4"}, "solver must be one of euler"),
        (GuidanceSettings, {"scale": NAN}, "cfg_scale must be"),
        (GuidanceSettings, {"scale": "high"}, "cfg_scale must be"),
        (GuidanceSettings, {"mode": "both"}, "cfg mode must be"),
    ],
)
def test_settings_refuse_what_cannot_run(settings, values, words):
    with pytest.raises(ValueError, match=words):
        settings(**values)
