"""The noise that a run starts from."""

import torch
from torch import Tensor


def initial_noise(
    shape: tuple[int, ...], seed: int, rand_device: torch.device | str, device: torch.device, prefix: int = 0
) -> Tensor:
    """Standard normal noise (B, C, prefix + F, h, w) in float32 for `shape` = (B, C, F, h, w), drawn on `rand_device`.

    Drawn on the CPU it is the same on every machine, and without a prefix equal to ComfyUI's for the same shape and
    seed. The noise of the prefix frames is drawn after that of the video, so the video's does not depend on them.
    """
    generator = torch.Generator(rand_device).manual_seed(seed)

    def draw(frames: int) -> Tensor:
        size = (*shape[:2], frames, *shape[3:])
        return torch.randn(size, generator=generator, device=rand_device, dtype=torch.float32).to(device)

    video = draw(shape[2])
    return torch.cat((draw(prefix), video), 2) if prefix else video
