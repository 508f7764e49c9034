"""Nodes for films of several clips: continue one, pictures at frames, from picture to picture."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from wan_core.conditioning.film import KEPT_FRAMES, Extension, extend_conditioning, film_sides, keyframe_inputs
from wan_core.conditioning.image import Fit
from wan_core.conditioning.inputs import VideoInputs, condition
from wan_core.media import pixels_to_frames
from wan_core.media.fitting import Aspect
from wan_core.model import VideoModel
from wan_core.models.config import Geometry
from wan_core.models.image_encoder import ImageEncoder
from wan_core.models.vae import WanVAE, normalise
from wan_core.planning.encoders import checked_size
from wan_core.sampling.windows import with_text
from wan_core.settings import WindowSettings
from wan_core.tiling import TileSettings
from wan_core.types import Conditioning, VideoSize
from wan_core.variants import Variant

from . import host, planning, sockets
from .conditioning import encoders
from .vae import Tiled, tile_settings, working_vae

SHARED_SIZE = "0 takes the film's own. The film is cropped to it."


class _Film(Tiled):
    """A node that brings frames to a model in the way that its kind takes them."""

    CATEGORY = "WanCore/long video"
    FUNCTION = "encode"
    RETURN_TYPES: tuple[str, ...] = (sockets.CONDITIONING,)
    RETURN_NAMES: tuple[str, ...] = ("conditioning",)

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """The size of every node's tiny form."""
        return dict(host.TINY_SIZE)

    @staticmethod
    def models() -> dict[str, Any]:
        """The required inputs of all of them."""
        model = "The model of the sampler, which decides how it is given the frames."
        return {
            "model": sockets.socket(sockets.MODEL, model),
            "conditioning": sockets.socket(sockets.CONDITIONING, "From the prompt."),
            "vae": sockets.socket(sockets.VAE, "From the VAE loader."),
        }

    @staticmethod
    def planned(inputs: Mapping[str, Any], names: Sequence[str], frames: int, pictures: int = 1) -> Any:
        """The conditioning with inputs of these names; the VAE encodes `frames` latent frames at once."""
        model = planning.require(planning.PlannedModel, "model", inputs["model"])
        before = planning.require(planning.PlannedConditioning, "conditioning", inputs["conditioning"])
        vae = planning.or_none(inputs["vae"])
        tiles = tile_settings(**{name: inputs[name] for name in sockets.tile_inputs() if name in inputs})
        reads = model.variant.reads_images
        vace = (*before.sizes.vace, int("reference_images" in inputs)) if "vace_video" in names else before.sizes.vace
        sizes = replace(
            before.sizes, vace=vace, pictures=before.sizes.pictures + pictures * reads,
            encoded_frames=max(before.sizes.encoded_frames, frames),
        )  # fmt: skip
        encoder = planning.or_none(inputs.get("image_encoder")) if reads else None
        return replace(
            before, names=tuple(dict.fromkeys((*before.names, *names))), sizes=sizes, vae=vae or before.vae,
            image_encoder=encoder or before.image_encoder, tiles=before.tiles if vae is None else tiles,
        )  # fmt: skip


def _names(variant: Variant) -> tuple[str, ...]:
    """The model's names of the frames that it is given."""
    if "vace_video" in variant.accepts:
        return ("vace_video", "vace_video_mask")
    return ("inpaint_video",) if variant.keyframes == "any" else variant.requires


