"""Pixels to latents and back, frames that a LATENT marks as known, and ComfyUI's VAE as ours."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from wan_core import catalog
from wan_core.decode import VaeHandle
from wan_core.loading.load import adopt, describe_weights
from wan_core.media import frames_to_pixels, pixels_to_frames
from wan_core.models.config import Geometry
from wan_core.models.vae import WanVAE, denormalise, normalise
from wan_core.planning.modules import SizedModule, published_component
from wan_core.runtime import DTYPES, log
from wan_core.tiling import AUTO, Tiles, TileSettings
from wan_core.types import Conditioning, LatentSize

from . import host, planning, sockets
from .loaders import choose_dtype


def _crop(frames: Tensor, geometry: Geometry) -> Tensor:
    """Crop `frames` (T, H, W, 3) at the centre, and drop last frames, to a size that the geometry has; log a notice."""
    length, height, width = frames.shape[:3]
    multiple = geometry.side_multiple
    top, left = height % multiple, width % multiple
    spare = (length - 1) % geometry.temporal_stride
    if height < multiple or width < multiple:
        raise ValueError(f"Images must be at least {multiple}x{multiple} pixels; got {width}x{height}.")
    if top or left or spare:
        log.info(
            "Encoding %dx%d, %d frames of a video of %dx%d, %d frames: sides are multiples of %d, lengths are %s.",
            width - left, height - top, length - spare, width, height, length, multiple, geometry.length_rule,
        )  # fmt: skip
    top, left = top // 2, left // 2
    bottom, right = top + height // multiple * multiple, left + width // multiple * multiple
    return frames[: length - spare, top:bottom, left:right]


class Tiled:
    """A node with the tile widgets, which are checked before anything runs."""

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        tiled: bool | None = False,
        tile_height: int | None = TileSettings.size[0],
        tile_width: int | None = TileSettings.size[1],
        stride_height: int | None = TileSettings.stride[0],
        stride_width: int | None = TileSettings.stride[1],
    ) -> bool | str:
        # Linked values are None here, and checked when the node runs.
        sizes = {"tile_height": tile_height, "tile_width": tile_width}
        strides = {"stride_height": stride_height, "stride_width": stride_width}
        for (name, size), (other, stride) in zip(sizes.items(), strides.items(), strict=True):
            if tiled and size is not None and stride is not None and not 1 <= stride <= size:
                return f"{other} must be from 1 to {name}, or tiles leave gaps; got {stride} and {size}."
        return True


def tile_settings(
    tiled: bool = False,
    tile_height: int = TileSettings.size[0],
    tile_width: int = TileSettings.size[1],
    stride_height: int = TileSettings.stride[0],
    stride_width: int = TileSettings.stride[1],
) -> Tiles:
    """The tile widgets (`sockets.tile_inputs`) as settings; off means tiles only where memory is short."""
    return TileSettings(size=(tile_height, tile_width), stride=(stride_height, stride_width)) if tiled else AUTO


def normalised_latents(latent: Mapping[str, Any], geometry: Geometry) -> Tensor:
    """The normalised latents (B, z, F, h, w) of a LATENT.

    Raises:
        ValueError: they are of an image, or of another kind of model.
    """
    samples: Tensor = latent["samples"]
    if samples.ndim != 5:
        raise ValueError(
            f"The latent is {tuple(samples.shape)}, of images; a video's is (B, {geometry.channels}, frames, height / "
            f"{geometry.spatial_stride}, width / {geometry.spatial_stride}). Use VAE Encode (WanCore), a sampler of "
            "videos, or ComfyUI's empty latent for Wan."
        )
    return normalise(samples, geometry)


@contextmanager
def working_vae(vae: WanVAE, tiles: Tiles) -> Iterator[VaeHandle]:
    """A VAE on the device inside the block. Its weights stay there afterwards if the host can evict them."""
    here = host.current
    handle = VaeHandle(
        vae=vae, runtime=here.runtime(vae.dtype), tiles=tiles, memory=here.memory_settings(), keep=here.keeps_weights()
    )
    with handle.working():
        yield handle
    here.register_weights(vae)


class VAEDecode(Tiled):
    """Latents to frames."""

    CATEGORY = "WanCore/vae"
    FUNCTION = "decode"
    DESCRIPTION = "Decode video latents into frames."
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    OUTPUT_TOOLTIPS = ("The frames, for Create Video.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "vae": sockets.socket(sockets.VAE, "From the VAE loader."),
                "latent": sockets.socket("LATENT", "Raw Wan latents, from the sampler or ComfyUI's own nodes."),
            },
            "optional": sockets.tile_inputs(),
        }

    @classmethod
    def plan_outputs(cls, vae: Any, latent: Any, **tiles: Any) -> tuple[Any]:
        if not isinstance(vae, SizedModule) or not isinstance(latent, planning.PlannedRun):
            return (planning.Unknown("VAE Decode"),)
        chosen = {**latent.job.tiles, "decode": tile_settings(**tiles)}
        return (planning.PlannedRun(replace(latent.job, vae=vae, decodes=True, tiles=chosen), sampled=latent),)

    def decode(
        self,
        vae: WanVAE,
        latent: dict[str, Tensor],
        **tiles: Any,
    ) -> tuple[Tensor]:
        settings = tile_settings(**tiles)
        geometry = vae.config.geometry
        latents = normalised_latents(latent, geometry)
        with working_vae(vae, settings) as handle:
            return (pixels_to_frames(handle.decode_pieces(latents), geometry.video_frames(latents.shape[2])),)


class VAEEncode(Tiled):
    """Frames to latents."""

    CATEGORY = "WanCore/vae"
    FUNCTION = "encode"
    DESCRIPTION = "Encode frames into video latents, to start a sampler from with denoise below 1."
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("Raw VAE latents; for Wan 2.1 (1, 16, frames, height / 8, width / 8).",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "vae": sockets.socket(sockets.VAE, "From the VAE loader."),
                "images": sockets.socket(
                    "IMAGE",
                    "Frames; cropped to a size that the VAE has, for Wan 2.1 multiples of 16 pixels and 4k + 1 frames.",
                ),
            },
            "optional": sockets.tile_inputs(),
        }

    @classmethod
    def plan_outputs(cls, vae: Any, images: Any, **tiles: Any) -> tuple[planning.PlannedLatent]:
        return (planning.PlannedLatent(planning.require(SizedModule, "vae", vae), tile_settings(**tiles)),)

    def encode(
        self,
        vae: WanVAE,
        images: Tensor,
        **tiles: Any,
    ) -> tuple[dict[str, Tensor]]:
        settings = tile_settings(**tiles)
        pixels = frames_to_pixels(_crop(images, vae.config.geometry))
        with working_vae(vae, settings) as handle:
            latents = handle.encode(pixels)
        return ({"samples": denormalise(latents, vae.config.geometry)},)


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


def latent_of(cond: Conditioning, empty: Tensor) -> dict[str, Tensor]:
    """The LATENT to begin with: an empty one (B, z, R + F, h, w), in which the clean frames of `cond` are marked as
    known, as ComfyUI's Wan22ImageToVideoLatent marks them.
    """
    if cond.clean is None or cond.timestep_index is None or cond.size is None:
        return {"samples": empty}
    count = int((cond.timestep_index[0] == 0).all((1, 2)).sum())
    samples, mask = empty.clone(), empty.new_ones(len(empty), 1, *empty.shape[2:])
    samples[:, :, :count] = denormalise(cond.clean[:, :, :count], cond.size.geometry)
    mask[:, :, :count] = 0
    return {"samples": samples, "noise_mask": mask}


def with_known_latents(cond: Conditioning, latent: Mapping[str, Any], geometry: Geometry) -> Conditioning:
    """`cond` with the first frames of a LATENT that its noise mask marks as known (0), as clean frames."""
    mask = latent.get("noise_mask")
    if not isinstance(mask, Tensor) or not geometry.frame_times or mask.ndim != 5 or cond.clean is not None:
        return cond
    samples = latent["samples"]
    known = (mask < 0.5).flatten(3).all(3)[0, 0].tolist()
    count = known.index(False) if False in known else len(known)
    if not count:
        return cond
    clean = normalise(samples[:, :, :count], geometry)
    size = cond.size or LatentSize.of(samples, geometry).video
    return cond.with_inputs("input_image", size=size).with_clean_frames(clean, samples.shape[2])
