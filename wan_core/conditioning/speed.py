"""Speed control."""

import torch

from ..settings import check_number
from ..types import Conditioning

SLOWEST, FASTEST = 0.0, 100.0


def speed_conditioning(cond: Conditioning, motion_bucket_id: float) -> Conditioning:
    """`cond` with a speed of motion from 0 to 100; it takes a model that the speed-control adapter was loaded beside.

    Raises:
        ValueError: the number is out of range.
    """
    check_number("motion_bucket_id", motion_bucket_id, low=SLOWEST, high=FASTEST)
    return cond.given("motion_bucket_id", motion_bucket=torch.tensor([float(motion_bucket_id)]))
