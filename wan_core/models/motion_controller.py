"""The speed-control adapter: a motion bucket becomes an offset on the time modulation."""

import torch
from torch import Tensor, nn

from .config import MotionControllerConfig
from .embedders import sinusoid
from .linear import Linear

BUCKET_SCALE = 10.0
"""The bucket 0..100 is stretched to the range of a timestep before its sinusoid (DiffSynth-Studio
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
