"""The noise that a run starts from."""

import torch
from torch import Tensor


def initial_noise(shape: tuple[int, ...], seed: int, rand_device: torch.device | str, device: torch.device) -> Tensor:
    """Standard normal noise in float32, drawn on `rand_device` and moved to `device`.

    Drawn on the CPU it is the same on every machine, and equal to ComfyUI's for the same shape and seed.
    """
    generator = torch.Generator(rand_device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=rand_device, dtype=torch.float32).to(device)
