"""The tiny autoencoder for previews, beside the published one, and its files."""

import dataclasses
import importlib.util
import itertools
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.reference import filled, load_case
from wan_core.decode import VaeHandle
from wan_core.loading.tensor_files import CheckpointError
from wan_core.model_files import load_preview_decoder
from wan_core.models.config import PreviewDecoderConfig
from wan_core.models.preview_decoder import PreviewDecoder
from wan_core.runtime import Runtime
from wan_core.tiling import TileSettings

SMALL = PreviewDecoderConfig(widths=(8, 6, 4, 4))
PUBLISHED = "WANCORE_TAEHV"
"""Names a folder with taehv.py and taew2_1.pth of madebyollin/taehv."""


def latents(frames: int = 4, height: int = 4, width: int = 6) -> torch.Tensor:
    return torch.randn(16, frames, height, width, generator=torch.Generator().manual_seed(0))


def small_weights() -> dict[str, torch.Tensor]:
    weights = filled(PreviewDecoder, SMALL).state_dict()
    return {**weights, "encoder.0.weight": torch.zeros(4, 3, 3, 3), "encoder.0.bias": torch.zeros(4)}


def test_equals_the_published_code():
    case, decoder = load_case("preview_decoder"), filled(PreviewDecoder, PreviewDecoderConfig())
    decoder.decoder[-1].bias += 0.5
    pictures = decoder(case["latents"])
    assert pictures.shape == (4, 3, 32, 48)
    assert ((pictures > 0) & (pictures < 1)).float().mean() > 0.3
    assert torch.allclose(pictures, case["pictures"], atol=1e-5)
    video = decoder.decode(case["latents"][None])
    assert video.shape == (1, 3, 13, 32, 48)
    frames = (video[0].movedim(0, 1) + 1) / 2
    assert torch.allclose(frames[:5], case["frames"], atol=1e-5)
    assert torch.allclose(frames[::4], case["pictures"], atol=1e-5)


def test_a_whole_video_comes_in_pieces_batches_and_tiles():
    """As that of a VAE: one frame and then four, every video as if alone, and tiles that cover it as the whole."""
    decoder, batch = filled(PreviewDecoder, SMALL), torch.stack((latents(3), latents(3).flip(1)))
    pieces = list(decoder.decode_pieces(batch))
    whole = torch.cat(pieces, 2)
    assert [piece.shape[2] for piece in pieces] == [1, 4, 4]
    assert whole.min() >= -1
    assert whole.max() <= 1
    assert torch.allclose(torch.cat([decoder.decode(video[None]) for video in batch]), whole, atol=1e-6)
    tiles = TileSettings(size=(3, 6), stride=(2, 6))
    runtime = Runtime(device=torch.device("cpu"), dtype=torch.float32)
    handle = VaeHandle(vae=decoder, runtime=runtime, tiles=tiles)
    assert handle.decode(batch).shape == whole.shape
    assert not torch.equal(handle.decode(batch), whole)
    covering = dataclasses.replace(handle, tiles=TileSettings(size=(4, 6), stride=(4, 6)))
    assert torch.equal(covering.decode(batch), whole)


def test_equals_the_published_code_with_its_own_weights():
    folder = Path(os.environ.get(PUBLISHED, ""))
    if not os.environ.get(PUBLISHED) or not (folder / "taew2_1.pth").is_file():
        pytest.skip(f"{PUBLISHED} names no folder with taehv.py and taew2_1.pth (madebyollin/taehv)")
    spec = importlib.util.spec_from_file_location("taehv", folder / "taehv.py")
    published = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(published)
    x = latents(5, 8, 10)
    with torch.no_grad():
        expected = published.TAEHV(str(folder / "taew2_1.pth")).decode_video(
            x.transpose(0, 1)[None], parallel=True, show_progress_bar=False
        )
    assert (load_preview_decoder(folder / "taew2_1.pth")(x) - expected[0, ::4]).abs().max() < 1e-5


def test_pictures_depend_on_what_came_before_and_on_nothing_after():
    decoder, x = filled(PreviewDecoder, SMALL), latents(5)
    whole = decoder(x)
    assert torch.equal(decoder(x[:, :3]), whole[:3])
    assert torch.equal(decoder(x, context=4), whole[4:])
    assert not torch.equal(decoder(x[:, 4:]), whole[4:])
    assert torch.equal(decoder(x), whole)
    long = latents(12)
    assert torch.equal(decoder(long[:, 4:], context=7), decoder(long)[11:])
    assert not torch.equal(decoder(long[:, 7:], context=4), decoder(long)[11:])


def test_that_of_wan_22_gives_four_pixels_for_one(tmp_path):
    """Each of the four is what a decoder with a quarter of the last layer gives: rows before columns."""
    config = PreviewDecoderConfig(latent_channels=48, widths=(8, 6, 4, 4), patch=2)
    weights = filled(PreviewDecoder, config).state_dict()
    save_file(weights, tmp_path / "taew2_2.safetensors")
    decoder = load_preview_decoder(tmp_path / "taew2_2.safetensors")
    assert decoder.config == config
    x = torch.randn(48, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    pictures = decoder(x)
    assert pictures.shape == (2, 3, 64, 96)
    for row, column in itertools.product(range(2), repeat=2):
        part = {k: t[2 * row + column :: 4] if k.startswith("decoder.22.") else t for k, t in weights.items()}
        plain = PreviewDecoder(dataclasses.replace(config, patch=1))
        plain.load_state_dict(part)
        assert torch.allclose(pictures[..., row::2, column::2], plain(x), atol=1e-6)


@pytest.mark.parametrize("name", ["taew2_1.safetensors", "taew2_1.pth"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_both_files_load(tmp_path, name, dtype):
    weights = {key: value.to(dtype) for key, value in small_weights().items()}
    save = save_file if name.endswith("safetensors") else torch.save
    save(weights, tmp_path / name)
    decoder = load_preview_decoder(tmp_path / name)
    assert {p.dtype for p in decoder.parameters()} == {torch.float32}
    expected = filled(PreviewDecoder, SMALL).to(dtype).float()(latents())
    assert torch.allclose(decoder(latents()), expected, atol=1e-6)


def other(**changes) -> dict[str, torch.Tensor]:
    return {**small_weights(), **changes}


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (
            {k: v for k, v in small_weights().items() if k != "decoder.5.conv.4.bias"},
            "1 missing: decoder.5.conv.4.bias",
        ),
        (other(**{"decoder.30.weight": torch.zeros(3)}), "1 unexpected: decoder.30.weight"),
        (other(**{"decoder.1.weight": torch.zeros(8, 24, 3, 3)}), "decodes 24 latent channels to 3 of pixels"),
        (other(**{"decoder.22.weight": torch.zeros(7, 4, 3, 3)}), "decodes 16 latent channels to 7 of pixels"),
        ({"conv2.weight": torch.zeros(16, 16, 1, 1, 1), "decoder.layers.0.weight": torch.zeros(4)}, "conv2.weight"),
    ],
)
def test_other_files_are_refused(tmp_path, weights, words):
    save_file(weights, tmp_path / "taew2_1.safetensors")
    with pytest.raises(CheckpointError, match=words):
        load_preview_decoder(tmp_path / "taew2_1.safetensors")


def test_a_broken_file_is_refused(tmp_path):
    torch.save(small_weights(), tmp_path / "taew2_1.pth")
    whole = (tmp_path / "taew2_1.pth").read_bytes()
    (tmp_path / "taew2_1.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        load_preview_decoder(tmp_path / "taew2_1.pth")
