"""Pictures at any frames of a video, and films that go on: as inputs of the kind that a model takes."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..media.fitting import fit_size
from ..models.config import Geometry
from ..models.image_encoder import ImageEncoder
from ..types import Conditioning, Continuation, VideoSize, map_tensors, tensors_in
from ..variants import IMAGE, Variant
from .image import Fit, LatentEncoder
from .inputs import VideoInputs, condition

GREY = 0.5
"""What is painted where frames are generated; zero as the VAE sees it."""

KEPT_FRAMES = 5
"""How many frames a clip takes over if nothing is said: two latent frames, which hold a direction of motion."""

CONTEXT = 2
"""Latent frames that are decoded before the one that CLIP sees, for the VAE's memory."""


def keyframe_inputs(variant: Variant, pictures: Mapping[int, Tensor], size: VideoSize, fit: Fit) -> dict[str, Any]:
    """Fields of `VideoInputs` that put pictures at frames of a video of `size`.

    Two pictures at the ends are a start and an end image. VACE models read pictures as the kept part of a video, models
    with a mask beside the noise those between the ends too.

    Args:
        pictures: (T, H, W, 3) in [0, 1] by frame, of which the first one counts; -1 is the last frame.

    Raises:
        ValueError: there is no picture or no such frame, or the model does not take a picture there.
    """
    length = size.num_frames
    wrong = [frame for frame in pictures if not -length <= frame < length]
    if wrong or not pictures:
        raise ValueError(
            f"Keyframes are pictures at frames 0 to {length - 1}, or -1 for the last; got {wrong or 'none'}."
        )
    placed = {frame % length: picture for frame, picture in pictures.items()}
    if len(placed) < len(pictures):
        raise ValueError(f"Two keyframes are at one frame of the video's {length}; got {sorted(pictures)}.")
    allowed = {"any": placed, "ends": (0, length - 1), "first": (0,), "none": ()}[variant.keyframes]
    refused = sorted(set(placed) - set(allowed))
    if refused:
        places = {"ends": "its first and last frame", "first": "its first frame", "none": "no frame"}
        raise ValueError(
            f"A model of this kind ({variant.label}) takes pictures at {places[variant.keyframes]}, not at "
            f"{', '.join(map(str, refused))}. Load a Fun InP, image-to-video or VACE model, or make segments from "
            "picture to picture."
        )
    if "vace_video" in variant.accepts:
        return _kept_parts(placed, size, fit, "vace_video", "vace_video_mask")
    names = {0: "input_image", length - 1: "end_image"}
    ends = {names[frame]: picture for frame, picture in placed.items() if frame in names}
    between = {frame: picture for frame, picture in placed.items() if frame not in names}
    return {**ends, **(_kept_parts(between, size, fit, "inpaint_video", "inpaint_mask") if between else {})}


def _kept_parts(pictures: Mapping[int, Tensor], size: VideoSize, fit: Fit, video: str, mask: str) -> dict[str, Tensor]:
    """A grey video with pictures at some frames, and its mask: 1 where it is generated, 0 at the pictures."""
    frames = torch.full((size.num_frames, size.height, size.width, 3), GREY)
    drawn = torch.ones(size.num_frames, size.height, size.width)
    for frame, picture in pictures.items():
        frames[frame] = fit.picture(picture, size)[0]
        drawn[frame] = 0
    return {video: frames, mask: drawn}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extension:
    """How a film goes on.

    Attributes:
        clip: the size of each clip in pixels, kept frames included.
        clips: how many there are.
        keep: latent frames that each clip takes over.
        colour_limit: as of `WindowSettings`.
    """

    clip: VideoSize
    clips: int
    keep: int
    colour_limit: float = 0.05

    @classmethod
    def of(
        cls, clip: VideoSize, clips: int, keep_frames: int | None, variant: Variant, colour_limit: float = 0.05
    ) -> "Extension":
        """With as many latent frames as hold `keep_frames` frames (1, 5, 9, ...); None takes `KEPT_FRAMES`, and 1 for
        models that are given nothing but a first and a last frame.

        Raises:
            ValueError: a number is below 1, a clip would hold no new frame, or the model cannot keep so many.
        """
        single = variant.keyframes == "ends"
        keep_frames = (1 if single else KEPT_FRAMES) if keep_frames is None else keep_frames
        for name, value in (("clips", clips), ("keep_frames", keep_frames)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}.")
        keep = clip.geometry.latent_frames(keep_frames)
        if keep >= clip.latent.frames:
            raise ValueError(
                f"keep_frames {keep_frames} leaves nothing of a clip of {clip.num_frames} frames to generate; keep "
                "fewer, or make the clips longer."
            )
        if single and keep > 1:
            raise ValueError(f"{variant.label} models begin with one frame; set keep_frames to 1, not {keep_frames}.")
        return cls(clip=clip, clips=clips, keep=keep, colour_limit=colour_limit)

    @property
    def kept_frames(self) -> int:
        """Frames in pixels that hold `keep` latent frames."""
        return self.clip.geometry.video_frames(self.keep)

    @property
    def new_frames(self) -> int:
        """Frames in pixels that each clip adds."""
        return self.clip.num_frames - self.kept_frames

    @property
    def size(self) -> VideoSize:
        """Of all clips with the frames that the first one takes over."""
        latent = self.keep + self.clips * (self.clip.latent.frames - self.keep)
        return dataclasses.replace(self.clip, num_frames=self.clip.geometry.video_frames(latent))

    def tail_of(self, frames: Tensor, fit: Fit) -> Tensor:
        """The last frames of a film (T, H, W, 3) that are taken over, at the size of the clips.

        Raises:
            ValueError: it has fewer.
        """
        if len(frames) < self.kept_frames:
            raise ValueError(
                f"The film has {len(frames)} frames, and each clip takes over {self.kept_frames}; lower keep_frames."
            )
        return fit_size(frames[-self.kept_frames :], self.clip.width, self.clip.height, fit.aspect)


