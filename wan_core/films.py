"""Films that go on: more clips after a film, and films through a list of pictures."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .conditioning.film import Extension, extend_conditioning, film_sides
from .conditioning.image import Fit
from .media import VideoData, frames_to_pixels, pixels_to_frames, pixels_to_images
from .media.fitting import Pictures, as_frames, fit_size
from .models.config import Geometry
from .models.vae import normalise
from .pipeline_calls import Call, PipelineCalls
from .sampling.checkpoint import Checkpoint, load_latents
from .types import Conditioning

Film = str | Path | Pictures
"""A video file, a `.latent` file, frames, or normalised latents (1, z, F, h, w)."""

OWN_ARGUMENTS = (
    "input_video", "denoising_strength", "end_image", "sliding_window_size", "sliding_window_stride", "window_prompts",
    "keyframes", "size_rule", "inpaint_video", "inpaint_mask", "vace_video", "vace_video_mask",
)  # fmt: skip
"""Arguments of a call that a film decides itself."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A film to continue: frames, which are read when they are asked for, or latents."""

    frames: Sequence[Image.Image] | Tensor | None
    latents: Tensor | None
    width: int
    height: int

    @classmethod
    def of(cls, film: Film, geometry: Geometry) -> "_Source":
        """Its size is that of the film, cropped to what the model can make.

        Raises:
            ValueError: it is no film, cannot be read, or is smaller than the smallest video.
        """
        if isinstance(film, (str, Path)) and Path(film).suffix.lower() == ".latent":
            film = normalise(load_latents(Path(film))[0], geometry)
        if isinstance(film, Tensor) and film.ndim == 5:
            stride = geometry.spatial_stride
            return cls(frames=None, latents=film, width=film.shape[4] * stride, height=film.shape[3] * stride)
        frames: Any = VideoData(film) if isinstance(film, (str, Path)) else film
        if not isinstance(frames, VideoData):
            frames = as_frames(frames, "film")
        width, height = film_sides(as_frames(frames[0], "film"), geometry)
        return cls(frames=frames, latents=None, width=width, height=height)

    @property
    def first(self) -> Tensor:
        """The first frame (1, H, W, 3)."""
        assert self.frames is not None, "latents have none"
        return as_frames(self.frames[0], "film")

    def last(self, count: int) -> Tensor:
        """The last frames (T, H, W, 3), at most `count` of them."""
        assert self.frames is not None, "latents have none"
        total = len(self.frames)
        return torch.cat([as_frames(self.frames[n], "film") for n in range(max(0, total - count), total)])

    def cropped(self) -> Iterator[Tensor]:
        """Every frame (1, H, W, 3) at the size of the clips; none of latents."""
        for number in range(0 if self.frames is None else len(self.frames)):
            assert self.frames is not None, "counted above"
            yield fit_size(as_frames(self.frames[number], "film"), self.width, self.height, "crop")


