"""Sinusoids and the image token projector."""

import math

import torch
from torch import Tensor, nn

from .linear import Linear


def sinusoid(position: Tensor, width: int) -> Tensor:
    """Cosines then sines of `position` (B,), (B, width) in float32.

    Angles are computed in float64 where the device has it, as Wan-Video/Wan2.1 `sinusoidal_embedding_1d` does; bfloat16
    would already round timestep 937.5 to 936.
    """
    precise = torch.float32 if position.device.type == "mps" else torch.float64
    half = torch.arange(width // 2, dtype=precise, device=position.device)
    angle = position.to(precise)[:, None] * torch.exp(half * (-math.log(10000.0) / (width // 2)))
    return torch.cat((angle.cos(), angle.sin()), 1).float()


class ImageTokens(nn.Module):
    """CLIP image tokens (B, N, image_dim) projected to the model width, (B, N, D)."""

    def __init__(self, image_dim: int, dim: int, positions: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim),
            Linear(image_dim, image_dim),
            nn.GELU(),
            Linear(image_dim, dim),
            nn.LayerNorm(dim),
        )
        self.emb_pos = nn.Parameter(torch.zeros(1, positions, image_dim)) if positions else None

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.to(self.proj.get_parameter("1.weight").dtype)
        return self.proj(tokens if self.emb_pos is None else tokens + self.emb_pos)
