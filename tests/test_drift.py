"""The drift meter on clips whose drift is known."""

import math

import numpy as np
import pytest
import torch

from wan_core.drift import clip_starts, draw_drift, measure_drift
from wancore.trainer.data.synthetic import Scene


def clip(count: int = 12, side: int = 24, seed: int = 0) -> torch.Tensor:
    """A texture that moves by one pixel per frame."""
    texture = torch.rand(side, side + count, 3, generator=torch.Generator().manual_seed(seed)) * 0.5 + 0.2
    return torch.stack([texture[:, n : n + side] for n in range(count)])


def blurred(frames: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(frames.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)


CHANGES = {
    "none": (lambda x: x, {}),
    "redder": (lambda x: x + torch.tensor([0.1, 0.0, 0.0]), {"red": 0.1}),
    "brighter": (lambda x: x + 0.05, {"red": 0.05, "green": 0.05, "blue": 0.05}),
    "blurred": (blurred, {"sharpness": -1}),
    "still": (lambda x: x[:1].expand_as(x), {"motion": -1}),
    "faster": (lambda x: x[:, :, torch.arange(0, x.shape[2] * 3, 3) % x.shape[2]], {}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_between_two_clips_is_what_the_meter_says(name):
    change, expected = CHANGES[name]
    first, second = clip(), change(clip(seed=1) - clip(seed=1).mean((0, 1, 2)) + clip().mean((0, 1, 2)))
    before, after = measure_drift([*first, *second], [12]).clips
    for number, channel in enumerate(("red", "green", "blue")):
        moved = after.colour[number] - before.colour[number]
        if name not in ("blurred", "still", "faster"):
            assert math.isclose(moved, expected.get(channel, 0.0), abs_tol=1e-5)
    assert (after.sharpness < 0.7 * before.sharpness) == ("sharpness" in expected)
    assert (after.motion < 0.1 * before.motion) == ("motion" in expected)


def test_numbers_are_those_of_numpy():
    frames = clip(3).numpy().astype(np.float64)
    drift = measure_drift(torch.from_numpy(frames))
    grey = frames.mean(-1)
    for number, frame in enumerate(drift.frames):
        assert np.allclose(frame.colour, frames[number].mean((0, 1)), atol=1e-6)
        assert math.isclose(frame.contrast, grey[number].std(ddof=1), rel_tol=1e-5)
        steps = np.abs(np.diff(grey[number], axis=0)).mean() + np.abs(np.diff(grey[number], axis=1)).mean()
        assert math.isclose(frame.sharpness, steps / 2, rel_tol=1e-5)
    assert math.isnan(drift.frames[0].motion)
    assert math.isclose(drift.frames[2].motion, np.abs(frames[2] - frames[1]).mean(), rel_tol=1e-5)


def test_a_joint_is_seen_where_there_is_one_and_only_there():
    """A film cut in two at its own frames has no joint; a jump of place or of colour is one."""
    film = clip(24)
    assert measure_drift(film, [12]).joints[0].motion == pytest.approx(1, abs=0.2)
    coloured = torch.cat((film[:12], film[12:] + 0.08))
    assert measure_drift(coloured, [12]).joints[0].colour > 3
    assert measure_drift(coloured, [6]).joints[0].colour == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("seed", range(3))
def test_what_a_scene_moves_is_no_joint(seed):
    """The drawn world moves evenly, so that a cut at any of its frames is not seen, and one to another scene is."""
    film, other = (torch.from_numpy(Scene.random(n).drawn(64, 64, 17).video) / 255 for n in (seed, seed + 7))
    assert max(measure_drift(film, [8]).joints[0].motion, measure_drift(film, [8]).joints[0].colour) < 1.5
    cut = measure_drift(torch.cat((film[:8], other[8:])), [8]).joints[0]
    assert max(cut.motion, cut.colour) > 3


@pytest.mark.parametrize("starts", [[0], [12], [5, 3], [4, 4]])
def test_clips_begin_inside_of_the_film(starts):
    with pytest.raises(ValueError, match="Clips begin at rising frames from 1 to 11"):
        measure_drift(clip(12), starts)


def test_starts_follow_from_lengths():
    assert clip_starts(33, 9, 8) == (9, 17, 25)
    assert clip_starts(9, 9, 8) == ()
    assert clip_starts(9, 9, 0) == ()


@pytest.mark.parametrize(("count", "starts"), [(1, []), (2, [1]), (12, [4, 8])])
def test_the_chart_draws_any_film(count, starts):
    picture = np.asarray(draw_drift(measure_drift(clip(count), starts)))
    assert picture.shape == (720, 960, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
