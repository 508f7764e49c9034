"""Nodes about memory and files: what a checkpoint is, a limit for a run, and the plan of a run."""

from copy import copy
from dataclasses import replace
from typing import Any

import torch

from wan_core.cache_settings import CacheSettings
from wan_core.conditioning.text import TextEncoder
from wan_core.inspection import report
from wan_core.model import VideoModel
from wan_core.models.vae import WanVAE
from wan_core.parallel.cards import Cards
from wan_core.planning.fit import fit_plan, text_of
from wan_core.planning.job import InputSizes, Job
from wan_core.planning.modules import SizedExpert, SizedModule
from wan_core.runtime import GIB
from wan_core.settings import GuidanceSettings, MemorySettings, SamplerSettings, WindowSettings
from wan_core.types import Conditioning, VideoSize

from . import host, places, planning, sockets

FOLDERS = ("diffusion_models", "text_encoders", "vae", "clip_vision", "loras")


class CheckpointInfo:
    """Kind, variant, size, needs and preset of a model file, read from its header."""

    CATEGORY = "WanCore/loaders"
    FUNCTION = "inspect"
    OUTPUT_NODE = True
    DESCRIPTION = (
        "Describe a model file: its kind, its inputs, and the settings that its authors recommend. Only the header is "
        "read."
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
        text = str(report(places.model_file(folder, name)))
        return {"ui": {"text": [text]}, "result": (text,)}


class Memory(planning.Settings):
    """A limit for the sampler."""

    CATEGORY = "WanCore/speed and memory"
    FUNCTION = "build"
    DESCRIPTION = (
        "Limit the memory that a run uses on the card. Blocks that do not fit are copied to it while the one before "
        "computes, so that large models run on small cards. Without this node all free memory is used."
    )
    RETURN_TYPES = (sockets.MEMORY,)
    RETURN_NAMES = ("memory",)
    OUTPUT_TOOLTIPS = ("For the socket of that name on the sampler.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "vram_limit": sockets.number(
                    0.0, 0.0, 1024.0, "GiB that all programs together may use on the card. 0: all of it."
                ),
                "stream_all": sockets.flag(False, "Keep no block on the card: the smallest use of memory."),
            },
            "optional": {
                "vram_buffer": sockets.number(
                    0.0, 0.0, 1024.0, "GiB reserved for everything but weights. 0: computed from the video's size."
                ),
            },
        }

    def build(self, vram_limit: float, stream_all: bool, vram_buffer: float = 0.0) -> tuple[MemorySettings]:
        limit = 0.0 if stream_all else vram_limit or None
        return (MemorySettings(vram_limit=limit, vram_buffer=vram_buffer or None),)


CARDS = "all"


class Parallel:
    """One film on several cards."""

    CATEGORY = "WanCore/speed and memory"
    FUNCTION = "apply"
    DESCRIPTION = (
        "Make each film on several cards of this machine. Two share the branches of guidance, more share the video's "
        "tokens too; a linked VAE decodes in strips. Processes of their own do the work, so an error there leaves "
        "ComfyUI running. Link it behind the LoRA nodes. For many films, one card for each is faster."
    )
    RETURN_TYPES = (sockets.MODEL, sockets.VAE)
    RETURN_NAMES = ("model", "vae")
    OUTPUT_TOOLTIPS = ("The model, whose runs are shared.", "The VAE for VAE Decode, where one is linked.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": sockets.socket(sockets.MODEL, "From the model loader or a LoRA node."),
                "cards": sockets.line(
                    CARDS, "Numbers of cards such as 0, 1; all of this machine; or cpu, cpu to try it without cards."
                ),
            },
            "optional": {"vae": sockets.socket(sockets.VAE, "From the VAE loader, to decode on all cards.")},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, cards: str | None = None) -> bool | str:
        return True if cards is None else sockets.true_or_message(lambda: named_cards(cards))

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """Two processes, on any machine."""
        return {"cards": "cpu, cpu"}

    @classmethod
    def plan_outputs(cls, model: Any, cards: Any, vae: Any = None) -> tuple[Any, Any]:
        handle = planning.require(planning.PlannedModel, "model", model)
        count = 2 if isinstance(cards, planning.Unknown) else len(named_cards(cards).devices)
        return replace(handle, ranks=count), vae

    def apply(self, model: VideoModel, cards: str, vae: WanVAE | None = None) -> tuple[VideoModel, WanVAE | None]:
        group = named_cards(cards)
        if vae is not None:
            vae = copy(vae)  # the same weights; the one that came in stays as it is
            vae.cards = group
        return replace(model, cards=group), vae


