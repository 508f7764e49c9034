"""Memory of encoding prompts at UMT5-XXL's shapes, counted on the meta device, and layers apart from their table."""

import pytest
import torch

from tests.reference import load_case, tiny_text_encoder
from wan_core.models.config import TextEncoderConfig
from wan_core.models.ops import on_meta
from wan_core.models.text_encoder import UMT5Encoder
from wan_core.planning.encoders import text_peak_bytes
from wan_core.planning.estimate import LiveBytes

META = torch.device("meta")
XXL = TextEncoderConfig()


def weight_bytes(module):
    return sum(p.numel() * p.element_size() for p in module.parameters())


def test_two_long_prompts_on_a_4_gb_device():
    """The table of token embeddings stays on the host; two of the 24 layers are on the device at a time."""
    with on_meta():
        encoder = UMT5Encoder(XXL).to(torch.bfloat16)
    slots = 2 * max(weight_bytes(block) for block in encoder.blocks)
    table = weight_bytes(encoder.token_embedding)
    resident = weight_bytes(encoder) - weight_bytes(encoder.blocks) - table
    needed = slots + resident + text_peak_bytes(XXL, torch.bfloat16, 512, 2)
    assert table > 2e9
    assert slots == pytest.approx(0.771e9, rel=0.01)
    assert needed < 1e9


def test_the_count_is_that_of_all_layers_with_the_table_on_the_host():
    small_table = TextEncoderConfig(vocab_size=32)
    with on_meta():
        encoder = UMT5Encoder(small_table).requires_grad_(False).to(torch.bfloat16)
    encoder.token_embedding = torch.nn.Embedding(32, XXL.dim, dtype=torch.bfloat16, device="cpu")
    ids, mask = torch.zeros(2, 300, dtype=torch.long), torch.ones(2, 300, dtype=torch.bool)
    with torch.no_grad(), LiveBytes(META, encoder.parameters()) as counter:
        out = encoder(ids, mask)
    assert out.device == META
    assert out.shape == (2, 300, XXL.dim)
    # The plain form of attention, which the meta device runs, also holds its logits.
    logits = 300 * 300 * XXL.num_heads * 4
    predicted = text_peak_bytes(XXL, torch.bfloat16, 300, 2)
    assert predicted <= counter.peak <= predicted + 4 * logits + out.nbytes


def test_memory_grows_with_tokens_and_little_with_prompts():
    one, two = (text_peak_bytes(XXL, torch.bfloat16, 512, prompts) for prompts in (1, 2))
    assert one < two < 1.2 * one
    assert text_peak_bytes(XXL, torch.bfloat16, 100, 1) < one / 4


def test_a_table_of_another_dtype_gives_rows_of_the_layers():
    case, encoder = load_case("umt5"), tiny_text_encoder()
    expected = encoder(case["ids"], case["mask"])
    encoder.token_embedding.to(torch.float64)
    assert torch.equal(encoder(case["ids"], case["mask"]), expected)
