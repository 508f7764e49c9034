"""Latents as small pictures: by a linear map, or by a tiny autoencoder in a small share of a run's time."""

import time

import torch
from PIL import Image
from torch import Tensor

from ..models.config import Geometry
from ..models.preview_decoder import PreviewDecoder
from ..offload.weights import WeightProvider
from ..runtime import log


def latents_to_rgb(latents: Tensor, geometry: Geometry) -> Tensor:
    """Normalised latents (B, z, F, h, w) as colours (B, F, h, w, 3) in [0, 1], one pixel per latent cell."""
    factors = torch.tensor(geometry.rgb, device=latents.device)
    bias = torch.tensor(geometry.rgb_bias, device=latents.device)
    colours = latents.float().movedim(1, -1) @ factors + bias
    return colours.add_(1).div_(2).clamp_(0, 1)


def preview_frames(latents: Tensor, geometry: Geometry) -> list[Image.Image]:
    """The latent frames of the first video of normalised latents (B, z, F, h, w), as pictures of h x w."""
    return to_images(latents_to_rgb(latents[:1], geometry)[0])


def to_images(frames: Tensor) -> list[Image.Image]:
    """Frames (T, H, W, 3) in [0, 1] as pictures."""
    return [Image.fromarray(frame) for frame in frames.mul(255).to(torch.uint8).cpu().contiguous().numpy()]


def middle_frame(latents: Tensor) -> Tensor:
    """The latent frame (B, z, 1, h, w) in the middle of the video."""
    return latents[:, :, latents.shape[2] // 2 :][:, :, :1]


SHARE = 0.05
"""The part of a run's time that previews may take."""

CONTEXT = 2
"""Latent frames that are decoded before the one that is shown, for its memory; each takes as long as a picture."""


class Previewer:
    """Pictures of the clean latents that a run estimates so far.

    After each one it pauses until that one took no more than `SHARE` of the time. When the decoder fails, previews end
    with a warning and the run goes on.
    """

    def __init__(self, decoder: PreviewDecoder | None, device: torch.device) -> None:
        """`decoder` is moved to `device` for each picture only."""
        self._decoder, self._device = decoder, device
        self._due = 0.0

    @property
    def works(self) -> bool:
        """Whether there is a decoder; without one, latents can still be shown by `preview.preview_frames`."""
        return self._decoder is not None

    def middle(self, latents: Tensor) -> Image.Image | None:
        """The frame in the middle of normalised latents (B, z, F, h, w), decoded; None during a pause."""
        place = latents.shape[2] // 2
        first = max(0, place - CONTEXT)
        pictures = self._pictures(latents[:1, :, first : place + 1], place - first)
        return None if pictures is None else pictures[0]

    def strip(self, latents: Tensor) -> list[Image.Image] | None:
        """All latent frames of normalised latents (B, z, F, h, w), decoded; None during a pause."""
        return self._pictures(latents[:1], 0)

    def _pictures(self, latents: Tensor, context: int) -> list[Image.Image] | None:
        if self._decoder is None or time.monotonic() < self._due:
            return None
        # This waits for the device to finish the step, so that the time of the preview alone is measured.
        frames = latents[0].float().cpu()
        started = time.monotonic()
        try:
            with WeightProvider.of(self._decoder).working(self._device):
                pictures = to_images(self._decoder(frames.to(self._device), context).movedim(1, -1))
        except Exception as error:
            log.warning("Previews are latent-to-RGB from here on; the tiny autoencoder failed: %s", error)
            self._decoder = None
            return None
        now = time.monotonic()
        self._due = now + (now - started) * (1 / SHARE - 1)
        return pictures
