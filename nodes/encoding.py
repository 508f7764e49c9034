"""What the nodes share that encode pictures and clips, and their encoders on the device while they work."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from ..wan_core.conditioning.encoders import LatentEncoder
from ..wan_core.conditioning.text import TextEncoder
from ..wan_core.decode import AUTO, Tiles, encode
from ..wan_core.memory.residency import on_device
from ..wan_core.models.image_encoder import ImageEncoder
from ..wan_core.models.vae import WanVAE
from ..wan_core.tiling import TileSettings
from . import host, sockets


class Encode:
    """A node that adds pictures or clips to conditioning."""

    CATEGORY = "WanCore/conditioning"
    FUNCTION = "encode"
    RETURN_TYPES = (sockets.CONDITIONING,)
    RETURN_NAMES = ("conditioning",)
    OUTPUT_TOOLTIPS = ("The conditioning with the pictures.",)

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """The size of every node's tiny form."""
        return dict(host.TINY_SIZE)


@contextmanager
def text_encoder_at_work(encoder: TextEncoder) -> Iterator[None]:
    """The text encoder's weights on the device inside the block."""
    device = host.runtime(encoder.dtype, host.weight_bytes(encoder.model)).device
    with on_device(encoder.model, device):
        yield


def tile_settings(
    tiled: bool = False, tile_height: int = 30, tile_width: int = 52, stride_height: int = 15, stride_width: int = 26
) -> Tiles:
    """The tile widgets (`sockets.tile_inputs`) as settings; off means tiles only where memory asks for them."""
    return TileSettings(size=(tile_height, tile_width), stride=(stride_height, stride_width)) if tiled else AUTO


@contextmanager
def encoders(vae: WanVAE, image_encoder: ImageEncoder | None, tiles: Tiles) -> Iterator[LatentEncoder]:
    """The VAE, ready to encode, and the image encoder on the device inside the block."""
    modules = [module for module in (vae, image_encoder) if module is not None]
    runtime = host.runtime(vae.dtype, sum(host.weight_bytes(module) for module in modules))
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(on_device(module, runtime.device))
        yield LatentEncoder(vae=vae, encode=partial(encode, vae, tiles=tiles, runtime=runtime))
