"""Films that go on: a run that continues latents is the rest of a chain of clips."""

import dataclasses

import pytest
import torch

from tests.reference import ALL_DITS
from tests.sampling.variants import SMALL, conditioning, small_dit
from wan_core.model import VideoModel
from wan_core.runtime import Runtime
from wan_core.sampling.experts import RunInputs
from wan_core.sampling.windows import window_of
from wan_core.settings import GuidanceSettings, MemorySettings, SamplerSettings, WindowSettings
from wan_core.tiling import Span
from wan_core.types import Continuation, LatentSize
from wan_core.variants import match_variant

RUNTIME = Runtime(device=torch.device("cpu"), dtype=torch.float32)
KEEP, CLIP = 2, 4
CHAIN = WindowSettings(size=CLIP, stride=CLIP - KEEP, mode="chain", colour_limit=0.05)
SETTINGS = SamplerSettings(steps=2, seed=1, guidance=GuidanceSettings(scale=2.0))


def small_model(variant: str) -> VideoModel:
    return VideoModel.of(small_dit(variant), match_variant(SMALL[variant]), None, variant)


def fitted(variant: str, frames: int):
    """Random conditioning of so many frames, in the layout of the model's channels."""
    size = LatentSize(frames, 4, 4, SMALL[variant].geometry)
    cond = conditioning(variant, size, models=SMALL)
    return dataclasses.replace(cond, layout=match_variant(SMALL[variant]).slots or None), size


def run(model, cond, size, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    return model.sample(RunInputs(cond, size), settings, MemorySettings(), RUNTIME).video


@pytest.mark.parametrize("variant", ALL_DITS)
def test_an_extension_by_one_clip_is_the_last_clip_of_a_chain(variant):
    """Of the same length: the noise of the whole film is drawn, and the film's last clip gives the colours."""
    model, (cond, size) = small_model(variant), fitted(variant, CLIP + 2)
    whole = run(model, cond, size, windows=CHAIN)
    film = Continuation(film=whole[:, :, :CLIP], keep=KEEP, clip=CLIP, colour_limit=CHAIN.colour_limit)
    prefix = cond.prefix_frames(size.frames)
    later = dataclasses.replace(window_of(cond, Span(2, CLIP + 2, False, True), prefix), continues=film)
    longer = run(model, later, dataclasses.replace(size, frames=CLIP))
    assert torch.equal(film.joined(longer), whole)
    other = dataclasses.replace(later, continues=dataclasses.replace(film, film=film.film + 0.3))
    assert not torch.allclose(
        run(model, other, dataclasses.replace(size, frames=CLIP))[:, :, KEEP:], longer[:, :, KEEP:]
    )
