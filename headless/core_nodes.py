# ruff: noqa: N802 - the node contract's names are in capitals
"""Stand-ins for the core ComfyUI nodes that shipped workflows use: same ids, inputs, outputs and file names."""

import hashlib
import json
import random
import string
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from wan_core.media import CLIP_SUFFIXES, PICTURE_SUFFIXES, frames_to_tensor, pictures

from ..nodes.sockets import true_or_message
from .folders import Folders
from .video import Audio, Video, VideoComponents, VideoFromComponents, VideoFromFile

IMAGES, VIDEOS = frozenset((*PICTURE_SUFFIXES, ".gif")), frozenset((*CLIP_SUFFIXES, ".webp"))
HIDDEN = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
EMPTY_MASK = (64, 64)
"""Height and width of the mask that the host gives for an image without transparency."""


def core_nodes(folders: Folders) -> dict[str, type[Any]]:
    """The node classes by class_type, reading from and writing to `folders`."""
    classes = (LoadImage, LoadVideo, GetVideoComponents, ImageToMask, CreateVideo, SaveImage, PreviewImage, SaveVideo)
    return {cls.__name__: type(cls.__name__, (cls,), {"folders": folders}) for cls in classes}


class _Core:
    folders = Folders()

    @classmethod
    def _file(cls, name: str, what: str) -> Path:
        if path := cls.folders.find(name):
            return path
        raise ValueError(
            f"Invalid {what} file: {name}. It is neither in {cls.folders.input} nor among the shipped assets; "
            "other paths are taken from --set alone."
        )

    @classmethod
    def _validate(cls, name: str, what: str) -> bool | str:
        return true_or_message(lambda: cls._file(name, what))


class LoadImage(_Core):
    """An image, or every frame of an animation, with its transparency as a mask."""

    CATEGORY = "image"
    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "load_image"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": (cls.folders.list_input(IMAGES), {"image_upload": True})}}

    @classmethod
    def VALIDATE_INPUTS(cls, image: str) -> bool | str:
        return cls._validate(image, "image")

    @classmethod
    def IS_CHANGED(cls, image: str) -> str:
        return hashlib.sha256(cls._file(image, "image").read_bytes()).hexdigest()

    def load_image(self, image: str) -> tuple[Tensor, Tensor]:
        with pictures(self._file(image, "image")) as frames:
            images, masks = zip(*map(_pixels_and_mask, frames), strict=True)
        return torch.cat(images), torch.cat(masks)


def _pixels_and_mask(image: Image.Image) -> tuple[Tensor, Tensor]:
    """(1, H, W, 3) in [0, 1] and (1, H, W), 1 where the image is transparent; as on the host, what lies under its
    transparency is kept."""
    if not image.has_transparency_data:
        return frames_to_tensor([image]), torch.zeros(1, *EMPTY_MASK)
    alpha = torch.from_numpy(np.array(image.convert("RGBA").getchannel("A"))).float().div_(255)
    return frames_to_tensor([image.convert("RGBA").convert("RGB")]), 1 - alpha[None]


class LoadVideo(_Core):
    """A video file, decoded when its frames are needed."""

    CATEGORY = "image/video"
    RETURN_TYPES = ("VIDEO",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"file": (cls.folders.list_input(VIDEOS), {"video_upload": True})}}

    @classmethod
    def VALIDATE_INPUTS(cls, file: str) -> bool | str:
        return cls._validate(file, "video")

    @classmethod
    def IS_CHANGED(cls, file: str) -> float:
        return cls._file(file, "video").stat().st_mtime

    def load(self, file: str) -> tuple[Video]:
        return (VideoFromFile(self._file(file, "video")),)


class GetVideoComponents(_Core):
    """Frames, sound (None when silent) and frames per second of a video."""

    CATEGORY = "image/video"
    RETURN_TYPES = ("IMAGE", "AUDIO", "FLOAT")
    RETURN_NAMES = ("images", "audio", "fps")
    FUNCTION = "components"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"video": ("VIDEO",)}}

    def components(self, video: Video) -> tuple[Tensor, Audio | None, float]:
        parts = video.get_components()
        return parts.images, parts.audio, float(parts.frame_rate)


