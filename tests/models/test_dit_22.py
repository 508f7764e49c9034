"""The Wan 2.2 DiTs against the published code: a timestep for each frame or token, and what these must not change."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tests.lora.fixtures import streaming
from tests.reference import ALL_DITS, filled, load_case, relative_error
from wan_core.models import fused
from wan_core.models.dit import WanDiT
from wan_core.models.fused import MOST_PIECES, TokenRows
from wan_core.types import Conditioning

CASES = {
    "ti2v_5b_scalar": "ti2v_5b", "ti2v_5b_first_frame": "ti2v_5b", "ti2v_5b_per_token": "ti2v_5b",
    "ti2v_5b_batch": "ti2v_5b", "fun_5b_inp": "fun_5b_inp", "fun_5b_control": "fun_5b_control",
    "fun_5b_camera": "fun_5b_camera", "fun_a14b_control": "fun_a14b_control", "fun_a14b_camera": "fun_a14b_camera",
}  # fmt: skip
SIZE = (3, 8, 12)


def with_timesteps(cond: Conditioning, times: torch.Tensor, grid: tuple[int, int, int]) -> Conditioning:
    """`cond` whose tokens (F, rows, columns) have `times` (B, S), at timestep 1000."""
    columns, index = torch.unique(times, dim=1, return_inverse=True)
    index = index.view(1, *grid).expand(len(times), -1, -1, -1)
    return dataclasses.replace(cond, timestep_factors=columns / 1000, timestep_index=index)


def case_inputs(name):
    """A case as (model, latents, timestep, conditioning, expected output)."""
    case, dit = load_case(f"dit_{name}"), filled(WanDiT, ALL_DITS[CASES[name]])
    text = F.pad(case["context"], (0, 0, 0, 512 - case["context"].shape[1]))
    reference = case.get("reference_latents")
    cond = Conditioning(text=text, concat=case.get("y"), camera=case.get("camera"), reference=reference)
    latents, time = case["latents"], case["timestep"]
    if time.ndim == 2:
        frames, height, width = latents.shape[2:]
        cond = with_timesteps(cond, time, (frames, height // 2, width // 2))
        time = torch.full((len(latents),), 1000.0)
    return dit, latents, time, cond, case["output"]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_equals_the_published_code(name):
    dit, latents, time, cond, expected = case_inputs(name)
    assert relative_error(dit(latents, time, cond), expected) < 1e-5


@pytest.fixture(scope="module")
def dit():
    return filled(WanDiT, ALL_DITS["ti2v_5b"])


def inputs(batch=1):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 48, *SIZE, generator=generator)
    return x, Conditioning(text=torch.randn(batch, 16, 64, generator=generator))


@torch.no_grad()
def test_one_timestep_everywhere_is_the_plain_call(dit):
    x, cond = inputs()
    plain = dit(x, torch.tensor([437.0]), cond)
    everywhere = cond.with_clean_frames(torch.zeros(1, 48, 0, 8, 12), SIZE[0])
    assert relative_error(dit(x, torch.tensor([437.0]), everywhere), plain) < 1e-6  # embedded beside another row
    by_token = with_timesteps(cond, torch.full((1, 72), 437.0), (3, 4, 6))
    assert relative_error(dit(x, torch.tensor([1000.0]), by_token), plain) < 1e-6


@torch.no_grad()
def test_a_timestep_per_frame_is_the_same_for_each_of_its_tokens(dit):
    x, cond = inputs()
    time = torch.tensor([700.0])
    frames = cond.with_clean_frames(x[:, :, :2], SIZE[0])
    index = frames.timestep_index.expand(-1, -1, 4, 6).contiguous()
    tokens = dataclasses.replace(frames, timestep_index=index)
    assert torch.equal(dit(x, time, frames), dit(x, time, tokens))
    assert relative_error(dit(x, time, frames), dit(x, time, cond)) > 1e-3


@torch.no_grad()
def test_many_runs_of_tokens_equal_a_timestep_for_each(dit):
    """Rows that most tokens read apart from their neighbours are gathered, in pieces."""
    x, cond = inputs(batch=2)
    times = torch.where(torch.arange(72) % 3 == 0, 200.0, 600.0).expand(2, -1)
    mixed = with_timesteps(cond, times, (3, 4, 6))
    rows = TokenRows.of(mixed.timestep_index[0].flatten(), x.device)
    assert isinstance(rows.pieces[0][1], torch.Tensor) and MOST_PIECES < 72
    got = dit(x, torch.full((2,), 1000.0), mixed)
    # A token's own number: the result must not change when the table holds a row for every token.
    factors = times / 1000
    apart = dataclasses.replace(
        mixed, timestep_factors=factors, timestep_index=torch.arange(72).view(1, 3, 4, 6).expand(2, -1, -1, -1)
    )
    assert torch.equal(dit(x, torch.full((2,), 1000.0), apart), got)


@pytest.mark.parametrize("name", ["ti2v_5b_first_frame", "fun_5b_control"])
def test_gradients_on_gives_the_same_output_and_a_gradient(name):
    dit, latents, time, cond, expected = case_inputs(name)
    dit.requires_grad_(True)
    out = dit(latents.requires_grad_(), time, cond)
    assert relative_error(out, expected) < 1e-5
    out.square().mean().backward()
    assert latents.grad.abs().sum() > 0 and all(p.grad is not None for p in dit.parameters())


@pytest.mark.parametrize("name", ["ti2v_5b_first_frame", "fun_5b_camera"])
@torch.no_grad()
def test_streamed_blocks_give_the_same_bits(name):
    dit, latents, time, cond, _ = case_inputs(name)
    plain = dit(latents, time, cond)
    with streaming(dit):
        assert torch.equal(dit(latents, time, cond), plain)


@torch.no_grad()
def test_no_table_is_as_long_as_the_sequence(dit, monkeypatch):
    """Two timesteps cost two rows, however many tokens have them."""
    x, cond = inputs()
    cond = cond.with_clean_frames(x[:, :, :1], SIZE[0])
    seen = []
    eager = fused.norm_modulate_

    def look(x, shift, scale, *others):
        seen.append((tuple(shift.shape), len(others[-1].pieces)))
        return eager(x, shift, scale, *others)

    monkeypatch.setattr(dit, "fused", dataclasses.replace(fused.EAGER, norm_modulate=look))
    dit(x, torch.tensor([700.0]), cond)
    assert set(seen) == {((1, 2, 256), 2)}


@torch.no_grad()
def test_the_plain_forms_of_the_steps_read_the_same_rows():
    """What `torch.compile` fuses indexes the table; the eager forms go piece by piece."""
    generator = torch.Generator().manual_seed(0)
    x, update = (torch.randn(2, 40, 32, generator=generator) for _ in range(2))
    shift, scale = (torch.randn(2, 3, 32, generator=generator) for _ in range(2))
    for index in (torch.arange(40) // 15, torch.arange(40) % 3):
        rows = TokenRows.of(index, x.device)
        for dtype in (torch.float32, torch.bfloat16):
            pair = [fused.norm_modulate(x, shift, scale, 1e-6, dtype, index)]
            pair.append(fused.norm_modulate_(x.clone(), shift, scale, 1e-6, dtype, rows))
            assert relative_error(*pair) < (1e-6 if dtype == torch.float32 else 1e-2)
        pair = [fused.gated_add(x, update, shift, index), fused.gated_add_(x.clone(), update, shift, rows)]
        assert relative_error(*pair) < 1e-6


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (1, 3, 4, 5)])
def test_an_index_that_does_not_fit_is_named(dit, shape):
    x, cond = inputs()
    cond = dataclasses.replace(
        cond, timestep_factors=torch.ones(1, 1), timestep_index=torch.zeros(shape, dtype=torch.long)
    )
    with pytest.raises(ValueError, match="timestep_index should be"):
        dit(x, torch.tensor([1.0]), cond)


@pytest.mark.parametrize("name", ["ti2v_5b_per_token", "fun_5b_control"])
@torch.no_grad()
def test_compiled_steps_read_the_same_rows(name):
    dit, latents, time, cond, expected = case_inputs(name)
    dit.fused = fused.compiled("aot_eager")
    assert relative_error(dit(latents, time, cond), expected) < 1e-5
