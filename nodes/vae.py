"""Pixels to latents and back, frames that a LATENT marks as known, and ComfyUI's VAE as ours."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wan_core import catalog
from wan_core.decode import DECODERS, VaeHandle
from wan_core.loading.detect import Component
from wan_core.loading.load import adopt, describe_weights, inspect
from wan_core.media import frames_to_pixels, pixels_to_frames
from wan_core.model_files import load_preview_decoder
from wan_core.models.config import Geometry, PreviewDecoderConfig
from wan_core.models.preview_decoder import NAMES
from wan_core.models.vae import WanVAE, denormalise, normalise
from wan_core.planning.modules import SizedModule, published_component, published_tiny
from wan_core.runtime import DTYPES, log
from wan_core.tiling import AUTO, Tiles, TileSettings
from wan_core.types import Conditioning, LatentSize

from . import host, planning, sockets
from .loaders import choose_dtype
from .previews import FOLDER, decoder_path


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


def decoding_component(channels: int) -> tuple[Component, str]:
    """The tiny autoencoder for latents of so many channels as its header says, and nothing; or as published, and its
    name, where it is not among the model files.

    Raises:
        ValueError: the file is broken, or for other latents.
    """
    path = decoder_path(host.current, channels)
    if path is None:
        return published_tiny(channels), f"{FOLDER}/{NAMES[channels]}.safetensors"
    component = inspect(path, "preview_decoder")
    given = component.config_of(PreviewDecoderConfig).latent_channels
    if given != channels:
        raise ValueError(f"{path} decodes latents of {given} channels, not of {channels}; replace it by the file that "
                         f"madebyollin/taehv calls so.")  # fmt: skip
    return component, ""


@contextmanager
def working_decoder(vae: WanVAE, decoder: str, tiles: Tiles) -> Iterator[VaeHandle]:
    """As `working_vae`, with the tiny autoencoder in place of the VAE where `decoder` says so.

    Raises:
        ValueError: its file is missing or cannot be used.
    """
    if decoder == DECODERS[0]:
        with working_vae(vae, tiles) as handle:
            yield handle
        return
    component, absent = decoding_component(vae.config.latent_channels)
    if absent:
        raise ValueError(NO_TINY.format(absent))
    tiny, here = load_preview_decoder(component.header.files[0]), host.current
    log.info("Decoded by %s: an approximation.", component.name)
    yield VaeHandle(vae=tiny, runtime=here.runtime(tiny.dtype), tiles=tiles, memory=here.memory_settings())


NO_TINY = (
    "decoder taew2 needs {} in the models folder, from madebyollin/taehv (or Kijai/WanVideo_comfy); put it there, or "
    "set decoder to vae."
)


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
            "optional": {
                **sockets.tile_inputs(),
                "decoder": sockets.choice(
                    list(DECODERS),
                    DECODERS[0],
                    "taew2: by the tiny autoencoder (taew2_1, or taew2_2 for the 5B models) in models/vae_approx, in a "
                    "fraction of the time and memory. An approximation: fine textures are lost.",
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        tiled: bool | None = False,
        tile_height: int | None = TileSettings.size[0],
        tile_width: int | None = TileSettings.size[1],
        stride_height: int | None = TileSettings.stride[0],
        stride_width: int | None = TileSettings.stride[1],
        decoder: str | None = None,
    ) -> bool | str:
        # The host leaves the list to whoever names the input here.
        if decoder not in (None, *DECODERS):
            return f"Value not in list: decoder: {decoder!r:.80} is none of {', '.join(DECODERS)}."
        # Which of them is only known with the VAE; without any, it is told before the sampler works.
        if decoder == "taew2" and not any(decoder_path(host.current, channels) for channels in NAMES):
            return NO_TINY.format(" or ".join(f"{FOLDER}/{name}.safetensors" for name in NAMES.values()))
        return super().VALIDATE_INPUTS(tiled, tile_height, tile_width, stride_height, stride_width)

    @classmethod
    def tiny(cls, inputs: dict[str, Any]) -> dict[str, Any]:
        """The tiny autoencoders know the latents of the published VAEs, and not those of the bundled ones."""
        return {"decoder": DECODERS[0]} if "decoder" in inputs else {}

    @classmethod
    def plan_outputs(cls, vae: Any, latent: Any, decoder: Any = DECODERS[0], **tiles: Any) -> tuple[Any]:
        if not isinstance(vae, SizedModule) or not isinstance(latent, planning.PlannedRun):
            return (planning.Unknown("VAE Decode"),)
        chosen = {**latent.job.tiles, "decode": tile_settings(**tiles)}
        job = replace(latent.job, vae=vae, decodes=True, tiles=chosen)
        if decoder == "taew2":
            component, absent = decoding_component(vae.module.config.latent_channels)
            job = replace(job, tiny_autoencoder=SizedModule.planned(component, torch.float32, absent=absent))
        return (planning.PlannedRun(job, sampled=latent),)

    def decode(
        self,
        vae: WanVAE,
        latent: dict[str, Tensor],
        decoder: str = DECODERS[0],
        **tiles: Any,
    ) -> tuple[Tensor]:
        settings = tile_settings(**tiles)
        geometry = vae.config.geometry
        latents = normalised_latents(latent, geometry)
        with working_decoder(vae, decoder, settings) as handle:
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
