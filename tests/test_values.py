"""Sizes, conditioning and tiles."""

import dataclasses

import pytest
import torch

from wan_core import catalog
from wan_core.conditioning.text import clean_prompt
from wan_core.tiling import TiledSum, TileSettings, blend_weights, plan_spans
from wan_core.types import Conditioning, Curve, LatentSize, VaceInput, VideoSize, tensors_in


@pytest.mark.parametrize(
    ("asked", "rounded", "latent"),
    [
        ((832, 480, 81), (832, 480, 81), (21, 60, 104)),
        ((831, 465, 80), (832, 480, 81), (21, 60, 104)),
        ((1, 1, 1), (16, 16, 1), (1, 2, 2)),
        ((17, 16, 2), (32, 16, 5), (2, 2, 4)),
    ],
)
def test_sizes_round_up(asked, rounded, latent):
    size = VideoSize.rounded(*asked)
    assert size == VideoSize(*rounded)
    assert size.latent == LatentSize(*latent)


@pytest.mark.parametrize("bad", [0, -1, 1.5, float("nan"), True])
def test_sizes_must_be_positive_whole_numbers(bad):
    with pytest.raises(ValueError, match="num_frames must be"):
        VideoSize.rounded(16, 16, bad)


NAMES = ("inputs", "without_tokens")
"""Fields of words, not of tensors."""


def full() -> Conditioning:
    vace = (VaceInput(context=torch.zeros(1, 96, 3, 2, 2), strength=Curve.of(0.5)),)
    values = {f.name: torch.full((1, 2), 3.0) for f in dataclasses.fields(Conditioning) if f.name not in NAMES}
    return Conditioning(**{**values, "vace": vace, "slots": {"mask": torch.ones(1, 4, 3, 2, 2)}})


def test_every_field_is_mapped_joined_and_moved():
    cond = full()
    count = len(dataclasses.fields(Conditioning)) - len(NAMES)
    doubled = cond.map(lambda t, meta: t * 2)
    for field in dataclasses.fields(Conditioning):
        for before, after in zip(*(tensors_in(getattr(c, field.name)) for c in (cond, doubled)), strict=True):
            assert torch.equal(after, before * 2)
    joined = cond.joined(doubled)
    assert sum(len(tensors_in(getattr(joined, f.name))) for f in dataclasses.fields(Conditioning)) == count
    assert joined.vace[0].context.shape[0] == 2
    assert joined.vace[0].strength == Curve.of(0.5)
    # All but what the host reads goes to the device.
    moved = [(f.metadata["host"], t) for f in dataclasses.fields(Conditioning)
             for t in tensors_in(getattr(cond.to(torch.device("meta")), f.name))]  # fmt: skip
    assert all((t.device.type == "cpu") == bool(host) for host, t in moved) and any(host for host, _ in moved)


@pytest.mark.parametrize(
    ("curve", "numbers"),
    [
        (Curve.of(0.7), [0.7] * 5),
        (Curve.of([0.0, 1.0]), [0, 0.25, 0.5, 0.75, 1]),
        (Curve.of([1.0, 0.0, 1.0]), [1, 0.5, 0, 0.5, 1]),
        (Curve.of(2.0, start=0.25, end=0.75), [0, 2, 2, 2, 0]),
        (Curve.of([0.0, 1.0], start=0.5, outside=9.0), [9, 9, 0, 0.5, 1]),
        (Curve.of(3.0, end=0.0, outside=1.0), [3, 1, 1, 1, 1]),
    ],
)
def test_curves_over_steps(curve, numbers):
    assert [curve.at(i, 5) for i in range(5)] == pytest.approx(numbers)
    assert curve.at(0, 1) == pytest.approx(numbers[0])


@pytest.mark.parametrize(
    ("values", "changes"), [([], {}), ([float("nan")], {}), ([1.0], {"start": 0.6, "end": 0.5}), ([1.0], {"end": 1.5})]
)
def test_curves_that_cannot_be_read(values, changes):
    with pytest.raises(ValueError, match="A curve needs"):
        Curve.of(values, **changes)