class Films(PipelineCalls):
    """Calls that make films of several clips."""

    def extend(
        self,
        film: Film,
        prompts: str | Sequence[str] = "",
        negative_prompt: str = "",
        *,
        clips: int | None = None,
        keep_frames: int | None = None,
        loop: bool = False,
        end_image: Pictures | None = None,
        colour_limit: float = 0.05,
        resume: str | Path | None = None,
        checkpoint_every: int | None = None,
        **call: Any,
    ) -> Any:
        """Continue a film by further clips, and return all of it.

        Each clip begins with the last frames of what is before it, given to the model in the way that it takes: as
        clean frames (TI2V-5B), as known frames beside the noise (image-to-video, Fun InP), as the kept part of a video
        (VACE). Models that read none of these are held to the frames in every step. Latents are handed from clip to
        clip; frames of a film that is none are encoded once, and come out as they are.

        Args:
            film: a video file, a `.latent` file, frames, or normalised latents (1, z, F, h, w). It decides the size.
            prompts: what each clip shows; the last one serves all clips after it.
            clips: how many clips follow; None is one for each prompt.
            keep_frames: how many frames each clip takes over, as whole latent frames hold them (1, 5, 9, ...).
            loop: the last frame is the first one of the film again, with models that take a last frame.
            end_image: the last frame, in place of a loop.
            colour_limit: the most by which each new clip is moved towards the colours of the film's last clip, see
                `WindowSettings`.
            resume: a folder where the unfinished run is kept: the same call in another process goes on after the last
                finished clip, or after the last of `checkpoint_every` steps.
            call: further arguments of `__call__`; `num_frames` is the length of a clip, kept frames included, and
                `input_image` what CLIP sees in place of the first kept frame. A control video or a camera path is as
                long as all new clips with the kept frames. With `output_type` latent, frames are not returned: a film
                of frames gives the latents of its kept and new ones.

        Raises:
            ValueError: an argument is out of range, or the model cannot use it.
        """
        texts = _texts(prompts)
        source = _Source.of(film, self.models.video.geometry)
        parsed = self._parsed(
            call, resume, prompt=texts[0], negative_prompt=negative_prompt, width=source.width, height=source.height
        )
        clips = len(texts) if clips is None else clips
        extension = Extension.of(parsed.size, clips, keep_frames, parsed.model.variant, colour_limit)
        if loop and end_image is not None:
            raise ValueError("A loop ends in the film's own first frame; give end_image or loop.")
        end = None if end_image is None else as_frames(end_image, "end_image")[:1]
        encoded = [self._with_text(text, parsed) for text in texts]
        cond = self._continued(encoded[0], source, extension, parsed, end, loop=loop)
        checkpoint = _checkpoint(resume, checkpoint_every or parsed.settings.total_steps)
        state = self._sampled(cond, None, encoded, parsed, extension.size, checkpoint, clips)
        assert cond.continues is not None, "`extend_conditioning` sets it"
        removed = _removed(checkpoint, [state.run])
        made, dropped = state.video, extension.kept_frames
        if source.latents is not None or parsed.output_type == "latent":
            made, dropped = cond.continues.joined(made), 0
        if parsed.output_type == "latent":
            removed()
            return made.to(self.device)
        return self._joined([(made, dropped)], source.cropped(), parsed, removed)

    def _continued(
        self, cond: Conditioning, source: _Source, extension: Extension, call: Call, end: Tensor | None, *, loop: bool
    ) -> Conditioning:
        """`cond` for the clips of an extension; `loop` ends in the film's first frame."""
        variant, latents, fit = call.model.variant, source.latents, call.fit or Fit()
        tail = None if latents is not None else extension.tail_of(source.last(extension.kept_frames), fit)
        if variant.reads_images:
            self._check_image_encoder(["a film's frames"])
        if loop and latents is None:
            end = source.first
        with self._encoders(call) as encoder:
            return extend_conditioning(
                cond, call.inputs, extension, variant, encoder, self.models.image, tail=tail, film=latents, end=end,
                loop=loop, decode=partial(self._decoded, call=call), fit=call.fit,
            )  # fmt: skip

    def segments(
        self,
        pictures: Sequence[Pictures],
        prompts: str | Sequence[str] = "",
        negative_prompt: str = "",
        *,
        loop: bool = False,
        resume: str | Path | None = None,
        checkpoint_every: int | None = None,
        **call: Any,
    ) -> Any:
        """A film through a list of pictures: a clip from each to the next, which begins where the one before ends.

        Args:
            pictures: two or more.
            prompts: what each clip shows; the last one serves all clips after it.
            loop: a last clip leads back to the first picture.
            resume, checkpoint_every: as of `extend`; finished clips are not made again.
            call: further arguments of `__call__`; `num_frames` is the length of a clip. With `output_type` latent the
                latents of each clip are listed.

        Raises:
            ValueError: an argument is out of range, or the model takes no first and last frame.
        """
        texts = _texts(prompts)
        if isinstance(pictures, (str, Image.Image)) or len(pictures) < 2:
            raise ValueError("segments leads from picture to picture; give a list of two or more.")
        stops = [as_frames(picture, f"picture {number}")[:1] for number, picture in enumerate(pictures)]
        stops += stops[:1] if loop else []
        calls = [
            self._parsed(call, resume, prompt=texts[min(number, len(texts) - 1)], negative_prompt=negative_prompt,
                         keyframes={0: stops[number], -1: stops[number + 1]})
            for number in range(len(stops) - 1)
        ]  # fmt: skip
        for parsed in calls:
            self._check(parsed)
        checkpoint, runs = _checkpoint(resume, checkpoint_every or calls[0].settings.total_steps), []

        def made() -> Iterator[tuple[Tensor, int]]:
            for number, parsed in enumerate(calls):
                cond, _ = self._encode(self._with_text(parsed.prompt, parsed), parsed)
                state = self._sampled(cond, None, (), parsed, checkpoint=checkpoint)
                runs.append(state.run)
                yield state.video, min(number, 1)

        removed = _removed(checkpoint, runs)
        if calls[0].output_type == "latent":
            latents = [video.to(self.device) for video, _ in made()]
            removed()
            return latents
        return self._joined(made(), (), calls[0], removed)

    def _parsed(self, given: Mapping[str, Any], resume: str | Path | None, **own: Any) -> Call:
        """A call with the defaults of `__call__`, arguments of the user, and those that a film decides."""
        parameters = inspect.signature(type(self).__call__).parameters
        defaults = {name: each.default for name, each in parameters.items() if name != "self"}
        strange = [name for name in given if name not in defaults or name in own or name in OWN_ARGUMENTS]
        if strange:
            raise ValueError(f"A film of several clips does not take {', '.join(strange)}.")
        if resume is not None and given.get("seed") is None:
            raise ValueError("resume continues a run of the same seed; give a seed.")
        return Call.of({**defaults, **given, **own}, self.models)

    def _decoded(self, latents: Tensor, call: Call) -> Tensor:
        """Frames (T, H, W, 3) in [0, 1] of normalised latents."""
        vae = self._vae(call.tiles, self._runtime())
        frames = self.models.vae.config.geometry.video_frames(latents.shape[2])
        return pixels_to_frames(vae.decode_pieces(latents), frames)

    def _joined(
        self,
        clips: Iterable[tuple[Tensor, int]],
        before: Iterable[Tensor],
        call: Call,
        removed: Callable[[], None],
    ) -> Any:
        """What the call asks for of the frames `before` and of all clips, each without its first frames as numbered;
        `removed` is called at the end.
        """
        vae = self._decoder(call)

        def pieces() -> Iterator[Tensor]:
            for latents, dropped in clips:
                for piece in vae.decode_pieces(latents):
                    left = piece[:, :, dropped:]
                    dropped = max(0, dropped - piece.shape[2])
                    if left.shape[2]:
                        yield left
            removed()

        if call.output_type == "tensor":
            return torch.cat([*map(frames_to_pixels, before), *pieces()], 2)
        # The frames of a file are whole numbers, and stay the same ones.
        old = (Image.fromarray(frame[0].mul(255).round().byte().numpy()) for frame in before)
        images = chain(old, chain.from_iterable(map(pixels_to_images, pieces())))
        return images if call.output_type == "stream" else list(images)


def _texts(prompts: str | Sequence[str]) -> list[str]:
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"prompts must be a prompt, or a list with one for each clip; got {prompts!r}.")
    return texts


def _checkpoint(folder: str | Path | None, every: int) -> Checkpoint | None:
    return None if folder is None else Checkpoint(Path(folder), every)


def _removed(checkpoint: Checkpoint | None, runs: Sequence[str]) -> Callable[[], None]:
    """A call that removes the kept runs, once their frames are made."""

    def remove() -> None:
        if checkpoint is not None:
            for run in runs:
                checkpoint.remove(run)

    return remove
