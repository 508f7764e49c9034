"""The vision tower of open-CLIP XLM-RoBERTa ViT-H/14, up to its last layer but one."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import sdpa
from .config import ImageEncoderConfig
from .ops import Linear

EPS = 1e-5
SIDE = 224
"""Pixels of the square that the tower reads."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Pixel statistics of CLIP's training data (openai/CLIP)."""


class VisionAttention(nn.Module):
    """Self-attention with fused projections."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(x), "b s (qkv n d) -> qkv b s n d", qkv=3, n=self.num_heads)
        return self.proj(sdpa(q, k, v).flatten(2))


class VisionBlock(nn.Module):
    """x (B, N, D) to x (B, N, D)."""

    def __init__(self, dim: int, mlp_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, EPS)
        self.attn = VisionAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, EPS)
        self.mlp = nn.Sequential(Linear(dim, mlp_dim), nn.GELU(), Linear(mlp_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Parameters under `visual.`; `head` and `post_norm` belong to the file but not to what Wan reads."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        dim = config.dim
        self.patch_embedding = nn.Conv2d(3, dim, config.patch_size, config.patch_size, bias=False)
        self.cls_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, config.num_positions, dim))
        self.pre_norm = nn.LayerNorm(dim, EPS)
        self.transformer = nn.Sequential(
            *(VisionBlock(dim, config.mlp_dim, config.num_heads) for _ in range(config.num_layers))
        )
        self.post_norm = nn.LayerNorm(dim, EPS)
        self.head = nn.Parameter(torch.zeros(dim, config.out_dim))


class ImageEncoder(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] of any size to tokens (B, 257, 1280).

    Images are stretched to 224 x 224 with a bicubic filter and no antialiasing, as Wan-Video/Wan2.1 wan/modules/clip.py
    does; the output is what the last layer but one leaves, without a final norm.
    """

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config)

    def forward(self, images: Tensor) -> Tensor:
        visual = self.visual
        weight = visual.patch_embedding.weight
        pixels = F.interpolate(images.to(weight.device).float(), (SIDE, SIDE), mode="bicubic", align_corners=False)
        mean, std = (torch.tensor(v, device=weight.device).view(1, 3, 1, 1) for v in (MEAN, STD))
        pixels = ((pixels * 0.5 + 0.5) - mean) / std
        patches = visual.patch_embedding(pixels.to(weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat((visual.cls_embedding.expand(len(patches), -1, -1), patches), 1) + visual.pos_embedding
        x = visual.pre_norm(x)
        for block in [*visual.transformer][:-1]:
            x = block(x)
        return x
