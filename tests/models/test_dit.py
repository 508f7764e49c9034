"""The DiT against the published code, and identities between the ways to run it."""

import pytest
import torch
import torch.nn.functional as F

from tests.reference import DITS, load_case, relative_error, tiny_dit, tiny_motion_controller
from wan_core.models.dit import WanDiT, vace_strengths
from wan_core.types import Conditioning, Curve, VaceInput

CASES = {
    "t2v": "t2v", "i2v": "i2v", "flf2v": "flf2v", "fun_control": "fun_control", "fun_v1_1_control": "fun_v1_1_control",
    "fun_camera": "fun_camera", "vace_scale0.6": "vace", "vace_scale1.0": "vace",
    "t2v_a14b_high": "t2v", "t2v_a14b_low": "t2v", "i2v_a14b_high": "i2v_a14b", "i2v_a14b_low": "i2v_a14b",
}  # fmt: skip


def case_inputs(name: str):
    """A case as (model, latents, timestep, conditioning, expected output)."""
    case = load_case(f"dit_{name}")
    dit = tiny_dit(CASES[name], int(case.metadata.get("weight_seed", 0)))
    inputs = {"image_tokens": case.get("clip_feature"), "concat": case.get("y"), "camera": case.get("camera_embedding")}
    if "reference_latents" in case.tensors:
        inputs["reference"] = case["reference_latents"][:, :, 0]
    if "vace_context" in case.tensors:
        strength = Curve.of(float(case.metadata["vace_scale"]))
        inputs["vace"] = (VaceInput(context=case["vace_context"], strength=strength),)
    text = F.pad(case["context"], (0, 0, 0, 512 - case["context"].shape[1]))
    return dit, case["latents"], case["timestep"], Conditioning(text=text, **inputs), case["output"]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_code(name):
    dit, latents, timestep, cond, expected = case_inputs(name)
    before = latents.clone()
    with torch.no_grad():
        assert relative_error(dit(latents, timestep, cond), expected) < 1e-5
    assert torch.equal(latents, before)


@pytest.mark.parametrize("name", ["t2v", "i2v", "fun_camera", "vace_scale0.6"])
def test_gradients_on_gives_the_same_output_and_a_gradient(name):
    dit, latents, timestep, cond, expected = case_inputs(name)
    dit.requires_grad_(True)
    out = dit(latents.requires_grad_(), timestep, cond)
    assert relative_error(out, expected) < 1e-5
    out.square().mean().backward()
    assert latents.grad.abs().sum() > 0
    assert all(p.grad is not None for p in dit.parameters())


def test_two_states_through_the_blocks_together_equal_each_alone():
    dit, latents, timestep, cond, _ = case_inputs("vace_scale0.6")
    other = Conditioning(text=cond.text.flip(1), vace=cond.vace)
    with torch.no_grad():
        alone = [dit(latents, timestep, c) for c in (cond, other)]
        time = dit.embed_time(timestep)
        size = tuple(latents.shape[2:])
        states = [dit.embed(latents, time, dit.prepare(c, size), vace_strengths(c)) for c in (cond, other)]
        order = []
        dit.run_blocks(states, order.append)
        together = [dit.unembed(state) for state in states]
    assert order == [0, 1, 2, 3]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_prepared_inputs_survive_a_run():
    dit, latents, timestep, cond, expected = case_inputs("vace_scale1.0")
    with torch.no_grad():
        time, prepared = dit.embed_time(timestep), dit.prepare(cond, tuple(latents.shape[2:]))
        for _ in range(2):
            state = dit.embed(latents, time, prepared, [1.0])
            dit.run_blocks([state])
            assert relative_error(dit.unembed(state), expected) < 1e-5


def test_a_batch_equals_its_samples():
    dit, latents, timestep, cond, _ = case_inputs("t2v")
    second = Conditioning(text=cond.text.flip(1))
    batch, times = torch.cat((latents, latents.flip(2))), torch.cat((timestep, timestep / 2))
    with torch.no_grad():
        joined = dit(batch, times, cond.joined(second))
        single = [dit(latents, timestep, cond), dit(latents.flip(2), timestep / 2, second)]
    assert relative_error(joined, torch.cat(single)) < 1e-6