def test_the_inputs_that_conditioning_was_made_from_are_named_once():
    cond = Conditioning().with_inputs("input_image", reference=torch.zeros(1)).with_inputs("input_image", "end_image")
    assert cond.inputs == ("input_image", "end_image")
    assert cond.reference is not None


def test_the_negative_branch_differs_in_its_text_alone():
    cond = full()
    negative = dataclasses.replace(cond, negative_text=torch.full((1, 2), 7.0)).negative()
    assert negative.text[0, 0] == 7
    assert negative.negative_text is None
    assert negative.vace is cond.vace


@pytest.mark.parametrize(
    ("length", "size", "stride", "spans"),
    [
        (10, 4, 3, [(0, 4), (3, 7), (6, 10)]),
        (10, 4, 2, [(0, 4), (2, 6), (4, 8), (6, 10)]),
        (4, 4, 1, [(0, 4)]),
        (3, 8, 8, [(0, 3)]),
        (5, 2, 2, [(0, 2), (2, 4), (4, 5)]),
        (8, 5, 3, [(0, 5), (3, 8)]),
    ],
)
def test_spans_cover_an_axis(length, size, stride, spans):
    assert [(s.start, s.end) for s in plan_spans(length, size, stride)] == spans
    assert set().union(*(range(s.start, s.end) for s in plan_spans(length, size, stride))) == set(range(length))


def test_weights_rise_inside_and_stay_one_at_the_ends():
    first, middle, last = plan_spans(10, 4, 3)
    assert blend_weights(first, 2).tolist() == [1, 1, 1, 0.5]
    assert blend_weights(middle, 2).tolist() == [0.5, 1, 1, 0.5]
    assert blend_weights(last, 2).tolist() == [0.5, 1, 1, 1]


def test_tiles_of_a_constant_field_are_constant():
    tiles = TileSettings(size=(4, 5), stride=(3, 3))
    total = TiledSum((1, 2, 20, 26), torch.device("cpu"))
    for row, column in tiles.plan(10, 13):
        rows, columns = row.scaled(2), column.scaled(2)
        weights = tiles.blend(row, column, 2, torch.device("cpu"))
        total.add(torch.full((1, 2, rows.length, columns.length), 3.0), weights, rows, columns)
    assert torch.allclose(total.mean(), torch.full((1, 2, 20, 26), 3.0))


@pytest.mark.parametrize(("size", "stride"), [((4, 4), (5, 4)), ((4, 4), (4, 0)), ((0, 4), (1, 4))])
def test_tiles_that_leave_gaps_are_refused(size, stride):
    with pytest.raises(ValueError, match="Tiles need"):
        TileSettings(size=size, stride=stride)


@pytest.mark.parametrize(
    ("prompt", "clean"),
    [
        ("  a  dog\n runs ", "a dog runs"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("Cafe\u0301", "Café"),
        ("过曝，静态", "过曝,静态"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned(prompt, clean):
    assert clean_prompt(prompt) == clean


def test_rows_of_the_catalog_name_their_vae_and_each_repacked_file():
    rows = {row.model_id: row for row in catalog.CATALOG}
    pair, small = rows["Wan-AI/Wan2.2-T2V-A14B"], rows[catalog.TI2V_BASE]
    assert pair.vae == (catalog.T2V_BASE, "Wan2.1_VAE.pth") and small.vae == (catalog.TI2V_BASE, "Wan2.2_VAE.pth")
    names = [f"wan2.2_t2v_{noise}_noise_14B_fp8_scaled" for noise in ("high", "low")]
    assert list(pair.repacked_files) == names and small.repacked_files == ("wan2.2_ti2v_5B_fp16",)
    assert all(row.is_22 == ("Wan2.2" in row.model_id) for row in rows.values())
    assert all(len(row.repacked_files) in (0, len(row.files)) for row in rows.values())