def named_cards(text: str) -> Cards:
    """The cards that a text names.

    Raises:
        ValueError: it names none, too few, or one that this machine lacks.
    """
    count = torch.cuda.device_count()
    words = text.replace(",", " ").split()
    if words == [CARDS]:
        if count < 2:
            raise ValueError(f"cards: a shared film needs two cards, and this machine has {count}. Bypass the node.")
        words = [str(number) for number in range(count)]
    for word in words:
        if word != "cpu" and not (word.isdecimal() and int(word) < count):
            raise ValueError(f"cards: numbers from 0 to {count - 1}, {CARDS} or cpu are expected; got {word!r}.")
    return Cards(tuple("cpu" if word == "cpu" else f"cuda:{int(word)}" for word in words))


class MemoryPlan:
    """The memory that a run will use."""

    CATEGORY = "WanCore/speed and memory"
    FUNCTION = "plan"
    OUTPUT_NODE = True
    DESCRIPTION = (
        "Compute the memory that a run will use on the card and in RAM, and settings with which it fits, without "
        "running it. Link the inputs of the sampler."
    )
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_TOOLTIPS = ("The plan as text.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": sockets.socket(sockets.MODEL, "From the model loader."),
                "conditioning": sockets.socket(sockets.CONDITIONING, "As in the sampler."),
                **sockets.size_inputs(),
                "cfg": sockets.number(5.0, 0.0, 100.0, "As in the sampler; 1 runs one branch."),
                "vram": sockets.number(0.0, 0.0, 1024.0, "GiB that the run may use. 0: what is free on this card."),
            },
            "optional": {
                "memory": sockets.socket(sockets.MEMORY, "As in the sampler."),
                "cache": sockets.socket(sockets.CACHE, "As in the sampler."),
                "windows": sockets.socket(sockets.WINDOWS, "As in the sampler."),
                "vae": sockets.socket(sockets.VAE, "Adds decoding to the plan."),
                "text_encoder": sockets.socket(sockets.TEXT_ENCODER, "Adds the encoding of prompts to the plan."),
                "guidance": sockets.socket(sockets.GUIDANCE, "As in the sampler."),
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
        guidance: GuidanceSettings | None = None,
    ) -> dict[str, Any]:
        size = VideoSize.rounded(width, height, num_frames, model.geometry)
        cond, controller = model.fit(conditioning, size), model.motion_controller
        job = Job(
            name=model.name,
            experts=tuple(map(SizedExpert.of, model.experts)),
            size=size,
            settings=SamplerSettings(guidance=guidance or GuidanceSettings(scale=cfg), cache=cache, windows=windows),
            memory=memory or host.current.memory_settings(),
            given=InputSizes.of(cond, size.latent.frames),
            cond=cond,
            motion_controller=None if controller is None else SizedModule(controller),
            text_encoder=None if text_encoder is None else SizedModule(text_encoder.model),
            vae=None if vae is None else SizedModule(vae),
            ranks=1 if model.cards is None else len(model.cards.devices),
        )
        limit = vram * GIB if vram else host.current.free_bytes()
        text = text_of(fit_plan(job, limit))
        return {"ui": {"text": [text]}, "result": (text,)}
