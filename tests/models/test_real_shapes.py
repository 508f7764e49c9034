"""The models at their published sizes, on the meta device: parameters, keys, arithmetic. Nothing is allocated."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wan_core.models.config import DiTConfig
from wan_core.models.dit import WanDiT
from wan_core.models.ops import on_meta
from wan_core.types import Conditioning, VideoSize

LARGE = dict(dim=5120, ffn_dim=13824, num_layers=40)
IMAGE = dict(in_channels=36, has_image_input=True)
CONTROL = dict(in_channels=48, has_image_input=True)
CAMERA = dict(in_channels=32, has_image_input=True, camera_channels=24)
SMALL_VACE = dict(vace_layers=tuple(range(0, 30, 2)), vace_channels=96)
LARGE_VACE = dict(vace_layers=tuple(range(0, 40, 5)), vace_channels=96)

# The table of published structures: tensors, and parameters in billions.
STRUCTURES = {
    "T2V-1.3B": (DiTConfig(), 825, 1.4190),
    "T2V-14B": (DiTConfig(**LARGE), 1095, 14.2885),
    "I2V-14B": (DiTConfig(**LARGE, **IMAGE), 1303, 16.3949),
    "FLF2V-14B": (DiTConfig(**LARGE, **IMAGE, image_positions=514), 1304, 16.3955),
    "Fun-1.3B-InP": (DiTConfig(**IMAGE), 983, 1.5644),
    "Fun-1.3B-Control": (DiTConfig(**CONTROL), 983, 1.5645),
    "Fun-14B-Control": (DiTConfig(**LARGE, **CONTROL), 1303, 16.3951),
    "Fun-V1.1-1.3B-Control": (DiTConfig(**CONTROL, has_reference=True), 985, 1.5646),
    "Fun-V1.1-14B-Control": (DiTConfig(**LARGE, **CONTROL, has_reference=True), 1305, 16.3955),
    "Fun-V1.1-1.3B-Camera": (DiTConfig(**CAMERA), 989, 1.6163),
    "Fun-V1.1-14B-Camera": (DiTConfig(**LARGE, **CAMERA), 1309, 16.8981),
    "VACE-1.3B": (DiTConfig(**SMALL_VACE), 1264, 2.1540),
    "VACE-14B": (DiTConfig(**LARGE, **LARGE_VACE), 1331, 17.3376),
    "I2V-A14B": (DiTConfig(**LARGE, in_channels=36), 1095, 14.2889),
    "Fun-A14B-Control": (DiTConfig(**LARGE, in_channels=52, has_reference=True), 1097, 14.2896),
    "Fun-A14B-Camera": (DiTConfig(**LARGE, in_channels=36, camera_channels=24), 1101, 14.7922),
}


def without_data(config: DiTConfig) -> WanDiT:
    with on_meta():
        return WanDiT(config).requires_grad_(False)


@pytest.mark.parametrize("name", STRUCTURES)
def test_tensors_and_parameters_equal_the_published_table(name):
    config, tensors, billions = STRUCTURES[name]
    weights = without_data(config).state_dict()
    assert len(weights) == tensors
    assert round(sum(t.numel() for t in weights.values()) / 1e9, 4) == billions


def analytic_flops(config: DiTConfig, tokens: int, text: int) -> int:
    """Multiplications and additions of one forward without anything done twice."""
    d, f = config.dim, config.ffn_dim
    attention = 8 * tokens * d * d + 4 * tokens * tokens * d
    cross = 4 * tokens * d * d + 4 * text * d * d + 4 * tokens * text * d
    blocks = config.num_layers * (attention + cross + 4 * tokens * d * f)
    ends = 2 * tokens * d * 4 * (config.in_channels + config.out_channels)
    return blocks + ends + 2 * text * d * (config.text_dim + d) + 2 * d * (config.freq_dim + 7 * d)


@pytest.mark.parametrize("name", ["T2V-1.3B", "T2V-14B"])
def test_one_forward_does_no_more_than_it_must(name):
    config = dataclasses.replace(STRUCTURES[name][0], num_layers=3)  # which are all alike
    dit, size = without_data(config), VideoSize.rounded(832, 480, 81).latent
    x = torch.empty(1, 16, *size.shape, device="meta")
    cond = Conditioning(text=torch.empty(1, 512, config.text_dim, device="meta"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = dit(x, torch.empty(1, device="meta"), cond)
    tokens = size.frames * size.height * size.width // 4
    assert out.shape == x.shape
    assert tokens == 32760
    assert counter.get_total_flops() == pytest.approx(analytic_flops(config, tokens, 512), rel=1e-3)
