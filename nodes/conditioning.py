"""Nodes that add pictures, control videos and VACE inputs to conditioning."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wan_core.conditioning.image import (
    Fit,
    LatentEncoder,
    clean_start_conditioning,
    control_conditioning,
    first_frame_conditioning,
    image_conditioning,
    reference_conditioning,
)
from wan_core.conditioning.vace import vace_conditioning
from wan_core.media.fitting import Aspect, LengthPolicy, SizeRule
from wan_core.models.config import DEFAULT_GEOMETRY
from wan_core.models.image_encoder import ImageEncoder
from wan_core.models.vae import WanVAE
from wan_core.planning.encoders import IMAGE_ENCODER_BYTES, checked_size, working_encoder
from wan_core.tiling import Tiles
from wan_core.types import Conditioning, Curve, VideoSize

from . import host, planning, sockets
from .reuse import HIDDEN, apart_from_text
from .vae import Tiled, tile_settings, working_vae


class Encode(Tiled):
    """A node that adds pictures or videos to conditioning, by a method `encode` that is `apart_from_text`.

    Attributes:
        MODEL_INPUTS: the model's name of each of its inputs.
        CLIP_INPUTS: those that the image encoder reads.
        FULL_LENGTH: those that the VAE encodes at the length of the video; the others are one frame.
        TINY: what its tiny form changes besides the size.
    """

    MODEL_INPUTS: ClassVar[Mapping[str, str]]
    CLIP_INPUTS: ClassVar[tuple[str, ...]] = ()
    FULL_LENGTH: ClassVar[tuple[str, ...]] = ()
    TINY: ClassVar[Mapping[str, Any]] = {}

    CATEGORY = "WanCore/conditioning"
    FUNCTION = "encode"
    RETURN_TYPES = (sockets.CONDITIONING,)
    RETURN_NAMES = ("conditioning",)
    OUTPUT_TOOLTIPS = ("The conditioning with the pictures.",)

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """The size of every node's tiny form."""
        return {**host.TINY_SIZE, **cls.TINY}

    @classmethod
    def plan_outputs(cls, **inputs: Any) -> tuple[planning.PlannedConditioning]:
        before = planning.require(planning.PlannedConditioning, "conditioning", inputs["conditioning"])
        vae = planning.or_none(inputs["vae"])
        geometry = DEFAULT_GEOMETRY if vae is None else vae.module.config.geometry
        size = VideoSize.rounded(inputs["width"], inputs["height"], inputs["num_frames"], geometry)
        linked = [name for name in cls.MODEL_INPUTS if name in inputs]
        frames = 0 if vae is None else size.latent.frames if set(linked) & set(cls.FULL_LENGTH) else 1
        tiles = tile_settings(**{name: inputs[name] for name in sockets.tile_inputs() if name in inputs})
        with_inputs = before.with_inputs(
            [cls.MODEL_INPUTS[name] for name in linked],
            size,
            pictures=before.sizes.pictures + sum(name in cls.CLIP_INPUTS for name in linked),
            encoded_frames=max(before.sizes.encoded_frames, frames),
        )
        return (
            replace(
                with_inputs,
                vae=vae or before.vae,
                image_encoder=planning.or_none(inputs.get("image_encoder")) or before.image_encoder,
                tiles=before.tiles if vae is None else tiles,
            ),
        )


@contextmanager
def working_module(module: nn.Module, dtype: torch.dtype, activations: int) -> Iterator[None]:
    """An encoder on the device inside the block. Its weights stay there afterwards if the host can evict them."""
    here = host.current
    with working_encoder(module, here.runtime(dtype), here.memory_settings(), activations, keep=here.keeps_weights()):
        yield
    here.register_weights(module)


@contextmanager
def encoders(vae: WanVAE, image_encoder: ImageEncoder | None, tiles: Tiles) -> Iterator[LatentEncoder]:
    """The VAE, ready to encode, and the image encoder on the device inside the block."""
    with ExitStack() as stack:
        handle = stack.enter_context(working_vae(vae, tiles))
        if image_encoder is not None:
            stack.enter_context(working_module(image_encoder, vae.dtype, IMAGE_ENCODER_BYTES))
        yield LatentEncoder(vae=vae, encode=handle.encode)


