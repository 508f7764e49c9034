"""Latents to pixels on a device that may be too small for them."""

import gc

import torch
from torch import Tensor

from .models.vae import WanVAE
from .runtime import OutOfMemoryError, Runtime, is_out_of_memory, log
from .sampling.finite import check_latents
from .tiling import TileSettings

SMALLER_TILES = (TileSettings(), TileSettings(size=(16, 16), stride=(12, 12)))
"""What is tried when memory runs out, one after the other."""


@torch.no_grad()
def decode(vae: WanVAE, latents: Tensor, tiles: TileSettings | None, runtime: Runtime) -> Tensor:
    """Normalised latents (B, 16, F, h, w) to pixels (B, 3, T, H, W) in [-1, 1], float32.

    When the device runs out of memory the latents are decoded in tiles, then in smaller tiles, with a notice; the
    pixels are then gathered on the CPU.

    Raises:
        NonFiniteError: the latents hold NaN or infinity.
        OutOfMemoryError: the smallest tiles do not fit either.
    """
    check_latents(latents, "before decoding")
    height, width = latents.shape[-2:]
    tried = [tiles, *(t for t in SMALLER_TILES if _area(t, height, width) < _area(tiles, height, width))]
    for attempt, choice in enumerate(tried):
        try:
            place = runtime.device if attempt == 0 else torch.device("cpu")
            return vae.decode(latents.to(place), choice, runtime.chunks("Decoding"))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if attempt + 1 < len(tried):
            log.warning("Out of memory while decoding; trying tiles of %dx%d latent cells.", *tried[attempt + 1].size)
    raise OutOfMemoryError(
        f"Out of memory while decoding {width * 8}x{height * 8}, {latents.shape[2]} latent frames, even in tiles of "
        f"{tried[-1].size[0]}x{tried[-1].size[1]} latent cells. Close other programs that use the device, decode fewer "
        "frames at a time, or load the VAE with another device.",
        latents.cpu(),
    )


def _area(tiles: TileSettings | None, height: int, width: int) -> int:
    if tiles is None:
        return height * width
    return min(tiles.size[0], height) * min(tiles.size[1], width)
