"""Device memory of encoding prompts."""

from dataclasses import replace
from functools import cache

import torch

from ..models.config import TextEncoderConfig
from ..models.text_encoder import UMT5Encoder
from .counting import META, counted


@cache
def peak_bytes(config: TextEncoderConfig, dtype: torch.dtype, tokens: int = 512, prompts: int = 2) -> int:
    """Peak bytes on the device of encoding `prompts` texts of `tokens` tokens each, beside the weights.

    Attention is counted as fused kernels run it. All layers are alike, so two stand for all.
    """
    with META:
        encoder = UMT5Encoder(replace(config, num_layers=min(config.num_layers, 2))).requires_grad_(False).to(dtype)
        ids, mask = torch.empty(prompts, tokens, dtype=torch.long), torch.empty(prompts, tokens, dtype=torch.bool)
    with counted(*encoder.parameters(), ids, mask) as counter:
        encoder.encode([row for row in ids])
    return counter.peak