class ImageEncode(Encode):
    """Known parts of the video: its first and last frame, or everything outside of a mask."""

    DESCRIPTION = (
        "Encode the pictures of an image-to-video, first-last-frame or Fun InP model: a start image, an end image, or "
        "a video and a mask of the part to generate."
    )
    MODEL_INPUTS: ClassVar = {"start_image": "input_image", "end_image": "end_image", "video": "inpaint_video"}
    TINY: ClassVar = {"size_rule": "exact"}
    CLIP_INPUTS = ("start_image", "end_image")
    FULL_LENGTH = ("start_image", "end_image", "video")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": sockets.encode_inputs(),
            "optional": {
                "image_encoder": sockets.socket(sockets.IMAGE_ENCODER, "Needed for start and end images."),
                "start_image": sockets.socket("IMAGE", "The first frame."),
                "end_image": sockets.socket("IMAGE", "The last frame."),
                "video": sockets.socket("IMAGE", "A video to change in part."),
                "mask": sockets.socket("MASK", "White where the model generates; one mask, or one per frame."),
                **sockets.encode_settings(),
                "size_rule": sockets.size_rule(),
            },
            "hidden": HIDDEN,
        }

    @apart_from_text
    def encode(
        self,
        conditioning: Conditioning,
        vae: WanVAE,
        width: int,
        height: int,
        num_frames: int,
        image_encoder: ImageEncoder | None = None,
        start_image: Tensor | None = None,
        end_image: Tensor | None = None,
        video: Tensor | None = None,
        mask: Tensor | None = None,
        aspect: Aspect = "crop",
        too_short: LengthPolicy = "repeat last",
        size_rule: SizeRule = "exact",
        **tiles: Any,
    ) -> tuple[Conditioning]:
        size = checked_size(width, height, num_frames, vae.config.geometry, size_rule, start_image)
        pictures = {"start": start_image, "end": end_image, "video": video, "mask": mask}
        with encoders(vae, image_encoder, tile_settings(**tiles)) as encoder:
            cond = image_conditioning(
                conditioning, size, encoder, image_encoder, **pictures, fit=Fit(aspect=aspect, length=too_short)
            )
        return (cond.to(host.current.offload_device()),)


class StartFrames(Encode):
    """Clean first frames."""

    DESCRIPTION = (
        "The first frames of a video by Wan 2.2 TI2V-5B: a picture, or the last frames of a clip that is to go on. "
        "They come out as they are."
    )
    MODEL_INPUTS: ClassVar = {"start_image": "input_image"}
    TINY: ClassVar = {"size_rule": "exact"}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        pictures = "A picture; or a clip, of which as many frames are kept as fill whole latent frames (1, 5, 9, ...)."
        return {
            "required": {**sockets.encode_inputs(), "start_image": sockets.socket("IMAGE", pictures)},
            "optional": {
                "aspect": sockets.fit_inputs("crop")["aspect"],
                **sockets.tile_inputs(),
                "size_rule": sockets.size_rule(),
            },
            "hidden": HIDDEN,
        }

    @apart_from_text
    def encode(
        self,
        conditioning: Conditioning,
        vae: WanVAE,
        width: int,
        height: int,
        num_frames: int,
        start_image: Tensor,
        aspect: Aspect = "crop",
        size_rule: SizeRule = "exact",
        **tiles: Any,
    ) -> tuple[Conditioning]:
        size = checked_size(width, height, num_frames, vae.config.geometry, size_rule, start_image)
        if not size.geometry.frame_times:
            raise ValueError(
                f"Start Frames is for Wan 2.2 TI2V-5B, and this VAE is that of {size.geometry.name}. Use Image Encode, "
                "or the VAE of Wan 2.2."
            )
        with encoders(vae, None, tile_settings(**tiles)) as encoder:
            cond = clean_start_conditioning(conditioning, size, encoder, start_image, Fit(aspect=aspect))
        return (cond.to(host.current.offload_device()),)


class ControlEncode(Encode):
    """Inputs of the Fun control and camera models."""

    DESCRIPTION = (
        "Encode the inputs of Fun control and camera models: a control video (edges, depth, poses), a start image, for "
        "V1.1 control models a reference image."
    )
    MODEL_INPUTS: ClassVar = {
        "control_video": "control_video",
        "start_image": "input_image",
        "reference_image": "reference_image",
    }
    CLIP_INPUTS = ("start_image", "reference_image")
    FULL_LENGTH = ("control_video",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": sockets.encode_inputs(),
            "optional": {
                "image_encoder": sockets.socket(sockets.IMAGE_ENCODER, "Needed for start and reference images."),
                "control_video": sockets.socket("IMAGE", "Guides the video frame by frame."),
                "start_image": sockets.socket("IMAGE", "The first frame."),
                "reference_image": sockets.socket("IMAGE", "What the subject looks like (V1.1 control models)."),
                **sockets.encode_settings("stretch"),
            },
            "hidden": HIDDEN,
        }

    @apart_from_text
    def encode(
        self,
        conditioning: Conditioning,
        vae: WanVAE,
        width: int,
        height: int,
        num_frames: int,
        image_encoder: ImageEncoder | None = None,
        control_video: Tensor | None = None,
        start_image: Tensor | None = None,
        reference_image: Tensor | None = None,
        aspect: Aspect = "stretch",
        too_short: LengthPolicy = "repeat last",
        **tiles: Any,
    ) -> tuple[Conditioning]:
        if control_video is None and start_image is None and reference_image is None:
            raise ValueError("Connect a control video, a start image or a reference image.")
        size = checked_size(width, height, num_frames, vae.config.geometry)
        fit = Fit(aspect=aspect, length=too_short)
        cond = conditioning
        with encoders(vae, image_encoder, tile_settings(**tiles)) as encoder:
            if control_video is not None:
                cond = control_conditioning(cond, size, encoder, control_video, fit)
            if start_image is not None:
                cond = first_frame_conditioning(cond, size, encoder, image_encoder, start_image, fit)
            if reference_image is not None:
                cond = reference_conditioning(cond, size, encoder, image_encoder, reference_image, fit)
        return (cond.to(host.current.offload_device()),)


