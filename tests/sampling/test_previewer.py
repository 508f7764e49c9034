"""Previews by the tiny autoencoder: which frames it sees, how often, and that it never stops a run."""

import pytest
import torch

from tests.reference import filled
from wan_core.models.config import PreviewDecoderConfig
from wan_core.models.preview_decoder import PreviewDecoder
from wan_core.sampling import preview
from wan_core.sampling.preview import CONTEXT, SHARE, Previewer, to_images

CPU = torch.device("cpu")
LATENTS = torch.randn(2, 16, 7, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def decoder() -> PreviewDecoder:
    return filled(PreviewDecoder, PreviewDecoderConfig(widths=(8, 6, 4, 4)))


def same(pictures, frames) -> bool:
    return [p.tobytes() for p in pictures] == [p.tobytes() for p in to_images(frames.movedim(1, -1))]


def test_the_middle_frame_is_decoded_with_those_before_it(decoder):
    picture = Previewer(decoder, CPU).middle(LATENTS)
    assert picture.size == (48, 32)
    assert same([picture], decoder(LATENTS[0, :, 3 - CONTEXT : 4])[-1:])
    assert same([Previewer(decoder, CPU).middle(LATENTS[:, :, :1])], decoder(LATENTS[0, :, :1]))


def test_the_strip_shows_every_frame_once(decoder):
    assert same(Previewer(decoder, CPU).strip(LATENTS), decoder(LATENTS[0]))


def test_previews_rest_until_they_are_a_small_part_of_the_time(decoder, monkeypatch):
    clock = [100.0]

    def decode(*_):
        clock[0] += 2
        return torch.zeros(1, 3, 8, 8)

    monkeypatch.setattr(preview.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(PreviewDecoder, "forward", decode)
    pictures, shown = Previewer(decoder, CPU), []
    start = clock[0]
    while clock[0] < start + 500:
        shown.append(pictures.middle(LATENTS) is not None)
        clock[0] += 3
    assert shown[:3] == [True, False, False]
    assert 0.8 * SHARE < shown.count(True) * 2 / (clock[0] - start) < 1.1 * SHARE


def test_a_decoder_that_fails_is_given_up(decoder, monkeypatch, caplog):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(PreviewDecoder, "forward", fail)
    pictures = Previewer(decoder, CPU)
    assert pictures.works
    assert [pictures.middle(LATENTS), pictures.strip(LATENTS)] == [None, None]
    assert not pictures.works
    assert caplog.text.count("the tiny autoencoder failed") == 1