def film_sides(frames: Tensor, geometry: Geometry) -> tuple[int, int]:
    """Width and height of clips that continue frames (T, H, W, 3): theirs, cropped to what the model can make.

    Raises:
        ValueError: they are smaller than the smallest video.
    """
    multiple, (height, width) = geometry.side_multiple, frames.shape[1:3]
    if width < multiple or height < multiple:
        raise ValueError(f"A film has sides of at least {multiple} pixels; got {width}x{height}.")
    return width // multiple * multiple, height // multiple * multiple


def extend_conditioning(
    cond: Conditioning,
    inputs: VideoInputs,
    extension: Extension,
    variant: Variant,
    encoder: LatentEncoder,
    image_encoder: ImageEncoder | None,
    *,
    tail: Tensor | None = None,
    film: Tensor | None = None,
    end: Tensor | None = None,
    loop: bool = False,
    decode: Callable[[Tensor], Tensor] | None = None,
    fit: Fit | None = None,
) -> Conditioning:
    """`cond` for clips that continue a film, in the form that models of `variant` take.

    The kept frames are encoded once, or not at all where they are latents; from then on a run hands latents from clip
    to clip (`sampling.windows.with_known_frames`). What is unknown of a clip is encoded once for all clips alike.

    Args:
        inputs: further inputs; those that have frames are for all clips together (`Extension.size`). `input_image` is
            what CLIP sees in place of the first kept frame.
        tail: the last frames of the film (T, H, W, 3), see `Extension.tail_of`.
        film: in its place the normalised latents of the film, (1, z, L, h, w).
        end: the last frame of the last clip; with frames also that of a loop, the film's first one.
        loop: with `film`, the last frame is the film's first one.
        decode: latents (1, z, F, h, w) to frames (T, H, W, 3), for what a loop and CLIP see of `film`.

    Raises:
        ValueError: the film is shorter than what is kept, has another size, or the model takes no picture at the end.
    """
    fit, size, clip = fit or Fit(), extension.size, extension.clip
    picture, inputs = inputs.input_image, dataclasses.replace(inputs, input_image=None)
    if film is not None:
        assert decode is not None, "latents come with the way to frames"
        picture, end = _decoded_parts(film, extension, variant, decode, picture, end, loop=loop)
    _check_end(variant, extension, end, loop)
    # Inputs with frames of their own are encoded for all clips together, others clip by clip.
    whole = inputs.control_video is not None or inputs.camera is not None
    part, known = size if whole else clip, _known_frames(1 if whole else extension.clips, tail)
    known[-1] |= {} if end is None else {part.num_frames - 1: end}
    picture = tail if picture is None else picture
    brings = picture is not None or bool(inputs.names())
    made, row = dict[tuple[int, ...], Conditioning](), list[Conditioning]()
    for number, pictures in enumerate(known):
        # Clips alike are encoded once. What the first one brings besides its frames holds for all.
        key = (int(number == 0 and brings), *pictures)
        if key not in made:
            fields = _clip_inputs(variant, pictures, part, fit, None if number else picture)
            given = VideoInputs(**fields) if number else dataclasses.replace(inputs, **fields)
            made[key] = condition(cond, given, variant, part, encoder, None if number else image_encoder, fit)
        row.append(made[key])
    kept = _kept_latents(row[0], part.latent.frames, extension.keep, variant, encoder, tail) if film is None else film
    continues = Continuation(kept, extension.keep, clip.latent.frames, extension.colour_limit)
    # A run states the kept frames of every clip, among them the clean ones.
    return dataclasses.replace(
        _in_a_row(row, clip.latent.frames - extension.keep), size=size, continues=continues, clean=None,
        timestep_factors=None, timestep_index=None,
    )  # fmt: skip