class VaceReferences:
    """Reference images of different sizes, one batch after the other."""

    CATEGORY = "WanCore/conditioning"
    FUNCTION = "collect"
    DESCRIPTION = "Collect reference images of different sizes for VACE Encode; chain several."
    RETURN_TYPES = (sockets.REFERENCES,)
    RETURN_NAMES = ("references",)
    OUTPUT_TOOLTIPS = ("All references so far.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"images": sockets.socket("IMAGE", "Each image becomes a reference of its own.")},
            "optional": {"references": sockets.socket(sockets.REFERENCES, "References that come before these.")},
        }

    @classmethod
    def plan_outputs(cls, references: Any = None, **_: Any) -> tuple[int]:
        """How many reference pictures there are; each linked batch counts as one."""
        return ((planning.or_none(references) or 0) + 1,)

    def collect(self, images: Tensor, references: tuple[Tensor, ...] = ()) -> tuple[tuple[Tensor, ...]]:
        return ((*references, images),)


class VaceEncode(Encode):
    """One VACE input; chain several nodes for several inputs."""

    DESCRIPTION = (
        "Encode an input of a VACE model: a source video, a mask of the part to generate, and reference images. Chain "
        "several for several inputs. The sampler trims the reference frames."
    )
    OUTPUT_TOOLTIPS = ("The conditioning with one more VACE input.",)
    MODEL_INPUTS: ClassVar = {
        "video": "vace_video",
        "mask": "vace_video_mask",
        "reference_images": "vace_reference_image",
        "references": "vace_reference_image",
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        fraction = "Fraction of the steps"
        return {
            "required": {
                **sockets.encode_inputs(),
                "strength": sockets.number(1.0, 0.0, 10.0, "Strength of this input.", step=0.05),
            },
            "optional": {
                "start": sockets.number(0.0, 0.0, 1.0, f"{fraction} from which this input has an effect.", step=0.01),
                "end": sockets.number(1.0, 0.0, 1.0, f"{fraction} until which this input has an effect.", step=0.01),
                "end_strength": sockets.number(
                    -1.0,
                    -1.0,
                    10.0,
                    "Strength at the end, changing linearly from strength. -1 keeps strength.",
                    step=0.05,
                ),
                "video": sockets.socket("IMAGE", "The source: a video to change, or depth, poses, edges and the like."),
                "mask": sockets.socket("MASK", "White where the model generates; all white when absent."),
                "reference_images": sockets.socket("IMAGE", "Pictures of the subjects; each is fitted on white."),
                "references": sockets.socket(sockets.REFERENCES, "More references, of other sizes."),
                **sockets.encode_settings(),
            },
            "hidden": HIDDEN,
        }

    @classmethod
    def plan_outputs(cls, **inputs: Any) -> tuple[planning.PlannedConditioning]:
        (cond,) = super().plan_outputs(**inputs)
        assert cond.size is not None, "`adding` sets it"
        references = int("reference_images" in inputs) + (planning.or_none(inputs.get("references")) or 0)
        names, frames = cond.names or ("vace_video",), cond.size.latent.frames
        sizes = replace(cond.sizes, vace=(*cond.sizes.vace, references), encoded_frames=frames)
        return (replace(cond, names=names, sizes=sizes),)

    @apart_from_text
    def encode(
        self,
        conditioning: Conditioning,
        vae: WanVAE,
        width: int,
        height: int,
        num_frames: int,
        strength: float,
        start: float = 0.0,
        end: float = 1.0,
        end_strength: float = -1.0,
        video: Tensor | None = None,
        mask: Tensor | None = None,
        reference_images: Tensor | None = None,
        references: tuple[Tensor, ...] = (),
        aspect: Aspect = "crop",
        too_short: LengthPolicy = "repeat last",
        **tiles: Any,
    ) -> tuple[Conditioning]:
        size = checked_size(width, height, num_frames, vae.config.geometry)
        curve = Curve((strength,) if end_strength < 0 else (strength, end_strength), start, end)
        pictures = references if reference_images is None else (reference_images, *references)
        with encoders(vae, None, tile_settings(**tiles)) as encoder:
            cond = vace_conditioning(
                conditioning,
                size,
                encoder,
                video=video,
                mask=mask,
                references=pictures,
                strength=curve,
                fit=Fit(aspect=aspect, length=too_short),
            )
        return (cond.to(host.current.offload_device()),)
