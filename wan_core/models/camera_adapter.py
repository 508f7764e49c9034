"""Plücker rays to a residual on the patch embedding."""

import torch.nn.functional as F
from torch import Tensor, nn

RAY_STRIDE = 8
"""Rays come at pixel resolution; one latent cell covers 8 x 8 of them."""


class CameraResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside an identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x))) + x


class CameraAdapter(nn.Module):
    """Folded rays (B, 24, F, H, W) to tokens (B, F * h/2 * w/2, D) that are added to the patch embedding.

    The structure is that of VideoX-Fun's `SimpleAdapter`.
    """

    def __init__(self, channels: int, dim: int, patch: tuple[int, int], num_blocks: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels * RAY_STRIDE**2, dim, kernel_size=patch, stride=patch)
        self.residual_blocks = nn.Sequential(*(CameraResidualBlock(dim) for _ in range(num_blocks)))

    def forward(self, rays: Tensor) -> Tensor:
        batch = rays.shape[0]
        rays = rays.transpose(1, 2).flatten(0, 1).to(self.conv.weight.dtype)
        features = self.residual_blocks(self.conv(F.pixel_unshuffle(rays, RAY_STRIDE)))
        return features.flatten(2).transpose(1, 2).reshape(batch, -1, features.shape[1])
