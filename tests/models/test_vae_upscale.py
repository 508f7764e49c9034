"""VAEs that decode at twice the size: four pixels per position as channels (Wan2.1-VAE-upscale2x)."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from tests.loading.inventories import header
from tests.reference import filled, relative_error
from wan_core import bundled
from wan_core.decode import decode
from wan_core.inspection import report
from wan_core.loading.detect import detect
from wan_core.loading.load import inspect
from wan_core.loading.tensor_files import CheckpointError
from wan_core.model_files import load_vae
from wan_core.models.config import WAN_21
from wan_core.models.vae import WanVAE, denormalise
from wan_core.planning.encoders import vae_peak_bytes
from wan_core.runtime import Runtime
from wan_core.tiling import AUTO, TileSettings
from wan_core.types import LatentSize
from wancore.nodes.vae import VAEDecode

LATENTS = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
LARGE = dataclasses.replace(bundled.VAE, upscale=2)
RUNTIME = Runtime(device=torch.device("cpu"), dtype=torch.float32)
HEAD = "decoder.head.2."


@pytest.fixture(scope="module")
def weights():
    return filled(WanVAE, LARGE).state_dict()


@pytest.fixture(scope="module")
def vae(weights, tmp_path_factory):
    file = tmp_path_factory.mktemp("vae") / "upscale2x.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
    component = inspect(file, "vae")
    assert component.config == LARGE and "decodes  pictures of 2 times" in str(report(file))
    return load_vae(component, torch.float32, "cpu")


@pytest.fixture(scope="module")
def expected(weights):
    """Every second pixel of every second row comes from a plain VAE with a quarter of the head."""
    out = torch.empty(1, 3, 5, 64, 96)
    for row in range(2):
        for column in range(2):
            part = {k: t[2 * row + column :: 4] if k.startswith(HEAD) else t for k, t in weights.items()}
            plain = WanVAE(bundled.VAE)
            plain.load_state_dict(part)
            out[..., row::2, column::2] = decode(plain, LATENTS, None, RUNTIME)
    return out


def test_it_decodes_at_twice_the_size(vae, expected):
    got = decode(vae, LATENTS, None, RUNTIME)
    assert got.shape == (1, 3, 5, 64, 96) and relative_error(got, expected) < 1e-5
    (frames,) = VAEDecode().decode(vae, {"samples": denormalise(LATENTS, WAN_21)})
    assert frames.shape == (5, 64, 96, 3)
    assert relative_error(frames, (expected[0].movedim(0, -1) + 1) / 2) < 1e-4


def test_it_decodes_in_tiles(vae, expected):
    one = decode(vae, LATENTS, TileSettings(size=(8, 8), stride=(6, 6)), RUNTIME)
    assert relative_error(one, expected) < 1e-5
    tiles = TileSettings(size=(4, 4), stride=(4, 2))
    got = decode(vae, LATENTS, tiles, RUNTIME)
    assert got.shape == expected.shape and 0 < relative_error(got, expected) < 0.3
    left = decode(vae, LATENTS[..., :4], None, RUNTIME)
    assert relative_error(got[..., :32], left[..., :32]) < 1e-5


def test_it_encodes_as_any_other(vae):
    pixels = torch.rand(1, 3, 5, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert vae.encode(pixels).shape == (1, 16, 2, 4, 6)


def test_plans_know_its_size(vae, caplog):
    size = LatentSize(2, 60, 104)
    more = vae_peak_bytes(LARGE, torch.float32, size) - vae_peak_bytes(bundled.VAE, torch.float32, size)
    assert more > 9 * torch.float32.itemsize * 480 * 832
    assert [LARGE.pixel_stride(what) for what in ("encode", "decode")] == [8, 16]
    decode(
        vae,
        LATENTS.repeat(1, 1, 1, 8, 8),
        AUTO,
        RUNTIME,
        budget=vae_peak_bytes(LARGE, torch.float32, LatentSize(2, 24, 48)),
    )
    assert "To decode 768x512 at once takes" in caplog.text


@pytest.mark.parametrize("channels", [4, 6, 13])
def test_other_heads_are_refused(weights, channels):
    shapes = {k: (channels, *t.shape[1:]) if k.startswith(HEAD) else tuple(t.shape) for k, t in weights.items()}
    with pytest.raises(CheckpointError, match=f"decodes {channels} channels"):
        detect(header(shapes))
