"""The Wan 2.2 autoencoder against the published code: pixels as channels, and levels with shortcuts."""

import pytest
import torch
from einops import rearrange

from tests.reference import load_case, relative_error, tiny_vae_22
from wan_core import bundled
from wan_core.models.config import WAN_22
from wan_core.models.vae import PATCHES, UNFOLDED, Decoder, Encoder
from wan_core.models.vae_blocks import FeatureCache, add_duplicated, averaged
from wan_core.tiling import TileSettings

CASES = ["vae22_1f", "vae22_5f", "vae22_9f"]
DOWN = {"d1": (1, 2), "d2": (2, 2), "d3": (2, 2), "d4": (1, 1)}
UP = {"u1": (48, 2, 2), "u2": (24, 2, 2), "u3": (12, 1, 2)}
"""Factors of each case: frames and pixels; before them the channels that come out."""


@pytest.fixture(scope="module")
def vae():
    return tiny_vae_22()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_the_published_code(name, channels_last):
    case, vae = load_case(name), tiny_vae_22()
    if channels_last:
        vae.use_channels_last()
    assert relative_error(vae.encode(case["video"]), case["latents"]) < 1e-5
    assert relative_error(vae.decode(case["latents"]), case["decoded"]) < 1e-5


def test_latents_of_no_encoder_decode_as_published(vae):
    case = load_case("vae22_decode")
    assert relative_error(vae.decode(case["latents"]), case["decoded_raw"].clamp(-1, 1)) < 1e-5


def test_pixels_fold_into_channels_column_first():
    case = load_case("vae22_patchify")
    assert torch.equal(rearrange(case["input"], PATCHES, r=2, q=2), case["patched"])
    assert torch.equal(rearrange(case["patched"], UNFOLDED, r=2, q=2), case["back"])


def test_statistics_are_the_published_ones():
    case = load_case("vae22_scale")
    assert torch.equal(torch.tensor(WAN_22.mean), case["mean"]) and torch.equal(torch.tensor(WAN_22.std), case["std"])


@pytest.mark.parametrize("name", [key for key in load_case("vae22_shortcuts").tensors if key.endswith("_in")])
def test_shortcuts_equal_the_published_code(name):
    case = load_case("vae22_shortcuts")
    x, expected = case[name], case[name.removesuffix("in") + "out"]
    kind, factors = name.split("_")[:2]
    if kind == "down":
        assert relative_error(averaged(x, *DOWN[factors]), expected) < 1e-6
        return
    channels, time, _ = UP[factors]
    out = torch.ones_like(expected).contiguous(memory_format=torch.channels_last_3d)
    assert expected.shape[1] == channels
    got = add_duplicated(out, x, time)
    assert torch.equal(got, expected + 1) and got.data_ptr() == out.data_ptr()
    leaf = x.clone().requires_grad_()
    got = add_duplicated(torch.ones_like(expected), leaf, time)
    got.sum().backward()
    assert torch.equal(got, expected + 1) and leaf.grad.min() >= 0


def test_a_constant_field_through_the_shortcuts():
    """The first frame is averaged with zeros where frames become channels; growth leaves it as it is."""
    first = averaged(torch.ones(1, 2, 1, 4, 4), 2, 2)
    assert first[:, ::2].eq(0).all() and first[:, 1::2].eq(1).all()
    assert averaged(torch.ones(1, 2, 4, 4, 4), 2, 2).eq(1).all()
    assert add_duplicated(torch.zeros(1, 2, 4, 8, 8), torch.ones(1, 2, 2, 4, 4), 2).eq(1).all()


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_lengths(vae, frames):
    latents = vae.encode(torch.zeros(1, 3, frames, 32, 64))
    assert latents.shape == (1, 48, (frames + 3) // 4, 2, 4)
    assert vae.decode(latents).shape == (1, 3, frames, 32, 64)


@pytest.mark.parametrize("size", [1, 5])
def test_a_longer_video_begins_like_a_shorter_one(vae, size):
    """Causal: what comes later changes nothing before it, so frames may pass one at a time."""
    case = load_case("vae22_9f")
    latents = 1 + (size - 1) // 4
    assert relative_error(vae.encode(case["video"][:, :, :size]), case["latents"][:, :, :latents]) < 1e-5
    assert relative_error(vae.decode(case["latents"][:, :, :latents]), case["decoded"][:, :, :size]) < 1e-5


@pytest.mark.parametrize(("cls", "channels", "shape"), [(Encoder, 3, (4, 32, 64)), (Decoder, 48, (3, 2, 4))])
def test_chunks_of_any_length_give_the_same(cls, channels, shape):
    """The parts that stream are equal, frame by frame, to one pass over all frames behind the first."""
    module = getattr(tiny_vae_22(), cls.__name__.lower())
    x = torch.randn(1, channels, 1 + 2 * shape[0], *shape[1:], generator=torch.Generator().manual_seed(0))
    step = 4 if cls is Encoder else 1
    streamed, whole = FeatureCache(), FeatureCache()
    first = [module(x[:, :, :1], cache) for cache in (streamed, whole)]
    pieces = [module(piece, streamed) for piece in x[:, :, 1:].split(step, 2)]
    rest = module(x[:, :, 1:], whole)
    assert torch.equal(*first)
    assert relative_error(torch.cat(pieces, 2), rest) < 1e-5


def test_tiles_that_overlap_enough_are_near_the_whole(vae):
    latents = torch.randn(1, 48, 2, 12, 16, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(latents)
    tiled = vae.decode(latents, TileSettings(size=(10, 12), stride=(2, 4)))
    assert tiled.shape == whole.shape and 0 < relative_error(tiled, whole) < 0.2
    one = TileSettings(size=(12, 16), stride=(12, 16))
    assert torch.equal(vae.decode(latents, one), whole)
    left = vae.decode(latents[..., :12])
    strips = vae.decode(latents, TileSettings(size=(12, 12), stride=(12, 12)))
    assert relative_error(strips[..., : 12 * 16], left) < 1e-5


def test_gradients_flow_and_give_the_same_values():
    vae = tiny_vae_22().requires_grad_(True)
    case = load_case("vae22_5f")
    video = case["video"].requires_grad_()
    latents = vae.encode(video)
    assert relative_error(latents, case["latents"]) < 1e-5
    vae.decode(latents).square().mean().backward()
    assert video.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in vae.named_parameters() if "weight" in n)


def test_bfloat16_decodes_close():
    case, vae = load_case("vae22_5f"), tiny_vae_22().to(torch.bfloat16)
    assert relative_error(vae.decode(case["latents"]), case["decoded"]) < 0.05


@pytest.mark.parametrize(("shape", "words"), [((1, 3, 5, 24, 32), "multiples of 16"), ((1, 3, 4, 32, 32), "4k \\+ 1")])
def test_pixels_that_do_not_fit_are_refused(vae, shape, words):
    with pytest.raises(ValueError, match=words):
        vae.encode(torch.zeros(shape))


def test_no_part_is_streamed_by_itself():
    """Levels and residual blocks run outside of any block order, so they must not count as blocks to stream."""
    from wan_core.offload.blocks import blocks_of

    assert not blocks_of(tiny_vae_22()) and bundled.VAE_22.pixel_stride("decode") == 16