def test_identities_of_the_injection_points():
    """A zero adapter, a zero strength and a zero controller each leave text to video."""
    dit, latents, timestep, cond, _ = case_inputs("vace_scale1.0")
    plain = Conditioning(text=cond.text)
    off = Conditioning(text=cond.text, vace=(VaceInput(context=cond.vace[0].context, strength=Curve.of(0.0)),))
    with torch.no_grad():
        assert torch.equal(dit(latents, timestep, off), dit(latents, timestep, plain))
        controller = tiny_motion_controller()
        for parameter in controller.linear[4].parameters():
            parameter.zero_()
        dit, latents, timestep, cond, _ = case_inputs("t2v")
        assert torch.equal(dit(latents, timestep, cond, controller(torch.tensor([50.0]))), dit(latents, timestep, cond))
        dit, latents, timestep, cond, _ = case_inputs("fun_camera")
        for parameter in dit.control_adapter.parameters():
            parameter.zero_()
        without = Conditioning(text=cond.text, image_tokens=cond.image_tokens, concat=cond.concat)
        assert torch.equal(dit(latents, timestep, cond), dit(latents, timestep, without))


@pytest.mark.parametrize("bucket", [0, 37, 100])
def test_speed_control_equals_the_published_code(bucket):
    case = load_case(f"dit_speed_{bucket}")
    dit, latents, timestep, cond, _ = case_inputs("t2v")
    with torch.no_grad():
        out = dit(latents, timestep, cond, tiny_motion_controller()(torch.tensor([float(bucket)])))
    assert relative_error(out, case["output"]) < 1e-5


def test_what_a_model_expects_and_is_not_given_is_zeros():
    dit, latents, timestep, cond, _ = case_inputs("fun_v1_1_control")
    zeros = Conditioning(
        text=cond.text,
        image_tokens=torch.zeros_like(cond.image_tokens),
        concat=torch.zeros_like(cond.concat),
        reference=torch.zeros_like(cond.reference),
    )
    with torch.no_grad():
        bare = dit(latents, timestep, Conditioning(text=cond.text))
        assert torch.equal(bare, dit(latents, timestep, zeros))
        assert not torch.equal(bare, dit(latents, timestep, cond))


def test_bfloat16_stays_close_and_exact_is_closer():
    dit, latents, timestep, cond, expected = case_inputs("t2v")
    modulation = {n: p.clone() for n, p in dit.named_parameters() if n.endswith("modulation")}
    dit.to(torch.bfloat16)
    for name, value in modulation.items():
        dit.get_parameter(name).data = value
    with torch.no_grad():
        fast = relative_error(dit(latents, timestep, cond), expected)
        dit.exact = True
        exact = relative_error(dit(latents, timestep, cond), expected)
    assert exact < fast < 0.02


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": torch.zeros(1, 512, 32)}, "text embeddings"),
        ({"text": None}, "text embeddings"),
        ({"concat": torch.zeros(1, 20, 3, 8, 10)}, "concat should be"),
        ({"image_tokens": torch.zeros(1, 200, 1280)}, "image_tokens should be"),
        ({"camera": torch.zeros(1, 24, 3, 64, 96)}, "camera should be"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(change, words):
    dit, latents, timestep, cond, _ = case_inputs("i2v")
    values = {"text": cond.text, "image_tokens": cond.image_tokens, "concat": cond.concat, **change}
    with pytest.raises(ValueError, match=words):
        dit(latents, timestep, Conditioning(**values))


def test_odd_latents_are_refused():
    dit, latents, timestep, cond, _ = case_inputs("t2v")
    with pytest.raises(ValueError, match="8x11 cells; both must be multiples"):
        dit(latents[..., :11], timestep, cond)


@pytest.mark.parametrize("variant", DITS)
def test_no_module_of_a_run_keeps_state(variant):
    dit = tiny_dit(variant)
    before = {name: set(vars(module)) for name, module in dit.named_modules()}
    with torch.no_grad():
        dit(torch.zeros(1, 16, 2, 4, 4), torch.tensor([500.0]), Conditioning(text=torch.zeros(1, 4, 64)))
    assert before == {name: set(vars(module)) for name, module in dit.named_modules()}
    assert isinstance(dit, WanDiT)
