"""The video autoencoder against the published code, and identities between streamed, tiled and whole."""

import json

import pytest
import torch
import torch.nn.functional as F

from tests.reference import load_case, relative_error, tiny_vae
from wan_core.models.config import WAN_21
from wan_core.models.vae import denormalise, normalise
from wan_core.models.vae_blocks import CausalConv3d, Downsample, FeatureCache, Upsample
from wan_core.tiling import TileSettings


def case_tiles(case):
    if "tile_size" not in case.metadata:
        return None
    return TileSettings(
        size=tuple(json.loads(case.metadata["tile_size"])), stride=tuple(json.loads(case.metadata["tile_stride"]))
    )


@pytest.mark.parametrize("name", ["vae_1f", "vae_5f", "vae_13f", "vae_tiled"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_equals_the_published_code(name, channels_last):
    case, vae = load_case(name), tiny_vae()
    if channels_last:
        vae.use_channels_last()
    assert relative_error(vae.encode(case["video"], case_tiles(case)), case["latents"]) < 1e-5
    assert relative_error(vae.decode(case["latents"], case_tiles(case)), case["decoded"]) < 1e-5


def stream(module, x, first, rest):
    """`module` over `x` in chunks of frames, as the encoder and decoder feed it."""
    cache, out, start = FeatureCache(), [], 0
    while start < x.shape[2]:
        end = start + (rest if start else first)
        out.append(module(x[:, :, start:end], cache))
        start = end
    return torch.cat(out, 2)


def initialised(module):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return module.requires_grad_(False)


X = torch.randn(2, 4, 9, 6, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("first", "rest"), [(1, 1), (1, 4), (1, 2), (9, 1), (3, 3)])
def test_streamed_convolution_equals_the_whole_one(first, rest):
    conv = initialised(CausalConv3d(4, 6, (3, 3, 3)))
    whole = F.conv3d(F.pad(X, (1, 1, 1, 1, 2, 0)), conv.weight, conv.bias)
    assert relative_error(stream(conv, X, first, rest), whole) < 1e-5


def test_streamed_downsampling_equals_the_closed_form():
    down = initialised(Downsample(4, temporal=True))
    spatial = torch.stack(
        [F.conv2d(F.pad(f, (0, 1, 0, 1)), *down.resample[1].parameters(), stride=2) for f in X.unbind(2)], 2
    )
    later = F.conv3d(spatial, down.time_conv.weight, down.time_conv.bias, (2, 1, 1))
    assert relative_error(stream(down, X, 1, 4), torch.cat((spatial[:, :, :1], later), 2)) < 1e-5


def test_streamed_upsampling_equals_the_closed_form():
    up = initialised(Upsample(4, 2, temporal=True))
    later = F.conv3d(F.pad(X[:, :, 1:], (0, 0, 0, 0, 2, 0)), up.time_conv.weight, up.time_conv.bias)
    even, odd = later.chunk(2, 1)
    doubled = torch.cat((X[:, :, :1], torch.stack((even, odd), 3).flatten(2, 3)), 2)
    frames = F.interpolate(doubled.transpose(1, 2).flatten(0, 1), scale_factor=2, mode="nearest-exact")
    whole = F.conv2d(frames, *up.resample[1].parameters(), padding=1).unflatten(0, (2, -1)).transpose(1, 2)
    assert relative_error(stream(up, X, 1, 1), whole) < 1e-5


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_lengths(frames):
    vae = tiny_vae()
    latents = vae.encode(torch.zeros(1, 3, frames, 16, 24))
    assert latents.shape == (1, 16, (frames + 3) // 4, 2, 3)
    assert vae.decode(latents).shape == (1, 3, frames, 16, 24)


def test_one_tile_that_covers_all_is_no_tile():
    case, vae = load_case("vae_5f"), tiny_vae()
    tiles = TileSettings(size=(8, 8), stride=(8, 8))
    assert torch.equal(vae.decode(case["latents"], tiles), vae.decode(case["latents"]))
    assert torch.equal(vae.encode(case["video"], tiles), vae.encode(case["video"]))


def test_a_batch_equals_its_videos():
    case, vae = load_case("vae_5f"), tiny_vae()
    both = torch.cat((case["latents"], case["latents"].flip(3)))
    single = [vae.decode(both[i : i + 1]) for i in range(2)]
    assert relative_error(vae.decode(both), torch.cat(single)) < 1e-5


def test_gradients_flow():
    vae = tiny_vae().requires_grad_(True)
    video = load_case("vae_5f")["video"].requires_grad_()
    vae.decode(vae.encode(video)).square().mean().backward()
    assert video.grad.abs().sum() > 0


def test_bfloat16_decodes_close():
    case, vae = load_case("vae_5f"), tiny_vae().to(torch.bfloat16)
    assert relative_error(vae.decode(case["latents"]), case["decoded"]) < 0.05


def test_normalisation_is_inverted():
    raw = torch.randn(1, 16, 2, 3, 4)
    assert relative_error(denormalise(normalise(raw, WAN_21), WAN_21), raw) < 1e-6
    assert normalise(raw, WAN_21)[0, 7, 0, 0, 0] == pytest.approx(
        (raw[0, 7, 0, 0, 0].item() - 1.5508) / 2.0743, rel=1e-5
    )


def test_progress_counts_every_chunk_of_every_tile_and_can_stop():
    case, vae, seen = load_case("vae_tiled"), tiny_vae(), []
    vae.decode(case["latents"], case_tiles(case), lambda done, total: seen.append((done, total)))
    tiles = len(case_tiles(case).plan(12, 16))
    assert seen == [(i + 1, 3 * tiles) for i in range(3 * tiles)]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vae.encode(case["video"], None, stop)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 3, 4, 16, 16), "4k \\+ 1 frames"), ((1, 3, 5, 20, 16), "multiples of 8"), ((1, 4, 5, 16, 16), "encodes")],
)
def test_pixels_that_do_not_fit_are_refused(shape, words):
    with pytest.raises(ValueError, match=words):
        tiny_vae().encode(torch.zeros(shape))


def test_latents_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="decodes"):
        tiny_vae().decode(torch.zeros(1, 48, 1, 4, 4))
