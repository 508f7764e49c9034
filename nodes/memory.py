"""What a checkpoint is, how much of the card a run may use, and what it will take."""

from typing import Any

from wan_core.conditioning.text import TextEncoder
from wan_core.inspection import report
from wan_core.model import VideoModel
from wan_core.models.vae import WanVAE
from wan_core.planning.fit import fit_plan, text_of
from wan_core.planning.job import InputSizes, Job
from wan_core.planning.modules import SizedExpert, SizedModule
from wan_core.runtime import GIB
from wan_core.settings import CacheSettings, GuidanceSettings, MemorySettings, SamplerSettings, WindowSettings
from wan_core.types import Conditioning, VideoSize

from . import host, planning, sockets

FOLDERS = ("diffusion_models", "text_encoders", "vae", "clip_vision", "loras")


class CheckpointInfo:
    """Kind, variant, size, needs and preset of a model file, read from its header."""

    CATEGORY = "WanCore/loaders"
    FUNCTION = "inspect"
    OUTPUT_NODE = True
    DESCRIPTION = (
        "Say what a model file is, what it takes and which settings its authors recommend. Reads only its header."
    )
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_TOOLTIPS = ("The report, one fact per line.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        files = [f"{folder}/{name}" for folder in FOLDERS for name in host.current.list_files(folder)]
        listed = files or ["none"]
        return {"required": {"file": sockets.choice(listed, listed[0], "A file in one of ComfyUI's model folders.")}}

    def inspect(self, file: str) -> dict[str, Any]:
        folder, _, name = file.partition("/")
        text = str(report(host.current.find_file(folder, name)))
        return {"ui": {"text": [text]}, "result": (text,)}


class Memory(planning.Settings):
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


class MemoryPlan:
    """What a run will take."""

    CATEGORY = "WanCore/speed and memory"
    FUNCTION = "plan"
    OUTPUT_NODE = True
    DESCRIPTION = (
        "Say what a run will take of the card and of host memory, and with which settings it fits, without running it. "
        "Connect what the sampler gets."
    )
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_TOOLTIPS = ("The plan as text.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": sockets.socket(sockets.MODEL, "From the model loader."),
                "conditioning": sockets.socket(sockets.CONDITIONING, "As the sampler gets it."),
                **sockets.size_inputs(),
                "cfg": sockets.number(5.0, 0.0, 100.0, "As in the sampler; 1 runs one branch."),
                "vram": sockets.number(0.0, 0.0, 1024.0, "GiB that the run may use. 0: what this card has free."),
            },
            "optional": {
                "memory": sockets.socket(sockets.MEMORY, "As the sampler gets it."),
                "cache": sockets.socket(sockets.CACHE, "As the sampler gets it."),
                "windows": sockets.socket(sockets.WINDOWS, "As the sampler gets it."),
                "vae": sockets.socket(sockets.VAE, "To plan decoding, too."),
                "text_encoder": sockets.socket(sockets.TEXT_ENCODER, "To plan the encoding of prompts, too."),
            },
        }

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """The size of every node's tiny form."""
        return dict(host.TINY_SIZE)

    def plan(
        self,
        model: VideoModel,
        conditioning: Conditioning,
        width: int,
        height: int,
        num_frames: int,
        cfg: float,
        vram: float,
        memory: MemorySettings | None = None,
        cache: CacheSettings | None = None,
        windows: WindowSettings | None = None,
        vae: WanVAE | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> dict[str, Any]:
        size = VideoSize.rounded(width, height, num_frames, model.geometry)
        cond, controller = model.fit(conditioning, size), model.motion_controller
        job = Job(
            name=model.name,
            experts=tuple(map(SizedExpert.of, model.experts)),
            size=size,
            settings=SamplerSettings(guidance=GuidanceSettings(scale=cfg), cache=cache, windows=windows),
            memory=memory or host.current.memory_settings(),
            given=InputSizes.of(cond, size.latent.frames),
            cond=cond,
            motion_controller=None if controller is None else SizedModule(controller),
            text_encoder=None if text_encoder is None else SizedModule(text_encoder.model),
            vae=None if vae is None else SizedModule(vae),
        )
        limit = vram * GIB if vram else host.current.free_bytes()
        told = text_of(fit_plan(job, limit))
        return {"ui": {"text": [told]}, "result": (told,)}
