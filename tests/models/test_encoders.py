"""UMT5 and the CLIP tower against the published code and against transformers."""

import pytest
import torch
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from tests.reference import load_case, relative_error, tiny_image_encoder, tiny_text_encoder
from wan_core.models.text_encoder import RelativePosition, relative_buckets


def test_text_encoder_equals_the_published_code():
    case = load_case("umt5")
    assert relative_error(tiny_text_encoder()(case["ids"], case["mask"]), case["output"]) < 1e-5


def test_what_follows_a_text_does_not_reach_it():
    case, encoder = load_case("umt5"), tiny_text_encoder()
    length = int(case["mask"][1].sum())
    alone = encoder(case["ids"][1:, :length], case["mask"][1:, :length])
    together = encoder(case["ids"], case["mask"])[1:]
    assert relative_error(together[:, :length], alone) < 1e-5
    assert not together[:, length:].any()


@pytest.mark.parametrize("length", [1, 2, 7, 201])
def test_the_bias_of_every_pair_is_that_of_transformers(length):
    position = torch.arange(length)
    theirs = UMT5Attention._relative_position_bucket(_Attention, position[None, :] - position[:, None])
    table = RelativePosition(32, 4)
    bias = table(relative_buckets(length, 32, torch.device("cpu")))
    assert torch.equal(bias[0].flip(1), table.embedding(theirs).permute(2, 0, 1))


class _Attention:
    relative_attention_num_buckets = 32
    relative_attention_max_distance = 128
    is_decoder = False


@pytest.mark.parametrize("size", [(60, 90), (224, 224), (17, 300)])
def test_image_encoder_takes_any_size(size):
    tokens = tiny_image_encoder()(torch.zeros(2, 3, *size))
    assert tokens.shape == (2, 257, 160)


def test_image_encoder_equals_the_published_code():
    case = load_case("clip")
    assert relative_error(tiny_image_encoder()(case["image"]), case["output"]) < 1e-5
