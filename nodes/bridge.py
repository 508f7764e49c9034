"""Bridges to ComfyUI's own nodes: conditioning both ways, and its VAE."""

from typing import Any

from torch import Tensor

from wan_core import catalog
from wan_core.loading.load import adopt, describe_weights
from wan_core.models.config import DEFAULT_GEOMETRY
from wan_core.models.vae import WanVAE
from wan_core.planning.encoders import checked_size
from wan_core.planning.modules import SizedModule, published_component
from wan_core.runtime import DTYPES
from wan_core.types import Conditioning

from . import host, planning, sockets
from .loaders import choose_dtype
from .native import Native, from_native, to_native


class FromConditioning:
    """CONDITIONING to ours."""

    CATEGORY = "WanCore/conditioning"
    FUNCTION = "convert"
    DESCRIPTION = (
        "Use ComfyUI's own conditioning with a WanCore sampler: prompts of CLIP Text Encode, and what the nodes Wan "
        "Image to Video, Wan First Last Frame, Wan Fun Control, Wan Vace and Wan Camera add to them."
    )
    RETURN_TYPES = (sockets.CONDITIONING,)
    RETURN_NAMES = ("conditioning",)
    OUTPUT_TOOLTIPS = ("Both prompts and their pictures, for the WanCore sampler.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "positive": sockets.socket("CONDITIONING", "From CLIP Text Encode, or a Wan node after it."),
                "negative": sockets.socket("CONDITIONING", "The negative prompt, through the same nodes."),
            },
            "optional": {
                "clip_vision_output": sockets.socket(
                    "CLIP_VISION_OUTPUT", "Replaces the CLIP vision output in the conditioning."
                ),
            },
        }

    def convert(self, positive: Native, negative: Native, clip_vision_output: Any = None) -> tuple[Conditioning]:
        return (from_native(positive, negative, clip_vision_output).to(host.current.offload_device()),)


class ToConditioning:
    """Ours to CONDITIONING."""

    CATEGORY = "WanCore/conditioning"
    FUNCTION = "convert"
    DESCRIPTION = "Use WanCore's conditioning with ComfyUI's own samplers: KSampler and the like."
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT", "INT")
    RETURN_NAMES = ("positive", "negative", "latent", "trim_latent")
    OUTPUT_TOOLTIPS = (
        "The prompt, with pictures, control, camera and VACE inputs.",
        "The negative prompt, with the same.",
        "An empty video of the right length, for the sampler.",
        "Latent frames of references, for Trim Video Latent after the sampler.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "conditioning": sockets.socket(sockets.CONDITIONING, "From the prompt, or a node that adds to it."),
                **sockets.size_inputs(),
            },
        }

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """The size of every node's tiny form."""
        return dict(host.TINY_SIZE)

    def convert(
        self, conditioning: Conditioning, width: int, height: int, num_frames: int
    ) -> tuple[list[list[Any]], list[list[Any]], dict[str, Tensor], int]:
        size = checked_size(width, height, num_frames, DEFAULT_GEOMETRY)
        positive, negative, empty, trim = to_native(conditioning, size, host.current.clip_vision_output)
        return positive, negative, {"samples": empty}, trim


class FromVAE:
    """ComfyUI's VAE to ours."""

    CATEGORY = "WanCore/vae"
    FUNCTION = "convert"
    DESCRIPTION = "Use a Wan VAE from ComfyUI's Load VAE in WanCore's nodes. Its weights are copied."
    RETURN_TYPES = (sockets.VAE,)
    RETURN_NAMES = ("vae",)
    OUTPUT_TOOLTIPS = ("The autoencoder, for encoding and decoding.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        dtype = sockets.choice(["auto", *DTYPES], "auto", "Data type to compute in. auto: bf16 where the card has it.")
        return {
            "required": {"vae": sockets.socket("VAE", "The VAE of Wan 2.1, from ComfyUI's Load VAE.")},
            "optional": {"dtype": dtype},
        }

    @classmethod
    def plan_outputs(cls, dtype: str = "auto", **_: Any) -> tuple[SizedModule]:
        """Planned as the published one: ComfyUI's is not loaded yet, and all VAEs of Wan 2.1 have one structure."""
        return (planning.plan_module(published_component("vae", catalog.T2V_BASE), "", dtype),)

    def convert(self, vae: Any, dtype: str = "auto") -> tuple[WanVAE]:
        # ComfyUI may move or patch its own tensors later, so `adopt` copies them.
        weights = vae.get_sd()
        component = describe_weights(weights, "ComfyUI's VAE", "vae")
        module = adopt(component, weights, choose_dtype(dtype, component), host.current.offload_device())
        assert isinstance(module, WanVAE)
        return (module.use_channels_last(),)
