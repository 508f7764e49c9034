"""The memory that a VAE pass is said to need, against counts of whole passes; and tiles chosen for a budget."""

import itertools

import pytest
import torch

from tests.reference import filled, tiny_vae, tiny_vae_22
from wan_core.models.config import WAN_22, PreviewDecoderConfig, VAEConfig
from wan_core.models.preview_decoder import PreviewDecoder
from wan_core.models.vae import WanVAE
from wan_core.planning import encoders
from wan_core.planning.encoders import (
    LEAST_STRIP,
    LEAST_TILE,
    OVERLAP,
    WORKSPACE_BYTES,
    choose_tiles,
    computed_cells,
    count_vae_bytes,
    smallest_tiles,
    vae_peak_bytes,
)
from wan_core.planning.estimate import LiveBytes
from wan_core.runtime import OutOfMemoryError
from wan_core.tiling import TileSettings
from wan_core.types import LatentSize, VideoSize

REAL = VAEConfig()
REAL_22 = VAEConfig(base_dim=160, decoder_dim=256, geometry=WAN_22, patch=2, shortcuts=True)
BF16 = torch.bfloat16
PASSES = ("decode", "encode")
AT_480P = VideoSize(832, 480, 81).latent
AT_720P = VideoSize(1280, 720, 81).latent


@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(BF16, LatentSize(3, 22, 50)), (BF16, LatentSize(9, 12, 20)), (torch.float32, LatentSize(2, 19, 34))],
    ids=["large", "long", "float32"],
)
def test_the_peak_is_that_of_the_whole_pass(what, dtype, size):
    """Published sizes are larger and longer: counting them takes minutes, and their peak grows with the area alone."""
    predicted = vae_peak_bytes(REAL, dtype, size, what=what) - WORKSPACE_BYTES
    assert predicted == pytest.approx(count_vae_bytes(REAL, dtype, size, what), rel=0.05)


def test_the_numbers_of_the_published_sizes():
    peaks = {(s, what): vae_peak_bytes(REAL, BF16, s, what=what) / 1e9 for s in (AT_480P, AT_720P) for what in PASSES}
    assert peaks == {
        (AT_480P, "decode"): pytest.approx(2.86, abs=0.01),
        (AT_480P, "encode"): pytest.approx(2.03, abs=0.01),
        (AT_720P, "decode"): pytest.approx(6.25, abs=0.01),
        (AT_720P, "encode"): pytest.approx(4.33, abs=0.01),
    }


def test_the_numbers_of_the_published_size_of_wan_22():
    """A decode by the official code has a peak of 10.4 GB in bfloat16 (`tests/benchmarks/meta.py`)."""
    size = VideoSize(1280, 704, 121, WAN_22).latent
    peaks = {what: vae_peak_bytes(REAL_22, BF16, size, what=what) / 1e9 for what in PASSES}
    assert peaks == {"decode": pytest.approx(5.51, abs=0.01), "encode": pytest.approx(1.98, abs=0.01)}
    in_8_gb = choose_tiles(REAL_22, BF16, size, 8e9 - 1.41e9)
    assert in_8_gb is None and choose_tiles(REAL_22, BF16, size, 4e9).size == (44, 44)


def tiny_autoencoder() -> PreviewDecoder:
    return filled(PreviewDecoder, PreviewDecoderConfig(widths=(16, 12, 8, 8)))


@pytest.mark.parametrize(
    ("make", "what"),
    [*((make, what) for make in (tiny_vae, tiny_vae_22) for what in PASSES), (tiny_autoencoder, "decode")],
)
def test_the_count_is_what_a_real_pass_allocates(make, what):
    model = make()
    model = model.use_channels_last() if isinstance(model, WanVAE) else model
    size = LatentSize(3, 8, 12, model.config.geometry)
    stride = model.config.pixel_stride(what)
    source = torch.randn(1, model.config.latent_channels, *size.shape)
    if what == "encode":
        source = torch.rand(1, 3, 9, size.height * stride, size.width * stride)
    chunks = model.decode_chunks if what == "decode" else model.encode_chunks
    with torch.no_grad(), LiveBytes("cpu", given=[*model.parameters(), source]) as counter:
        for _ in chunks(source):
            pass
    assert count_vae_bytes(model.config, torch.float32, size, what) == pytest.approx(counter.peak, rel=0.05)


