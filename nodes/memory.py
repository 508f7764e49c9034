"""How much of the card a run may use."""

from typing import Any

from ..wan_core.settings import MemorySettings
from . import sockets


class Memory:
    """A limit for the sampler."""

    CATEGORY = "WanCore/speed and memory"
    FUNCTION = "build"
    DESCRIPTION = (
        "Limit what a run uses of the card. Blocks that do not fit are copied to it while the one before computes, so "
        "that large models run on small cards. Without this node all that is free is used."
    )
    RETURN_TYPES = (sockets.MEMORY,)
    RETURN_NAMES = ("memory",)
    OUTPUT_TOOLTIPS = ("For the socket of that name on the sampler.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "vram_limit": sockets.number(
                    0.0, 0.0, 1024.0, "GiB in use on the card by all programs. 0: all that it has."
                ),
                "stream_all": sockets.flag(False, "Keep no block on the card: the least memory that there is."),
            },
            "optional": {
                "vram_buffer": sockets.number(
                    0.0, 0.0, 1024.0, "GiB left to what is not weights. 0: computed from the video's size."
                ),
            },
        }

    def build(self, vram_limit: float, stream_all: bool, vram_buffer: float = 0.0) -> tuple[MemorySettings]:
        limit = 0.0 if stream_all else vram_limit or None
        return (MemorySettings(vram_limit=limit, vram_buffer=vram_buffer or None),)
