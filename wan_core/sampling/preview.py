"""Latents as small pictures, without the VAE."""

import torch
from PIL import Image
from torch import Tensor

# Colour of each latent channel and the grey they start from: a linear fit of Wan 2.1's pixels to its normalised
# latents, published in ComfyUI (comfy/latent_formats.py, Wan21).
RGB_FACTORS = (
    (-0.1299, -0.1692, 0.2932), (0.0671, 0.0406, 0.0442), (0.3568, 0.2548, 0.1747), (0.0372, 0.2344, 0.1420),
    (0.0313, 0.0189, -0.0328), (0.0296, -0.0956, -0.0665), (-0.3477, -0.4059, -0.2925), (0.0166, 0.1902, 0.1975),
    (-0.0412, 0.0267, -0.1364), (-0.1293, 0.0740, 0.1636), (0.0680, 0.3019, 0.1128), (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699), (0.0060, -0.0633, 0.0005), (0.3477, 0.2275, 0.2950), (0.1984, 0.0913, 0.1861),
)  # fmt: skip
RGB_BIAS = (-0.1835, -0.0868, -0.3360)


def latents_to_rgb(latents: Tensor) -> Tensor:
    """Normalised latents (B, 16, F, h, w) as colours (B, F, h, w, 3) in [0, 1], one pixel per latent cell."""
    factors = torch.tensor(RGB_FACTORS, device=latents.device)
    bias = torch.tensor(RGB_BIAS, device=latents.device)
    colours = latents.float().movedim(1, -1) @ factors + bias
    return colours.add_(1).div_(2).clamp_(0, 1)


def preview_frames(latents: Tensor) -> list[Image.Image]:
    """The latent frames of the first video of normalised latents (B, 16, F, h, w), as pictures of h x w."""
    return to_images(latents_to_rgb(latents[:1])[0])


def to_images(frames: Tensor) -> list[Image.Image]:
    """Frames (T, H, W, 3) in [0, 1] as pictures."""
    return [Image.fromarray(frame) for frame in frames.mul(255).to(torch.uint8).cpu().contiguous().numpy()]


def middle_frame(latents: Tensor) -> Tensor:
    """The latent frame (B, 16, 1, h, w) in the middle of the video."""
    return latents[:, :, latents.shape[2] // 2 :][:, :, :1]
