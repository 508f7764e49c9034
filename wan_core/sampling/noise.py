"""The noise that a run starts from."""

import torch
from torch import Tensor


def initial_noise(
    shape: tuple[int, ...], seed: int, rand_device: torch.device | str, device: torch.device, prefix: int = 0
) -> Tensor:
    """Standard normal noise (B, C, prefix + F, h, w) in float32 for `shape` = (B, C, F, h, w), drawn on `rand_device`.

    Drawn on the CPU it is the same on every machine, and without a prefix equal to ComfyUI's for the same shape and
    seed. Prefix frames are drawn as the reference does it, so that a seed gives its film: all frames in one draw, of
    which the last `prefix` ones are moved to the front (DiffSynth-Studio, `WanVideoUnit_NoiseInitializer`).
    """
    generator = torch.Generator(rand_device).manual_seed(seed)
    size = (*shape[:2], prefix + shape[2], *shape[3:])
    noise = torch.randn(size, generator=generator, device=rand_device, dtype=torch.float32).to(device)
    return noise.roll(prefix, 2) if prefix else noise
