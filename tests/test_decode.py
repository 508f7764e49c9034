"""Encoding and decoding within a budget: whole, in strips, in tiles, and what is said about it."""

import copy
import dataclasses

import pytest
import torch

from tests.reference import relative_error, tiny_vae
from wan_core import bundled
from wan_core.decode import decode, decode_pieces, encode
from wan_core.media import pixels_to_frames
from wan_core.models.vae import WanVAE
from wan_core.planning.encoders import WORKSPACE_BYTES, choose_tiles, smallest_tiles, vae_peak_bytes
from wan_core.planning.estimate import LiveBytes
from wan_core.runtime import OutOfMemoryError, Runtime, free_bytes
from wan_core.sampling.predictor import NonFiniteError
from wan_core.tiling import AUTO, TileSettings
from wan_core.types import LatentSize

CPU = torch.device("cpu")
RUNTIME = Runtime(device=CPU, dtype=torch.float32)
SIZE = LatentSize(2, 56, 4)
LATENTS = torch.randn(1, 16, *SIZE.shape, generator=torch.manual_seed(0))
PIXELS = torch.rand(1, 3, 5, SIZE.height * 8, SIZE.width * 8, generator=torch.manual_seed(1)) * 2 - 1
STRIPS = TileSettings(size=(32, 4), stride=(24, 4))


def needs(tiles, what="decode"):
    return vae_peak_bytes(bundled.VAE, torch.float32, SIZE, tiles, what)


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture(scope="module")
def whole(vae):
    return {"decode": vae.decode(LATENTS), "encode": vae.encode(PIXELS)}


def passed(what, vae, tiles, runtime=RUNTIME, budget=None):
    return (
        decode(vae, LATENTS, tiles, runtime, budget)
        if what == "decode"
        else encode(vae, PIXELS, tiles, runtime, budget)
    )


@pytest.mark.parametrize("what", ["decode", "encode"])
def test_a_cpu_without_a_budget_needs_no_tiles(vae, whole, what, caplog):
    assert free_bytes(CPU) is None
    assert torch.equal(passed(what, vae, AUTO), whole[what])
    assert torch.equal(passed(what, vae, AUTO, budget=needs(None, what)), whole[what])
    assert not caplog.text


@pytest.mark.parametrize("what", ["decode", "encode"])
def test_strips_are_blended_from_strips_passed_alone(vae, whole, what, caplog):
    """The upper 24 rows are the first strip's alone, the lower 24 the second's; 8 rows are of both."""
    got = passed(what, vae, AUTO, budget=needs(STRIPS, what))
    assert f"To {what} 32x448 at once takes" in caplog.text
    assert "2 tiles of 32x256 pixels" in caplog.text
    factor_in, factor_out = (1, 8) if what == "decode" else (8, 1)
    chunks, source = (vae.decode_chunks, LATENTS) if what == "decode" else (vae.encode_chunks, PIXELS)
    parts = source[..., : 32 * factor_in, :], source[..., 24 * factor_in :, :]
    upper, lower = (torch.cat(list(chunks(part)), 2) for part in parts)
    border, at = 8 * factor_out, 24 * factor_out
    rise = torch.arange(1, border + 1)[:, None] / border
    both = (upper[..., at:, :] * rise.flip(0) + lower[..., :border, :] * rise) / (rise + rise.flip(0))
    blended = torch.cat((upper[..., :at, :], both, lower[..., border:, :]), 3)
    assert relative_error(got, blended.clamp(-1, 1) if what == "decode" else blended) < 1e-5
    # The middle of the VAE attends to the whole picture, so no tiling equals it.
    assert relative_error(got, whole[what]) < 0.1


def test_a_budget_holds_for_what_is_allocated(vae, whole):
    """On the CPU the gathered pixels count too: the sum of the tiles, and one tile's pixels and their weighted form."""
    tiles = choose_tiles(bundled.VAE, torch.float32, SIZE, int((needs(STRIPS) + needs(None)) / 2))
    budget = needs(tiles)
    one_tile = 2 * whole["decode"].nbytes * tiles.size[0] * tiles.size[1] // (SIZE.height * SIZE.width)
    gathered = whole["decode"].nbytes + one_tile
    with LiveBytes(CPU, given=[*vae.parameters(), LATENTS]) as counter:
        decode(vae, LATENTS, AUTO, RUNTIME, budget)
    assert counter.peak <= 1.05 * (budget - WORKSPACE_BYTES) + gathered
    with LiveBytes(CPU, given=[*vae.parameters(), LATENTS]) as untiled:
        decode(vae, LATENTS, None, RUNTIME)
    assert counter.peak < untiled.peak


@dataclasses.dataclass
class Card:
    """A device that has `left` bytes, and `hidden` more when the host is asked for room."""

    left: int
    hidden: int = 0
    asked: list[int] = dataclasses.field(default_factory=list)

    def runtime(self):
        return Runtime(device=CPU, dtype=torch.float32, free_memory=self.free, memory_left=lambda device: self.left)

    def free(self, size):
        self.asked.append(size)
        self.left, self.hidden = self.left + self.hidden, 0


class Recorder(WanVAE):
    """A VAE that does nothing but note the tiles that it is given."""

    def __init__(self):
        with torch.device("meta"):
            super().__init__(bundled.VAE)
        self.seen = []

    def decode_pieces(self, latents, tiles=None, on_chunk=None):
        self.seen.append(tiles)
        yield torch.zeros(1, 3, 5, 448, 32)


