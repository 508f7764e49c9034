"""Pictures of a video while it is sampled: as files, or for an editor. A preview that fails never stops the run."""

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from wan_core.atomic import replacing
from wan_core.model_files import load_preview_decoder
from wan_core.models.config import DEFAULT_GEOMETRY
from wan_core.models.preview_decoder import NAMES, PreviewDecoder
from wan_core.runtime import log
from wan_core.sampling.preview import Previewer, middle_frame

FOLDER = "vae_approx"
ENDINGS = (".safetensors", ".pth")
"""In order of preference."""

MILLISECONDS_PER_FRAME = round(1000 * DEFAULT_GEOMETRY.temporal_stride / DEFAULT_GEOMETRY.fps)
"""How long a latent frame lasts."""


def write(pictures: list[Image.Image], folder: Path, step: int) -> None:
    """Write previews of a video's latent frames after `step` steps into `folder`, as two PNG files.

    `step_0010.png` is the frame in the middle, `step_0010_strip.png` an animation of all latent frames. A file of an
    earlier run is replaced; each appears all at once.
    """
    _save(pictures[len(pictures) // 2 :][:1], folder / f"step_{step:04}.png")
    _save(pictures, folder / f"step_{step:04}_strip.png")


def _save(pictures: list[Image.Image], path: Path) -> None:
    first, *rest = pictures
    animated = {"save_all": True, "append_images": rest, "duration": MILLISECONDS_PER_FRAME} if rest else {}
    with replacing(path) as partial:
        first.save(partial, format="PNG", **animated)


class ModelFiles(Protocol):
    """The part of `host.Host` that finds model files."""

    def list_files(self, folder: str) -> list[str]: ...

    def model_path(self, folder: str, name: str) -> Path: ...


def find_decoder(files: ModelFiles, channels: int = DEFAULT_GEOMETRY.channels) -> PreviewDecoder | None:
    """The tiny autoencoder for latents of so many channels among the model files; None when there is none that can be
    used.
    """
    path = decoder_path(files, channels)
    if path is None:
        return None
    decoder = _load_decoder(path, path.stat().st_mtime_ns)
    if decoder is not None and decoder.config.latent_channels != channels:
        _warn(f"{path} is for latents of {decoder.config.latent_channels} channels, not of {channels}")
        return None
    return decoder


def decoder_path(files: ModelFiles, channels: int) -> Path | None:
    """The file of the tiny autoencoder for latents of so many channels; None when there is none."""
    names = files.list_files(FOLDER)
    wanted = [NAMES.get(channels, "") + ending for ending in ENDINGS]
    name = next((name for each in wanted for name in names if Path(name).name == each), None)
    return None if name is None else files.model_path(FOLDER, name)


def for_editor(previewer: Any, comfyuis_own: bool, tiny: Previewer, latents: Tensor, side: int) -> tuple | None:
    """What ComfyUI shows next, as (format, picture or pictures, largest side); None leaves the last picture.

    Previewers of other packs play all latent frames. ComfyUI's own shows only the first frame that it gets; the tiny
    autoencoder replaces it where there is one.
    """
    if not comfyuis_own:
        return previewer.decode_latent_to_preview_image("JPEG", latents)
    if not tiny.works:
        return previewer.decode_latent_to_preview_image("JPEG", middle_frame(latents))
    picture = tiny.middle(latents)
    return None if picture is None else ("JPEG", picture, side)


@lru_cache(maxsize=1)
def _load_decoder(path: Path, changed: int) -> PreviewDecoder | None:
    """The tiny autoencoder of a file, or None, with a notice, if it cannot be used.

    `changed` is the file's modification time: each version of a file is read, and warned about, once.
    """
    try:
        return load_preview_decoder(path)
    except (ValueError, OSError) as error:
        log.warning("Previews are latent-to-RGB: %s", error)
        return None


@lru_cache(maxsize=16)
def _warn(problem: str) -> None:
    """Log a problem with previews once, not after each step."""
    log.warning("No preview: %s", problem)


@contextlib.contextmanager
def never_fail() -> Iterator[None]:
    """A preview that goes wrong is left out; the run goes on."""
    try:
        yield
    except Exception as error:
        _warn(getattr(error, "strerror", None) or str(error))
