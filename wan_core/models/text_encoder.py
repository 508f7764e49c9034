"""The UMT5 encoder: token ids to embeddings."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import sdpa
from .config import TextEncoderConfig
from .ops import Linear, add_, gelu_tanh_, rms_norm

EPS = 1e-6
MAX_DISTANCE = 128
"""Relative positions beyond this share one bucket."""

FLOAT16_LIMIT = 65504.0
"""UMT5 overflows float16 after attention and feed-forward, where the official code clamps."""


def relative_buckets(length: int, num_buckets: int, device: torch.device) -> Tensor:
    """The bias table row of every distance from query to key, 1 - length to length - 1: (2 * length - 1,).

    Half of the buckets are for keys after the query. In each half the first half is one bucket per position, the rest
    grow logarithmically up to `MAX_DISTANCE` (T5, bidirectional).
    """
    relative = torch.arange(1 - length, length, device=device)
    half = num_buckets // 2
    exact = half // 2
    distance = relative.abs()
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(MAX_DISTANCE / exact) * (half - exact)
    far = (exact + growth.long()).clamp(max=half - 1)
    return (relative > 0).long() * half + torch.where(distance < exact, distance, far)


class T5Norm(nn.Module):
    """RMS norm without mean or bias, computed in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, EPS)


class RelativePosition(nn.Module):
    """A bias per bucket and head; UMT5 has a table in every layer."""

    def __init__(self, num_buckets: int, num_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def forward(self, buckets: Tensor) -> Tensor:
        """Buckets of all distances (2L - 1,) to a bias (1, heads, L, L) for queries from the last to the first.

        In this order the row of each query begins one place further in the list of distances, so the bias is a view of
        (heads, 2L - 1) numbers instead of a tensor of heads x L x L.
        """
        line = self.embedding(buckets).T.contiguous()
        return line.unfold(1, (len(buckets) + 1) // 2, 1)[None]


class T5Attention(nn.Module):
    """Self-attention without the usual scaling of the logits."""

    def __init__(self, dim: int, attention_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (Linear(dim, attention_dim, bias=False) for _ in range(3))
        self.o = Linear(attention_dim, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """`bias` is that of `RelativePosition`; its queries run from the last to the first, hence both flips."""
        q, k, v = (rearrange(layer(x), "b l (n d) -> b l n d", n=self.num_heads) for layer in (self.q, self.k, self.v))
        return self.o(sdpa(q.flip(1), k, v, mask=bias, scale=1.0).flip(1).flatten(2))


class T5FeedForward(nn.Module):
    """Gated GELU."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(Linear(dim, ffn_dim, bias=False), nn.GELU("tanh"))
        self.fc1 = Linear(dim, ffn_dim, bias=False)
        self.fc2 = Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x) * gelu_tanh_(self.gate[0](x)))


class T5Block(nn.Module):
    """x (B, L, D) to x (B, L, D)."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.norm1 = T5Norm(config.dim)
        self.attn = T5Attention(config.dim, config.attention_dim, config.num_heads)
        self.norm2 = T5Norm(config.dim)
        self.ffn = T5FeedForward(config.dim, config.ffn_dim)
        self.pos_embedding = RelativePosition(config.num_buckets, config.num_heads)

    def forward(self, x: Tensor, buckets: Tensor) -> Tensor:
        x = _finite(add_(x, self.attn(self.norm1(x), self.pos_embedding(buckets))))
        return _finite(add_(x, self.ffn(self.norm2(x))))


class UMT5Encoder(nn.Module):
    """Token ids (B, L) and a mask of real tokens (B, L) to embeddings (B, L, D), zero where the mask is.

    Each text is encoded by itself, at its own length, so its rows are the same bits whatever else is in the batch.
    Every layer runs for all texts before the next one, so that streamed weights are copied once. The table of token
    embeddings may be on another device than the layers: only the rows that are looked up are moved.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(T5Block(config) for _ in range(config.num_layers))
        self.norm = T5Norm(config.dim)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Padding follows the real tokens."""
        lengths = mask.sum(1).int().tolist()
        rows = self.encode([text[:length] for text, length in zip(ids, lengths, strict=True)])
        # Not written into views of one tensor: those of an iteration are closed to gradients.
        return torch.stack([F.pad(row, (0, 0, 0, ids.shape[1] - len(row))) for row in rows])

    def encode(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """Token ids (L,) of several texts to their embeddings (L, D)."""
        table, weight = self.token_embedding.weight, self.norm.weight
        states = [self.token_embedding(ids[None].to(table.device)).to(weight.device, weight.dtype) for ids in texts]
        buckets = {x.shape[1]: relative_buckets(x.shape[1], self.config.num_buckets, weight.device) for x in states}
        for block in self.blocks:
            states = [block(x, buckets[x.shape[1]]) for x in states]
        return [self.norm(x)[0] for x in states]


def _finite(x: Tensor) -> Tensor:
    return x.clamp_(-FLOAT16_LIMIT, FLOAT16_LIMIT) if x.dtype == torch.float16 else x