@pytest.mark.parametrize(
    ("card", "tiles", "asked"),
    [
        (Card(needs(None)), None, []),
        (Card(needs(None) - 1), STRIPS, [needs(None)]),
        (Card(needs(STRIPS), hidden=10**9), None, [needs(None)]),
        (Card(0), smallest_tiles(SIZE), [needs(None)]),
    ],
    ids=["enough", "too little", "enough when asked", "nothing"],
)
def test_the_device_and_its_host_are_asked(card, tiles, asked):
    recorder = Recorder()
    decode(recorder, LATENTS, AUTO, card.runtime())
    assert recorder.seen == [tiles]
    assert card.asked == asked


def test_tiles_of_ones_own_are_used_whatever_the_memory():
    recorder, own = Recorder(), TileSettings(size=(20, 4), stride=(10, 4))
    decode(recorder, LATENTS, own, Card(0).runtime())
    decode(recorder, LATENTS, None, Card(0).runtime())
    assert recorder.seen == [own, None]


def test_a_budget_that_cannot_be_met_is_refused_and_nothing_is_lost(vae):
    with pytest.raises(OutOfMemoryError, match=r"decode 32x448 .* GB short") as caught:
        decode(vae, LATENTS, AUTO, RUNTIME, budget=10**6)
    assert torch.equal(caught.value.latents, LATENTS)
    with pytest.raises(OutOfMemoryError, match=r"encode 32x448 .* GB short"):
        encode(vae, PIXELS, AUTO, RUNTIME, budget=10**6)


def test_encoding_falls_back_to_smaller_tiles(vae, monkeypatch, caplog):
    real, tried = WanVAE.encode, []

    def small(self, video, tiles=None, on_chunk=None):
        tried.append(tiles and tiles.size)
        if tiles is None or tiles.size[0] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, video, tiles, on_chunk)

    monkeypatch.setattr(WanVAE, "encode", small)
    latents = encode(vae, PIXELS[..., :256, :], None, RUNTIME)
    assert latents.shape == (1, 16, 2, 32, 4)
    assert tried == [None, (30, 52), (16, 4)]
    assert caplog.text.count("Out of memory while encoding") == 2


def test_a_pass_that_no_smaller_tiles_could_save_says_so(vae, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(WanVAE, "encode", full)
    with pytest.raises(OutOfMemoryError, match=r"while encoding 32x32, 2 latent frames\. Close"):
        encode(vae, PIXELS[..., :32, :32], None, RUNTIME)


class Shrinking(WanVAE):
    """A VAE on a device that runs out of memory after some frames, unless it works in tiles."""

    def __init__(self, vae, frames):
        with torch.device("meta"):
            super().__init__(bundled.VAE)
        self.real, self.frames = vae, frames

    def decode_pieces(self, latents, tiles=None, on_chunk=None):
        done = 0
        for piece in self.real.decode_pieces(latents, tiles, on_chunk):
            if tiles is None and done >= self.frames:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            done += piece.shape[2]
            yield piece


@pytest.mark.parametrize("frames", [0, 1, 5])
def test_frames_that_were_given_are_not_given_again(vae, frames, caplog):
    latents = torch.randn(1, 16, 3, 32, 4, generator=torch.manual_seed(2))
    pieces = list(decode_pieces(Shrinking(vae, frames), latents, None, RUNTIME))
    whole, tiled = vae.decode(latents), vae.decode(latents, TileSettings())
    assert torch.equal(torch.cat(pieces, 2), torch.cat((whole[:, :, :frames], tiled[:, :, frames:]), 2))
    assert caplog.text.count("Out of memory while decoding") == 1


def test_frames_come_while_the_rest_is_not_decoded_yet(vae):
    done = []
    runtime = Runtime(device=CPU, dtype=torch.float32, on_progress=lambda phase, now, total, *_: done.append(now))
    pieces = decode_pieces(vae, torch.zeros(1, 16, 3, 4, 4), AUTO, runtime)
    first = next(pieces)
    assert first.shape == (1, 3, 1, 32, 32) and not first.requires_grad
    assert max(done, default=0) <= 1
    assert [piece.shape[2] for piece in pieces] == [4, 4] and done[-1] == 3


def test_latents_without_numbers_are_refused_before_a_frame_is_asked_for(vae):
    with pytest.raises(NonFiniteError, match="before decoding"):
        decode_pieces(vae, torch.full((1, 16, 1, 4, 4), float("nan")), AUTO, RUNTIME)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tiles", [AUTO, TileSettings(size=(4, 4), stride=(3, 3))])
def test_pixels_without_numbers_are_refused_although_the_latents_are_sound(vae, tiles, value):
    broken = copy.deepcopy(vae)
    with torch.no_grad():
        list(broken.decoder.parameters())[-1].fill_(value)
    with pytest.raises(NonFiniteError, match="of the decoded pixels are NaN"):
        decode(broken, torch.zeros(1, 16, 2, 5, 4), tiles, RUNTIME)


def test_a_long_video_is_held_once(vae):
    """As IMAGE, beside the few frames that are being decoded; before it was held as pixels too."""
    latents = torch.zeros(1, 16, 21, 8, 8)
    video = 4 * 3 * 81 * 64 * 64
    with torch.no_grad(), LiveBytes(CPU, given=[*vae.parameters(), latents]) as alone:
        for _ in vae.decode_chunks(latents):
            pass
    with LiveBytes(CPU, given=[*vae.parameters(), latents]) as counter:
        frames = pixels_to_frames(decode_pieces(vae, latents, AUTO, RUNTIME), 81)
    assert frames.nbytes == video
    assert counter.peak < video + 1.1 * alone.peak