def test_tiles_and_batches_scale_the_peak():
    tiles = TileSettings(size=(30, 52), stride=(15, 26))
    whole, tile, two = (
        vae_peak_bytes(REAL, BF16, AT_480P, *rest) - WORKSPACE_BYTES for rest in ((), (tiles,), (None, "decode", 2))
    )
    assert tile == pytest.approx(whole / 4, rel=1e-6)
    assert two == pytest.approx(2 * whole, rel=1e-6)
    one_frame = LatentSize(1, 60, 104)
    assert vae_peak_bytes(REAL, BF16, one_frame) < 0.65 * vae_peak_bytes(REAL, BF16, AT_480P)


BUDGETS = (24.0, 8.0, 6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.6, 0.5, 0.45)


@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("size", (AT_480P, AT_720P), ids=str)
def test_every_budget_is_met_with_a_shared_border(size, what):
    spent = []
    for budget in BUDGETS:
        tiles = choose_tiles(REAL, BF16, size, int(budget * 1e9), what)
        assert vae_peak_bytes(REAL, BF16, size, tiles, what) <= budget * 1e9
        if tiles is not None:
            for part, stride, length in zip(tiles.size, tiles.stride, (size.height, size.width), strict=True):
                assert part == stride == length or (part - stride == OVERLAP and part >= LEAST_TILE)
            covered = torch.zeros(size.height, size.width)
            for row, column in tiles.plan(size.height, size.width):
                covered[row.start : row.end, column.start : column.end] += 1
            assert covered.min() == 1
            assert covered.sum() == computed_cells(tiles, size)
        spent.append(computed_cells(tiles, size))
    assert spent[0] == size.height * size.width
    assert spent == sorted(spent)
    assert spent[-1] > 1.5 * spent[0]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (2.9, None),
        (2.5, TileSettings(size=(60, 56), stride=(60, 48))),
        (1.5, TileSettings(size=(60, 40), stride=(60, 32))),
        (1.0, TileSettings(size=(60, 28), stride=(60, 20))),
        (0.7, TileSettings(size=(34, 28), stride=(26, 20))),
    ],
)
def test_the_whole_then_strips_then_the_cheapest_tiles(budget, expected):
    assert choose_tiles(REAL, BF16, AT_480P, int(budget * 1e9)) == expected


def test_no_other_tiles_that_fit_are_cheaper():
    budget = int(1e9)
    chosen = computed_cells(choose_tiles(REAL, BF16, AT_480P, budget), AT_480P)
    for rows, columns in itertools.product(range(LEAST_TILE, 61, 2), range(LEAST_TILE, 105, 4)):
        stride = (rows if rows == 60 else rows - OVERLAP, columns if columns == 104 else columns - OVERLAP)
        tiles = TileSettings(size=(rows, columns), stride=stride)
        if vae_peak_bytes(REAL, BF16, AT_480P, tiles) <= budget:
            assert computed_cells(tiles, AT_480P) >= 0.97 * chosen


def test_strips_are_never_low():
    for budget in BUDGETS:
        tiles = choose_tiles(REAL, BF16, AT_720P, int(budget * 1e9))
        if tiles is not None and tiles.size[1] == AT_720P.width:
            assert tiles.size[0] >= LEAST_STRIP


def test_a_budget_below_the_smallest_tiles_is_refused_with_what_is_missing():
    least = vae_peak_bytes(REAL, BF16, AT_480P, smallest_tiles(AT_480P))
    assert choose_tiles(REAL, BF16, AT_480P, least) == smallest_tiles(AT_480P)
    with pytest.raises(OutOfMemoryError, match=r"decode 832x480 .* takes 0.35 GB .* budget is 0.09 GB, 0.2\d GB short"):
        choose_tiles(REAL, BF16, AT_480P, int(0.1e9))
    assert issubclass(OutOfMemoryError, ValueError)


@pytest.mark.parametrize("size", [LatentSize(1, 2, 2), LatentSize(5, 2, 300), LatentSize(2, 23, 24)])
def test_sizes_that_can_hardly_be_cut(size):
    tiles = smallest_tiles(size)
    assert tiles.plan(size.height, size.width)
    assert vae_peak_bytes(REAL, BF16, size, tiles) <= vae_peak_bytes(REAL, BF16, size)
    with pytest.raises(OutOfMemoryError):
        choose_tiles(REAL, BF16, size, WORKSPACE_BYTES)


def test_counting_is_done_once(monkeypatch):
    vae_peak_bytes(REAL, BF16, AT_480P)
    monkeypatch.setattr(encoders, "count_vae_bytes", lambda *_: pytest.fail("counted again"))
    assert vae_peak_bytes(REAL, BF16, AT_720P) > vae_peak_bytes(REAL, BF16, AT_480P)
