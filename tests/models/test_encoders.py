"""UMT5 and the CLIP tower against the published code and against transformers."""

import pytest
import torch
from transformers.models.umt5.modeling_umt5 import UMT5Attention
from wancore.wan_core.models.text_encoder import relative_buckets

from tests.reference import load_case, relative_error, tiny_image_encoder, tiny_text_encoder


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


def test_buckets_equal_the_transformers_table():
    buckets = relative_buckets(201, 32, torch.device("cpu"))
    position = torch.arange(201)
    relative = position[None, :] - position[:, None]
    theirs = UMT5Attention._relative_position_bucket(_Attention, relative)
    assert torch.equal(buckets, theirs)


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