class Extend(_Film):
    """More clips after a film."""

    DESCRIPTION = (
        "Continue a film by clips, each of which begins with the last frames of what is before it, in the way that the "
        "model takes them. The sampler makes all of them, one after the other; Window Prompts gives each its prompt."
    )
    RETURN_TYPES = (sockets.CONDITIONING, "INT", "INT")
    RETURN_NAMES = ("conditioning", "kept_frames", "new_frames")
    OUTPUT_TOOLTIPS = (
        "For the sampler, which gives the film's latents with the new ones; of images those of kept and new frames.",
        "How many first frames of the decoded clips are the film's own, for Join Clips. 0 where it came as latents.",
        "New frames of each clip, for Drift Meter.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                **cls.models(),
                "clips": sockets.whole(1, 1, 1000, "How many clips follow."),
                "clip_frames": sockets.whole(
                    81, 5, 10001, "Length of a clip, kept frames included.", step=sockets.FRAMES
                ),
                "keep_frames": sockets.whole(
                    KEPT_FRAMES, 1, 1001, "Last frames that each clip takes over: 1, 5, 9, ...; FLF2V takes 1.",
                    step=sockets.FRAMES,
                ),
            },
            "optional": {
                "images": sockets.socket("IMAGE", "The film as frames, or its last ones."),
                "latent": sockets.socket("LATENT", "The film as latents, which are not encoded again."),
                "image_encoder": sockets.socket(sockets.IMAGE_ENCODER, "For image-to-video models of Wan 2.1."),
                "end_image": sockets.socket("IMAGE", "The last frame of the last clip."),
                "reference_images": sockets.socket("IMAGE", "What a VACE model shows; each is fitted on white."),
                "loop": sockets.flag(False, "The last frame is the film's first one again."),
                "colour_limit": sockets.number(
                    0.05, 0.0, 1.0, "The largest correction of colours towards those of the film; 0 is off.", step=0.01
                ),
                "width": sockets.whole(0, 0, sockets.MAX_SIDE, SHARED_SIZE, step=sockets.SIDE),
                "height": sockets.whole(0, 0, sockets.MAX_SIDE, SHARED_SIZE, step=sockets.SIDE),
                **sockets.tile_inputs(),
            },
        }  # fmt: skip

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """Clips of the size of every node's tiny form."""
        sides = {name: host.TINY_SIZE[name] for name in ("width", "height")}
        return {**sides, "clip_frames": host.TINY_SIZE["num_frames"], "keep_frames": 1 + sockets.FRAMES}

    @classmethod
    def plan_outputs(cls, **inputs: Any) -> tuple[planning.PlannedConditioning, int, int]:
        model = planning.require(planning.PlannedModel, "model", inputs["model"])
        width, height = inputs.get("width") or 64, inputs.get("height") or 64
        clip = VideoSize.rounded(width, height, inputs["clip_frames"], model.geometry)
        extension = Extension.of(clip, inputs["clips"], inputs["keep_frames"], model.variant, inputs["colour_limit"])
        latent = clip.latent.frames
        cond = cls.planned(inputs, _names(model.variant), latent)
        size = extension.size if inputs.get("width") and inputs.get("height") else None
        if isinstance(film := inputs.get("latent"), planning.PlannedRun):
            size = replace(extension.size, width=film.job.size.width, height=film.job.size.height)
        windows = WindowSettings(
            size=latent, stride=latent - extension.keep, mode="chain", colour_limit=extension.colour_limit
        )
        cond = replace(cond, windows=windows, num_frames=extension.size.num_frames, size=size)
        return cond, extension.kept_frames, extension.new_frames

    def encode(
        self,
        model: VideoModel,
        conditioning: Conditioning,
        vae: WanVAE,
        clips: int,
        clip_frames: int,
        keep_frames: int,
        images: Tensor | None = None,
        latent: dict[str, Tensor] | None = None,
        image_encoder: ImageEncoder | None = None,
        end_image: Tensor | None = None,
        reference_images: Tensor | None = None,
        loop: bool = False,
        colour_limit: float = 0.05,
        width: int = 0,
        height: int = 0,
        **tiles: Any,
    ) -> tuple[Conditioning, int, int]:
        if (images is None) == (latent is None):
            raise ValueError("Connect the film as images or as latent, and not both.")
        if loop and end_image is not None:
            raise ValueError("A loop ends in the film's own first frame; connect end_image or switch loop on.")
        geometry, settings = vae.config.geometry, tile_settings(**tiles)
        film = None if latent is None else normalise(latent["samples"], geometry)
        size = checked_size(*_sides(images, film, width, height, geometry), clip_frames, geometry)
        extension = Extension.of(size, clips, keep_frames, model.variant, colour_limit)
        tail = None if images is None else extension.tail_of(images, Fit())
        end = images[:1] if loop and images is not None else end_image
        references = None if reference_images is None else (reference_images,)
        reader = image_encoder if model.variant.reads_images else None
        with encoders(vae, reader, settings) as encoder, working_vae(vae, settings) as handle:

            def decode(latents: Tensor) -> Tensor:
                return pixels_to_frames(handle.decode_pieces(latents), geometry.video_frames(latents.shape[2]))

            cond = extend_conditioning(
                conditioning, VideoInputs(vace_reference_image=references), extension, model.variant, encoder, reader,
                tail=tail, film=film, end=end, loop=loop, decode=decode,
            )  # fmt: skip
        kept = 0 if images is None else extension.kept_frames
        return cond.to(host.current.offload_device()), kept, extension.new_frames


