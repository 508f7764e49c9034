"""Which parts of a module are blocks, and what they weigh."""

import pytest
import torch
from torch import nn

from tests.reference import tiny_dit, tiny_image_encoder, tiny_motion_controller, tiny_text_encoder
from wan_core.offload.blocks import blocks_of, weight_bytes


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (tiny_dit("t2v"), [f"blocks.{i}" for i in range(4)]),
        (tiny_dit("vace"), [*(f"blocks.{i}" for i in range(4)), "vace_blocks.0", "vace_blocks.1"]),
        (tiny_dit("fun_camera"), [f"blocks.{i}" for i in range(4)]),
        (tiny_image_encoder(), [f"visual.transformer.{i}" for i in range(4)]),
        (tiny_text_encoder(), [f"blocks.{i}" for i in range(len(tiny_text_encoder().blocks))]),
        (tiny_motion_controller(), []),
        (nn.Sequential(nn.SiLU(), nn.SiLU()), []),
    ],
)
def test_blocks(module, expected):
    blocks = blocks_of(module)
    assert list(blocks) == expected
    assert all(module.get_submodule(path) is block for path, block in blocks.items())


def test_weight_bytes_counts_parameters_and_buffers_in_their_dtypes():
    layer = nn.Linear(8, 4).half()
    layer.register_buffer("scale", torch.ones(4, 1))
    assert weight_bytes(layer) == 2 * (32 + 4) + 4 * 4