class ImageToMask(_Core):
    """One channel of images as a mask."""

    CATEGORY = "mask"
    RETURN_TYPES = ("MASK",)
    FUNCTION = "image_to_mask"
    CHANNELS = ("red", "green", "blue", "alpha")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("IMAGE",), "channel": (list(cls.CHANNELS), {})}}

    def image_to_mask(self, image: Tensor, channel: str) -> tuple[Tensor]:
        return (image[..., self.CHANNELS.index(channel)],)


class CreateVideo(_Core):
    """Images, and sound where given, as a video."""

    CATEGORY = "image/video"
    RETURN_TYPES = ("VIDEO",)
    FUNCTION = "create"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        fps = ("FLOAT", {"default": 30.0, "min": 1.0, "max": 120.0, "step": 1.0})
        return {"required": {"images": ("IMAGE",), "fps": fps}, "optional": {"audio": ("AUDIO",)}}

    def create(self, images: Tensor, fps: float, audio: Audio | None = None) -> tuple[Video]:
        return (VideoFromComponents(VideoComponents(images, Fraction(fps).limit_denominator(1001), audio)),)


class _Saver(_Core):
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = None) -> bool | str:
        # A linked prefix (None) is only known when its node has run.
        return true_or_message(lambda: cls.folders.check("linked" if filename_prefix is None else filename_prefix))


class SaveImage(_Saver):
    """Images as numbered PNG files that carry the workflow."""

    CATEGORY = "image"
    FUNCTION = "save_images"
    kind = "output"
    compress_level = 4

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        prefix = ("STRING", {"default": "ComfyUI"})
        return {"required": {"images": ("IMAGE",), "filename_prefix": prefix}, "hidden": HIDDEN}

    def save_images(
        self,
        images: Tensor,
        filename_prefix: str = "ComfyUI",
        prompt: Mapping[str, Any] | None = None,
        extra_pnginfo: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        info = PngInfo()
        for name, text in _metadata(prompt, extra_pnginfo).items():
            info.add_text(name, text)
        saved = []
        for number, image in enumerate(images):
            height, width = image.shape[:2]
            prefix = filename_prefix.replace("%batch_num%", str(number))
            pixels = image.detach().float().cpu().mul(255).clamp(0, 255).to(torch.uint8).numpy()
            with self.folders.numbered_file(prefix, ".png", width, height, self.kind) as file:
                Image.fromarray(pixels).save(file.partial, pnginfo=info, compress_level=self.compress_level)
            saved.append(file.reported)
        return {"ui": {"images": saved}}


class PreviewImage(SaveImage):
    """Images as PNG files among the temporary ones, under a name of their own in each run."""

    kind = "temp"
    compress_level = 1

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"images": ("IMAGE",)}, "hidden": HIDDEN}

    def save_images(  # type: ignore[override]  # ComfyUI's node has the inputs of the other but its prefix
        self, images: Tensor, **hidden: Any
    ) -> dict[str, Any]:
        run = "".join(random.choices(string.ascii_lowercase, k=5))
        return super().save_images(images, f"ComfyUI_temp_{run}", **hidden)


class SaveVideo(_Saver):
    """A video as a numbered mp4 file that carries the workflow."""

    CATEGORY = "image/video"
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        required = {
            "video": ("VIDEO",),
            "filename_prefix": ("STRING", {"default": "video/ComfyUI"}),
            "format": (["auto", "mp4"], {"default": "auto"}),
            "codec": (["auto", "h264"], {"default": "auto"}),
        }
        return {"required": required, "hidden": HIDDEN}

    def save(
        self,
        video: Video,
        filename_prefix: str,
        format: str,
        codec: str,
        prompt: Mapping[str, Any] | None = None,
        extra_pnginfo: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        with self.folders.numbered_file(filename_prefix, ".mp4", *video.get_dimensions()) as file:
            video.save_to(file.partial, _metadata(prompt, extra_pnginfo))
        return {"ui": {"images": [file.reported], "animated": (True,)}}


def _metadata(prompt: Mapping[str, Any] | None, extra: Mapping[str, Any] | None) -> dict[str, str]:
    entries = {**(extra or {}), **({"prompt": prompt} if prompt is not None else {})}
    return {name: json.dumps(value) for name, value in entries.items()}
