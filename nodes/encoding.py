"""Encoders on their device for the length of one node's work."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ..wan_core.conditioning.encoders import LatentEncoder
from ..wan_core.memory.residency import on_device
from ..wan_core.models.image_encoder import ImageEncoder
from ..wan_core.models.vae import WanVAE
from ..wan_core.tiling import TileSettings
from . import host


def tile_settings(
    tiled: bool = False, tile_height: int = 30, tile_width: int = 52, stride_height: int = 15, stride_width: int = 26
) -> TileSettings | None:
    """The tile widgets (`sockets.tile_inputs`) as settings; None when tiles are off."""
    return TileSettings(size=(tile_height, tile_width), stride=(stride_height, stride_width)) if tiled else None


@contextmanager
def encoders(vae: WanVAE, image_encoder: ImageEncoder | None, tiles: TileSettings | None) -> Iterator[LatentEncoder]:
    """The VAE, ready to encode, and the image encoder on the device inside the block."""
    modules = [module for module in (vae, image_encoder) if module is not None]
    runtime = host.runtime(vae.dtype, sum(host.weight_bytes(module) for module in modules))
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(on_device(module, runtime.device))
        yield LatentEncoder(vae=vae, tiles=tiles, on_chunk=runtime.chunks("Encoding"))