def _sides(images: Tensor | None, film: Tensor | None, width: int, height: int, geometry: Geometry) -> tuple[int, int]:
    """Width and height of the clips: those of the widgets where they are not 0, else the film's, cropped to what the
    model can make.
    """
    if film is not None:
        stride = geometry.spatial_stride
        return film.shape[4] * stride, film.shape[3] * stride
    assert images is not None, "a film is images or latents"
    across, down = (width, height) if width and height else film_sides(images, geometry)
    return width or across, height or down


class _Pictures(_Film):
    """A node for a video through pictures."""

    @classmethod
    def pictures(cls) -> dict[str, Any]:
        """Its optional inputs."""
        return {
            "images": sockets.socket("IMAGE", "The pictures, in the order of the video."),
            "references": sockets.socket(sockets.REFERENCES, "Pictures of other sizes before these (VACE References)."),
            "image_encoder": sockets.socket(sockets.IMAGE_ENCODER, "For image-to-video models of Wan 2.1."),
        }

    @classmethod
    def plan_outputs(cls, **inputs: Any) -> tuple[planning.PlannedConditioning]:
        model = planning.require(planning.PlannedModel, "model", inputs["model"])
        size = VideoSize.rounded(inputs["width"], inputs["height"], inputs["num_frames"], model.geometry)
        cond = cls.planned(inputs, _names(model.variant), size.latent.frames, pictures=2)
        return (replace(cond, size=size),)


def _each(images: Tensor | None, references: Sequence[Tensor]) -> list[Tensor]:
    """Every picture as frames of one."""
    batches = [*references, *([] if images is None else [images])]
    return [picture[None] for batch in batches for picture in batch]