def _decoded_parts(
    film: Tensor,
    extension: Extension,
    variant: Variant,
    decode: Callable[[Tensor], Tensor],
    picture: Tensor | None,
    end: Tensor | None,
    *,
    loop: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """What CLIP sees and what a loop ends in, of a film of latents, where they are not given."""
    _check_film(film, extension)
    if loop and variant.keyframes in ("any", "ends"):
        end = decode(film[:, :, :1])[:1]
    if picture is None and variant.reads_images:
        picture = decode(film[:, :, -extension.keep - CONTEXT :])[-1:]
    return picture, end


def _known_frames(clips: int, tail: Tensor | None) -> list[dict[int, Tensor]]:
    """The frames that are known of each clip, by number: those of the film at the beginning of the first one."""
    return [{} if tail is None or number else dict(enumerate(tail.split(1))) for number in range(clips)]


def _check_film(film: Tensor, extension: Extension) -> None:
    latent = extension.clip.latent
    if film.ndim != 5 or len(film) != 1 or film.shape[3:] != (latent.height, latent.width):
        raise ValueError(
            f"The latents of a film are (1, {latent.geometry.channels}, frames, {latent.height}, {latent.width}) for "
            f"clips of {extension.clip}; got {tuple(film.shape)}."
        )
    if film.shape[2] < extension.keep:
        raise ValueError(
            f"The film has {film.shape[2]} latent frames, and each clip takes over {extension.keep}; lower keep_frames."
        )


def _check_end(variant: Variant, extension: Extension, end: Tensor | None, loop: bool) -> None:
    if (loop or end is not None) and variant.keyframes not in ("any", "ends"):
        raise ValueError(
            f"A model of this kind ({variant.label}) takes no last frame, so a film cannot end in one, or in a loop. "
            "Load an image-to-video, Fun InP or VACE model."
        )
    if "end_image" in variant.requires and (end is None or extension.clips > 1):
        raise ValueError(
            f"A model of this kind ({variant.label}) needs a last frame for each clip: continue by one clip, to an end "
            "image or in a loop."
        )


def _clip_inputs(
    variant: Variant, known: Mapping[int, Tensor], size: VideoSize, fit: Fit, picture: Tensor | None
) -> dict[str, Any]:
    """Fields of `VideoInputs` for one clip with `known` frames; `picture` is its start as CLIP sees it."""
    if "vace_video" in variant.accepts:
        return _kept_parts(known, size, fit, "vace_video", "vace_video_mask")
    start = {} if picture is None else {"input_image": picture[:1]}
    end = {"end_image": known[size.num_frames - 1]} if size.num_frames - 1 in known else {}
    match variant.keyframes:
        case "none":
            return {}
        case "first":
            # Control and camera models read one frame; a run tells the others of the frames that are clean.
            return start if variant.slots else {}
        case "ends":
            return {**start, **end}
    start = start if variant.reads_images else {}
    return {**start, **end, **_kept_parts(known, size, fit, "inpaint_video", "inpaint_mask")}


def _kept_latents(
    cond: Conditioning, frames: int, keep: int, variant: Variant, encoder: LatentEncoder, tail: Tensor | None
) -> Tensor:
    """Latents (1, z, keep, h, w) of the kept frames, from where they are encoded already: the VAE is causal."""
    if cond.vace:
        references = cond.prefix_frames(frames)
        return cond.vace[-1].context[:, : encoder.vae.config.geometry.channels, references : references + keep]
    if IMAGE in variant.slots and cond.slots:
        return cond.slots[IMAGE.name][:, :, :keep]
    assert tail is not None, "a film is frames or latents"
    return encoder.frames(tail)


def _in_a_row(clips: Sequence[Conditioning], new: int) -> Conditioning:
    """The conditioning of a whole chain of clips, whose last `new` latent frames each are new: that of the first one,
    with what has a time axis of the others.
    """
    first, *others = clips
    changed = {}
    for field in dataclasses.fields(Conditioning) if others else ():
        axis, value = field.metadata["time"], getattr(first, field.name)
        if axis is not None and value is not None and getattr(others[0], field.name) is not None:
            following = iter(list(zip(*(tensors_in(getattr(other, field.name)) for other in others), strict=True)))

            def joined(tensor: Tensor, axis: int = axis, following: Iterator[Any] = following) -> Tensor:
                after = [each.narrow(axis, each.shape[axis] - new, new) for each in next(following)]
                return torch.cat((tensor, *after), axis)

            changed[field.name] = map_tensors(value, joined)
    return dataclasses.replace(first, **changed)
