"""Prompts to conditioning."""

from functools import partial
from typing import Any

from wan_core.catalog import NEGATIVE_PROMPT
from wan_core.conditioning.text import TextEncoder, text_conditioning
from wan_core.types import Conditioning

from . import host, sockets
from .encoding import text_encoder_at_work


class TextEncode:
    """Both prompts through UMT5 in one pass."""

    CATEGORY = "WanCore/conditioning"
    FUNCTION = "encode"
    DESCRIPTION = "Turn a prompt and a negative prompt into conditioning."
    RETURN_TYPES = (sockets.CONDITIONING,)
    RETURN_NAMES = ("conditioning",)
    OUTPUT_TOOLTIPS = ("Conditioning with the text of both prompts, for the sampler.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "text_encoder": sockets.socket(sockets.TEXT_ENCODER, "From the text encoder loader."),
                "prompt": sockets.text("", "What the video shows, in English or Chinese."),
            },
            "optional": {
                "negative_prompt": sockets.text(
                    NEGATIVE_PROMPT, "What to avoid. The default is the authors' own. Unused at cfg 1."
                ),
                "cache_on_disk": sockets.flag(
                    False, "Keep encoded prompts in ComfyUI's user folder (wancore/prompts), up to 4 MB each."
                ),
            },
        }

    def encode(
        self, text_encoder: TextEncoder, prompt: str, negative_prompt: str = "", cache_on_disk: bool = False
    ) -> tuple[Conditioning]:
        encoder = text_encoder.kept_in(host.prompts_dir() if cache_on_disk else None)
        cond = text_conditioning(encoder, prompt, negative_prompt, partial(text_encoder_at_work, encoder))
        return (cond.to(host.resting_device()),)