class Keyframes(_Pictures):
    """Pictures at any frames."""

    DESCRIPTION = (
        "Put pictures at frames of the video: first and last frame of FLF2V models, any frames of Fun InP, "
        "image-to-video and VACE models."
    )
    OUTPUT_TOOLTIPS = ("The conditioning with the pictures.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        frames = "The frame of each picture, from 0; -1 is the last one."
        return {
            "required": {**cls.models(), **sockets.size_inputs(), "frames": sockets.line("0, -1", frames)},
            "optional": {
                **cls.pictures(), "aspect": sockets.fit_inputs("crop")["aspect"], **sockets.tile_inputs()
            },
        }  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        tiled: bool | None = False,
        tile_height: int | None = TileSettings.size[0],
        tile_width: int | None = TileSettings.size[1],
        stride_height: int | None = TileSettings.stride[0],
        stride_width: int | None = TileSettings.stride[1],
        frames: str | None = None,
    ) -> bool | str:
        known = True if frames is None else sockets.true_or_message(lambda: frame_numbers(frames))
        if known is not True:
            return known
        return super().VALIDATE_INPUTS(tiled, tile_height, tile_width, stride_height, stride_width)

    def encode(
        self,
        model: VideoModel,
        conditioning: Conditioning,
        vae: WanVAE,
        width: int,
        height: int,
        num_frames: int,
        frames: str,
        images: Tensor | None = None,
        references: tuple[Tensor, ...] = (),
        image_encoder: ImageEncoder | None = None,
        aspect: Aspect = "crop",
        **tiles: Any,
    ) -> tuple[Conditioning]:
        places, pictures = frame_numbers(frames), _each(images, references)
        if len(places) != len(pictures):
            raise ValueError(f"frames names {len(places)} frames for {len(pictures)} pictures; write one for each.")
        size = checked_size(width, height, num_frames, vae.config.geometry)
        fit = Fit(aspect=aspect)
        fields = keyframe_inputs(model.variant, dict(zip(places, pictures, strict=True)), size, fit)
        reader = image_encoder if model.variant.reads_images else None
        with encoders(vae, reader, tile_settings(**tiles)) as encoder:
            cond = condition(conditioning, VideoInputs(**fields), model.variant, size, encoder, reader, fit)
        return (cond.to(host.current.offload_device()),)


def frame_numbers(text: str) -> list[int]:
    """The numbers in a text such as "0, 40, -1".

    Raises:
        ValueError: it holds none, one twice, or something else.
    """
    try:
        found = [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise ValueError(f"frames is a list of numbers such as '0, 40, -1'; got {text!r}.") from error
    if not found or len(set(found)) < len(found):
        raise ValueError(f"frames needs a number for each picture, none twice; got {text!r}.")
    return found


class Segments(_Pictures):
    """A clip from each picture to the next."""

    DESCRIPTION = (
        "A film through pictures: the sampler and the decode node run once for each pair of neighbours, and Join Clips "
        "makes one film of the clips."
    )
    RETURN_TYPES = (sockets.CONDITIONING,)
    RETURN_NAMES = ("conditioning",)
    OUTPUT_IS_LIST = (True,)
    OUTPUT_TOOLTIPS = ("The conditioning of each clip, as a list: what it is linked to runs for each of them.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {**cls.models(), **sockets.size_inputs()},
            "optional": {
                **cls.pictures(),
                "prompts": sockets.socket(sockets.PROMPTS, "A prompt for each clip, in place of the conditioning's."),
                "loop": sockets.flag(False, "A last clip leads back to the first picture."),
                "aspect": sockets.fit_inputs("crop")["aspect"],
                **sockets.tile_inputs(),
            },
        }

    def encode(
        self,
        model: VideoModel,
        conditioning: Conditioning,
        vae: WanVAE,
        width: int,
        height: int,
        num_frames: int,
        images: Tensor | None = None,
        references: tuple[Tensor, ...] = (),
        image_encoder: ImageEncoder | None = None,
        prompts: tuple[Conditioning, ...] = (),
        loop: bool = False,
        aspect: Aspect = "crop",
        **tiles: Any,
    ) -> tuple[list[Conditioning]]:
        stops = _each(images, references)
        if len(stops) < 2:
            raise ValueError(f"Segments leads from picture to picture; give two or more, not {len(stops)}.")
        stops += stops[:1] if loop else []
        size, fit = checked_size(width, height, num_frames, vae.config.geometry), Fit(aspect=aspect)
        reader = image_encoder if model.variant.reads_images else None
        found = []
        with encoders(vae, reader, tile_settings(**tiles)) as encoder:
            for number, (first, last) in enumerate(pairwise(stops)):
                fields = keyframe_inputs(model.variant, {0: first, -1: last}, size, fit)
                cond = with_text(conditioning, prompts, number)
                cond = condition(cond, VideoInputs(**fields), model.variant, size, encoder, reader, fit)
                found.append(cond.to(host.current.offload_device()))
        return (found,)
