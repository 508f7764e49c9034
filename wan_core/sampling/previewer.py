"""Previews by the tiny autoencoder, for no more than a small part of a run's time."""

import time

import torch
from PIL import Image
from torch import Tensor

from ..memory.residency import on_device
from ..models.preview_decoder import PreviewDecoder
from ..runtime import log
from .preview import to_images

SHARE = 0.05
"""The part of a run's time that previews may take."""

CONTEXT = 2
"""Latent frames that the decoder sees before the one that is shown; each costs as much as a picture."""


class Previewer:
    """Pictures of the clean latents that a run points at so far.

    After each one it rests until that one was no more than `SHARE` of the time. When the decoder fails, it says so once
    and gives up; the run goes on.
    """

    def __init__(self, decoder: PreviewDecoder | None, device: torch.device) -> None:
        """`decoder` rests wherever its weights are, and works on `device`."""
        self._decoder, self._device = decoder, device
        self._due = 0.0

    @property
    def works(self) -> bool:
        """Whether there is a decoder; without one, latents can still be shown by `preview.preview_frames`."""
        return self._decoder is not None

    def middle(self, latents: Tensor) -> Image.Image | None:
        """The frame in the middle of normalised latents (B, 16, F, h, w), as a picture of 8h x 8w; None while at
        rest."""
        place = latents.shape[2] // 2
        first = max(0, place - CONTEXT)
        pictures = self._pictures(latents[:1, :, first : place + 1], place - first)
        return None if pictures is None else pictures[0]

    def strip(self, latents: Tensor) -> list[Image.Image] | None:
        """All latent frames of normalised latents (B, 16, F, h, w), as pictures of 8h x 8w; None while at rest."""
        return self._pictures(latents[:1], 0)

    def _pictures(self, latents: Tensor, context: int) -> list[Image.Image] | None:
        if self._decoder is None or time.monotonic() < self._due:
            return None
        # This waits for the device to finish the step, so that the clock counts the preview alone.
        frames = latents[0].float().cpu()
        started = time.monotonic()
        try:
            with on_device(self._decoder, self._device):
                pictures = to_images(self._decoder(frames.to(self._device), context).movedim(1, -1))
        except Exception as error:
            log.warning("Previews are latent-to-RGB from here on; the tiny autoencoder failed: %s", error)
            self._decoder = None
            return None
        now = time.monotonic()
        self._due = now + (now - started) * (1 / SHARE - 1)
        return pictures
