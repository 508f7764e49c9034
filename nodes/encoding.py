"""What the nodes share that encode pictures and clips, and their encoders on the device while they work."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from wan_core.budget.room import IMAGE_ENCODER_BYTES, encoder_at_work
from wan_core.budget.text import peak_bytes as text_bytes
from wan_core.conditioning.encoders import LatentEncoder
from wan_core.conditioning.text import TextEncoder
from wan_core.decode import AUTO, Tiles, encode
from wan_core.models.image_encoder import ImageEncoder
from wan_core.models.vae import WanVAE
from wan_core.runtime import Runtime
from wan_core.tiling import TileSettings

from . import host, sockets


class Tiled:
    """A node with the widgets of tiles, which are checked before anything runs."""

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        tiled: bool | None = False,
        tile_height: int | None = 30,
        tile_width: int | None = 52,
        stride_height: int | None = 15,
        stride_width: int | None = 26,
    ) -> bool | str:
        # What comes over a link (None) is judged when it is there.
        sizes = {"tile_height": tile_height, "tile_width": tile_width}
        strides = {"stride_height": stride_height, "stride_width": stride_width}
        for (name, size), (other, stride) in zip(sizes.items(), strides.items(), strict=True):
            if tiled and None not in (size, stride) and not 1 <= stride <= size:
                return f"{other} must be from 1 to {name}, or tiles leave gaps; got {stride} and {size}."
        return True


class Encode(Tiled):
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
    """The text encoder's weights on the device inside the block, streamed where they do not fit."""
    activations = text_bytes(encoder.model.config, encoder.dtype)
    with at_work(encoder.model, encoder.dtype, activations):
        yield


@contextmanager
def at_work(module: nn.Module, dtype: torch.dtype, activations: int = 0) -> Iterator[Runtime]:
    """A model on the device inside the block, with the host's services; its weights wait there for the next use."""
    runtime = host.runtime(dtype)
    with encoder_at_work(module, runtime, host.memory_settings(), activations, keep=host.keeps_weights()):
        yield runtime
    host.account_for(module)


def tile_settings(
    tiled: bool = False, tile_height: int = 30, tile_width: int = 52, stride_height: int = 15, stride_width: int = 26
) -> Tiles:
    """The tile widgets (`sockets.tile_inputs`) as settings; off means tiles only where memory asks for them."""
    return TileSettings(size=(tile_height, tile_width), stride=(stride_height, stride_width)) if tiled else AUTO


@contextmanager
def encoders(vae: WanVAE, image_encoder: ImageEncoder | None, tiles: Tiles) -> Iterator[LatentEncoder]:
    """The VAE, ready to encode, and the image encoder on the device inside the block."""
    with ExitStack() as stack:
        runtime = stack.enter_context(at_work(vae, vae.dtype))
        if image_encoder is not None:
            stack.enter_context(at_work(image_encoder, vae.dtype, IMAGE_ENCODER_BYTES))
        yield LatentEncoder(vae=vae, encode=partial(encode, vae, tiles=tiles, runtime=runtime))
