"""Prompts to conditioning."""

from typing import Any

from ..wan_core.catalog import NEGATIVE_PROMPT
from ..wan_core.conditioning.text import TextEncoder, text_conditioning
from ..wan_core.memory.residency import on_device
from ..wan_core.types import Conditioning
from . import host, sockets


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
            },
        }

    def encode(self, text_encoder: TextEncoder, prompt: str, negative_prompt: str = "") -> tuple[Conditioning]:
        model = text_encoder.model
        device = host.runtime(model.norm.weight.dtype, host.weight_bytes(model)).device
        with on_device(model, device):
            cond = text_conditioning(text_encoder, prompt, negative_prompt)
        return (cond.to(host.resting_device()),)
