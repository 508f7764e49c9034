"""Timesteps, image tokens, camera rays and motion buckets as vectors of the DiT's width."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import MotionControllerConfig
from .ops import Linear


def sinusoid(position: Tensor, width: int) -> Tensor:
    """Cosines then sines of `position` (B,), (B, width) in float32.

    Angles are computed in float64 where the device has it, as in Wan-Video/Wan2.1 `sinusoidal_embedding_1d`; bfloat16
    would round timestep 937.5 to 936.
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


class CameraResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside an identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x))) + x


class CameraAdapter(nn.Module):
    """Folded rays (B, 24, F, H, W) to tokens (B, S, D) that are added to the patch embedding. Rays come at pixel
    resolution; a latent cell covers `stride` x `stride` of them.

    The structure is that of VideoX-Fun's `SimpleAdapter`.
    """

    def __init__(self, channels: int, dim: int, patch: tuple[int, int], stride: int, num_blocks: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels * stride**2, dim, kernel_size=patch, stride=patch)
        self.residual_blocks = nn.Sequential(*(CameraResidualBlock(dim) for _ in range(num_blocks)))

    def forward(self, rays: Tensor) -> Tensor:
        batch = rays.shape[0]
        # Every frame by itself: 24 channels, and with each cell's 8 x 8 pixels as channels 1536 of them.
        rays = rearrange(rays, "b c f h w -> (b f) c h w").to(self.conv.weight.dtype)
        features = self.residual_blocks(self.conv(F.pixel_unshuffle(rays, self.stride)))
        return rearrange(features, "(b f) d h w -> b (f h w) d", b=batch)


BUCKET_SCALE = 10.0
"""The bucket 0..100 is scaled to the range of a timestep, 0..1000, for the sinusoid (DiffSynth-Studio
`wan_video_motion_controller`).
"""


class MotionController(nn.Module):
    """Motion buckets (B,) to offsets (B, 6, D), added to the modulation of every block."""

    def __init__(self, config: MotionControllerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.linear = nn.Sequential(
            Linear(config.freq_dim, dim), nn.SiLU(), Linear(dim, dim), nn.SiLU(), Linear(dim, 6 * dim)
        )

    def forward(self, motion_bucket: Tensor) -> Tensor:
        weight = self.linear.get_parameter("0.weight")
        embedding = sinusoid(motion_bucket.to(weight.device, torch.float32) * BUCKET_SCALE, self.config.freq_dim)
        return self.linear(embedding.to(weight.dtype)).unflatten(1, (6, self.config.dim)).float()
