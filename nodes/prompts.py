"""Prompts to conditioning: one for the video, or one for each window of a long one."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from wan_core.catalog import NEGATIVE_PROMPT, TINY_PRESET
from wan_core.conditioning.text import TextEncoder, text_conditioning
from wan_core.planning.encoders import text_peak_bytes as text_bytes
from wan_core.planning.modules import SizedModule
from wan_core.types import Conditioning

from . import host, planning, sockets
from .conditioning import working_module
from .options import Options


@contextmanager
def working_text_encoder(encoder: TextEncoder) -> Iterator[None]:
    """The text encoder's weights on the device inside the block, streamed where they do not fit."""
    activations = text_bytes(encoder.model.config, encoder.dtype)
    with working_module(encoder.model, encoder.dtype, activations):
        yield


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

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """A prompt in words that the bundled text encoder knows."""
        return {"prompt": host.TINY_PROMPT, "negative_prompt": TINY_PRESET.negative_prompt}

    @classmethod
    def plan_outputs(cls, text_encoder: Any, **_: Any) -> tuple[planning.PlannedConditioning]:
        return (planning.PlannedConditioning(planning.require(SizedModule, "text_encoder", text_encoder)),)

    def encode(
        self, text_encoder: TextEncoder, prompt: str, negative_prompt: str = "", cache_on_disk: bool = False
    ) -> tuple[Conditioning]:
        encoder = text_encoder.kept_in(host.current.prompts_dir() if cache_on_disk else None)
        cond = text_conditioning(encoder, prompt, negative_prompt, partial(working_text_encoder, encoder))
        return (cond.to(host.current.offload_device()),)


class WindowPrompts(Options):
    """A prompt for every window."""

    CATEGORY = "WanCore/long video"
    DESCRIPTION = "One prompt per line, one line per window of a long video. Further windows use the last line."
    RETURN_TYPES = (sockets.PROMPTS,)
    RETURN_NAMES = ("prompts",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "text_encoder": sockets.socket(sockets.TEXT_ENCODER, "From the text encoder loader."),
                "prompts": sockets.text("", "What each window shows, one line per window."),
            },
            "optional": {
                "negative_prompt": sockets.text("", "What to avoid, the same in all windows."),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, prompts: str | None = None) -> bool | str:
        return True if prompts is None or prompts.strip() else "prompts needs at least one line."

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """Two prompts in words that the bundled text encoder knows."""
        lines = (host.TINY_PROMPT, host.TINY_PROMPT.replace("red", "blue"))
        return {"prompts": "\n".join(lines), "negative_prompt": TINY_PRESET.negative_prompt}

    @classmethod
    def plan_outputs(cls, **inputs: Any) -> tuple[planning.PlannedConditioning]:
        return (planning.PlannedConditioning(planning.require(SizedModule, "text_encoder", inputs["text_encoder"])),)

    def build(
        self, text_encoder: TextEncoder, prompts: str, negative_prompt: str = ""
    ) -> tuple[tuple[Conditioning, ...]]:
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not lines:
            raise ValueError("prompts needs at least one line.")
        cond = text_conditioning(text_encoder, lines, negative_prompt, partial(working_text_encoder, text_encoder))
        cond = cond.to(host.current.offload_device())
        return (tuple(cond.map(partial(_row, i)) for i in range(len(lines))),)


def _row(index: int, tensor: Tensor, _: object) -> Tensor:
    return tensor[index : index + 1]
