"""Sizes and the conditioning, which every part of the library uses.

Shape letters used everywhere: B batch, T pixel frames, F latent frames, H and W pixels, h and w latent cells, R
reference latent frames in front of the video, S tokens, D model width, z channels of a latent. How T, H and W relate to
F, h and w is a model's geometry (`models.config.Geometry`); with Wan 2.1's, z = 16, F = (T - 1) / 4 + 1 and h = H / 8.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .models.config import DEFAULT_GEOMETRY, Geometry

log = logging.getLogger("wancore")


def _geometry() -> Any:
    """A field for the geometry of a size. It is not compared: inputs that are made before a model is known, such as a
    camera path, suit any model whose videos have that size in pixels.
    """
    return field(default=DEFAULT_GEOMETRY, repr=False, compare=False)


@dataclass(frozen=True)
class LatentSize:
    """A latent video: `frames` latent frames of `height` x `width` cells."""

    frames: int
    height: int
    width: int
    geometry: Geometry = _geometry()

    @classmethod
    def of(cls, latents: Tensor, geometry: Geometry) -> "LatentSize":
        """The size of latents (..., F, h, w)."""
        frames, height, width = latents.shape[-3:]
        return cls(frames, height, width, geometry)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.frames, self.height, self.width)

    @property
    def tokens(self) -> int:
        """The number of tokens of a DiT, without reference tokens."""
        return math.prod(side // patch for side, patch in zip(self.shape, self.geometry.patch, strict=True))

    @property
    def video(self) -> "VideoSize":
        """The video that it decodes to."""
        stride = self.geometry.spatial_stride
        frames = self.geometry.video_frames(self.frames)
        return VideoSize(self.width * stride, self.height * stride, frames, self.geometry)


@dataclass(frozen=True)
class VideoSize:
    """The size of a pixel video. Its geometry decides which sides and lengths there are: with Wan 2.1's, multiples of
    16 and 4k + 1 frames. `VideoSize.rounded` makes one from any numbers.
    """

    width: int
    height: int
    num_frames: int
    geometry: Geometry = _geometry()

    @classmethod
    def rounded(cls, width: int, height: int, num_frames: int, geometry: Geometry = DEFAULT_GEOMETRY) -> "VideoSize":
        """The smallest valid size that is at least as large as asked for, with a warning when it is larger.

        Raises:
            ValueError: a side or the frame count is not a positive whole number.
        """
        for name, value in (("width", width), ("height", height), ("num_frames", num_frames)):
            whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            if isinstance(value, bool) or not whole or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}.")
        multiple, time = geometry.side_multiple, geometry.temporal_stride
        size = cls(
            width=-(-int(width) // multiple) * multiple,
            height=-(-int(height) // multiple) * multiple,
            num_frames=-(-(int(num_frames) - 1) // time) * time + 1,
            geometry=geometry,
        )
        if (size.width, size.height, size.num_frames) != (width, height, num_frames):
            log.warning("Rounded up to %s (asked for %dx%d, %d frames).", size, width, height, num_frames)
        return size

    @property
    def latent(self) -> LatentSize:
        stride = self.geometry.spatial_stride
        frames = self.geometry.latent_frames(self.num_frames)
        return LatentSize(frames, self.height // stride, self.width // stride, self.geometry)

    def as_dict(self) -> dict[str, int]:
        """Width, height and num_frames, as manifests hold them."""
        return {"width": self.width, "height": self.height, "num_frames": self.num_frames}

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, {self.num_frames} frames"


def frames(axis: int, *, prefixed: bool = False) -> Any:
    """A field whose tensors have the video's latent frames on `axis`; if `prefixed`, R reference frames before them."""
    return field(default=None, metadata={"time": axis, "prefixed": prefixed, "host": False})


def whole() -> Any:
    """A field without a time axis, which describes the whole video."""
    return field(default=None, metadata={"time": None, "prefixed": False, "host": False})


def read_by_host(axis: int) -> Any:
    """As `frames`, for whole numbers that say what is computed: they stay on the CPU, so that no run waits for them."""
    return field(default=None, metadata={"time": axis, "prefixed": False, "host": True})


@dataclass(frozen=True)
class Curve:
    """A number that may change over the steps of a run.

    `values` are spread evenly over the steps from fraction `start` to fraction `end` of the run and interpolated
    between; outside of that range the number is `outside`. One value is a constant.

    Raises:
        ValueError: no values, one that is not finite, or not 0 <= start <= end <= 1.
    """

    values: tuple[float, ...]
    start: float = 0.0
    end: float = 1.0
    outside: float = 0.0

    def __post_init__(self) -> None:
        if not self.values or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in self.values):
            raise ValueError(f"A curve needs at least one finite number; got {self.values}.")
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"A curve needs 0 <= start <= end <= 1; got start {self.start}, end {self.end}.")

    @classmethod
    def of(cls, value: "float | Sequence[float] | Curve", **changes: Any) -> "Curve":
        """A number, a list of numbers or a curve as a curve."""
        if isinstance(value, Curve):
            return dataclasses.replace(value, **changes)
        return cls((value,) if isinstance(value, (int, float)) else tuple(value), **changes)

    def at(self, index: int, total: int) -> float:
        """The number at step `index` of `total`; the first step is at fraction 0 and the last at 1."""
        fraction = index / (total - 1) if total > 1 else 0.0
        if not self.start <= fraction <= self.end:
            return self.outside
        span = self.end - self.start
        place = (fraction - self.start) / span * (len(self.values) - 1) if span else 0.0
        low = min(int(place), len(self.values) - 1)
        high = min(low + 1, len(self.values) - 1)
        return self.values[low] + (place - low) * (self.values[high] - self.values[low])


@dataclass(frozen=True)
class Slot:
    """Named latents that are concatenated to the noise on channels.

    Attributes:
        name: how they are made. `mask` marks known frames, `image` is a video padded with grey and encoded, `control`
        an encoded video, `first_frame` the latent of one frame with zeros after it. known: what they hold of known
        frames: `mask` ones, `frames` their latents, `first` the latent of the first frame of a clip; None when they do
        not describe known frames.
    """

    name: str
    known: Literal["mask", "frames", "first"] | None = None

    def channels(self, geometry: Geometry) -> int:
        """The number of channels, that of a latent or of a mask of known frames."""
        return geometry.mask_channels if self.known == "mask" else geometry.channels


@dataclass(frozen=True, kw_only=True)
class VaceInput:
    """One VACE input: context (B, 2 z + 64, R + F, h, w), and the factor on its hints."""

    context: Tensor
    strength: Curve = Curve((1.0,))


@dataclass(frozen=True)
class Continuation:
    """A film that a run continues, in a chain of clips.

    Attributes:
        film: its normalised latents (B, z, L, h, w), or those of its last frames.
        keep: the latent frames with which each clip begins: the last ones of what is before it.
        clip: latent frames of a clip, kept ones included.
        colour_limit: as of `WindowSettings`.
    """

    film: Tensor
    keep: int
    clip: int
    colour_limit: float = 0.05

    @property
    def before(self) -> int:
        """Frames of the film before those that the first clip begins with. A run has all others."""
        return self.film.shape[2] - self.keep

    def joined(self, video: Tensor) -> Tensor:
        """The film with a run's result (B, z, keep + new, h, w), which begins with frames of it."""
        return torch.cat((self.film[:, :, : self.before].to(video), video), 2)


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """All inputs of one sampling run besides noise. Frozen: functions return a changed copy.

    Every field declares its time axis, so that cutting windows, joining batches and moving devices are loops over
    fields.
    """

    text: Tensor | None = whole()
    """(B, 512, text_dim); rows after the last token are zeros."""
    negative_text: Tensor | None = whole()
    """Like `text`, for the unconditional branch."""
    image_tokens: Tensor | None = whole()
    """(B, 257 or 514, image_dim), of CLIP."""
    slots: Mapping[str, Tensor] | None = frames(2)
    """Named latents (B, z, F, h, w) and masks (B, 4, F, h, w); `variants.fit` concatenates them in a
    variant's order.
    """
    concat: Tensor | None = frames(2)
    """(B, in_channels - z, F, h, w), concatenated to the latents on channels."""
    layout: tuple[Slot, ...] | None = whole()
    """The slots of which `concat` consists, in order; None when it was not made from slots."""
    reference: Tensor | None = whole()
    """(B, z, h, w), made into tokens in front of the sequence by `ref_conv`."""
    camera: Tensor | None = frames(2)
    """(B, 24, F, H, W), folded Plücker rays at pixel resolution."""
    vace: tuple[VaceInput, ...] | None = frames(2, prefixed=True)
    """VACE inputs, each with its own strength."""
    motion_bucket: Tensor | None = whole()
    """(B,), speed from 0 to 100."""
    clean: Tensor | None = frames(2)
    """(B, z, F, h, w), latents of the frames whose factor on the timestep is 0: they are given to the model at every
    step, and come out as they are.
    """
    timestep_factors: Tensor | None = whole()
    """(B, U), from 0 to 1: the fractions of a step's timestep that tokens have; without them all have the whole."""
    timestep_index: Tensor | None = read_by_host(1)
    """(B, F, 1, 1) or (B, F, rows, columns of tokens): the factor that each frame or token has, the same in a batch."""
    continues: Continuation | None = whole()
    """A film whose last frames are the first ones of this video; its size is that of both in cells."""
    size: VideoSize | None = whole()
    """The size of the video that the inputs were made for; None for text alone."""
    inputs: tuple[str, ...] | None = whole()
    """Names of the user's inputs that this was made from, besides text, for `variants.check`."""
    without_tokens: tuple[str, ...] | None = whole()
    """Names of those that were encoded without an image encoder, which not all models need."""

    def with_inputs(self, *names: str, size: VideoSize | None = None, **changes: Any) -> "Conditioning":
        """A copy with the fields `changes`, and `names` among the inputs that it was made from.

        Raises:
            ValueError: `size` differs from that of earlier inputs.
        """
        if size and self.size and size != self.size:
            raise ValueError(
                f"{', '.join(names)} is made for {size}, but {', '.join(self.inputs or ())} for {self.size}."
            )
        inputs = dict.fromkeys((*(self.inputs or ()), *names))
        return dataclasses.replace(self, inputs=tuple(inputs), size=size or self.size, **changes)

    @property
    def encoded_text(self) -> Tensor:
        """`text`, without which no model runs.

        Raises:
            ValueError: there is none.
        """
        if self.text is None:
            raise ValueError("The conditioning holds no text; encode a prompt first.")
        return self.text

    @property
    def clean_places(self) -> list[int]:
        """The frames of the video that are clean."""
        if self.clean is None or self.timestep_index is None:
            return []
        is_clean = (self.timestep_index[0] == 0).all((1, 2)).tolist()
        return [place for place, known in enumerate(is_clean) if known]

    def negative(self) -> "Conditioning":
        """The unconditional branch: the same conditioning with the negative text in place of the text."""
        return dataclasses.replace(self, text=self.negative_text, negative_text=None)

    def joined(self, other: "Conditioning") -> "Conditioning":
        """Both conditionings as one batch, `self` first. Both must have the same fields."""
        changed = {}
        for f in dataclasses.fields(self):
            first, second = getattr(self, f.name), getattr(other, f.name)
            if first is not None and second is not None:
                changed[f.name] = _join(first, tensors_in(second))
        return dataclasses.replace(self, **changed)

    def prefix_frames(self, frames: int) -> int:
        """R, the number of reference latent frames in front of a video of `frames` latent frames."""
        for f in dataclasses.fields(self):
            if f.metadata["prefixed"]:
                for tensor in tensors_in(getattr(self, f.name)):
                    return tensor.shape[f.metadata["time"]] - frames
        return 0

    def expanded(self, batch: int) -> "Conditioning":
        """A copy in which tensors of one video are repeated for a batch of `batch`."""
        return self.map(lambda t, _: t.expand(batch, *t.shape[1:]) if len(t) == 1 else t)

    def map(self, fn: Callable[[Tensor, Mapping[str, Any]], Tensor]) -> "Conditioning":
        """A copy in which every tensor `t` of a field is `fn(t, metadata of the field)`."""
        changed = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is not None:

                def apply(tensor: Tensor, metadata: Mapping[str, Any] = f.metadata) -> Tensor:
                    return fn(tensor, metadata)

                changed[f.name] = map_tensors(value, apply)
        return dataclasses.replace(self, **changed)

    def to(self, device: torch.device) -> "Conditioning":
        """A copy with every tensor on `device`, but for those that the host reads."""
        return self.map(lambda t, meta: t if meta["host"] else t.to(device))

    def on_meta(self) -> "Conditioning":
        """A copy of tensors that have sizes and no data, but for those that the host reads."""
        return self.map(lambda t, meta: t if meta["host"] else torch.empty_like(t, device="meta"))

    def with_clean_frames(self, latents: Tensor, frames: int) -> "Conditioning":
        """A copy whose first frames are `latents` (B, z, k, h, w), of a video of `frames` latent frames."""
        count, batch = latents.shape[2], len(latents)
        clean = latents.new_zeros(*latents.shape[:2], frames, *latents.shape[3:]) if self.clean is None else self.clean
        index, factors = self.timestep_index, self.timestep_factors
        if index is None or factors is None:
            index = torch.ones(batch, frames, 1, 1, dtype=torch.long)
            factors = torch.tensor([[0.0, 1.0]], device=latents.device).expand(batch, -1)
        clean, index = clean.clone(), index.clone()
        clean[:, :, :count], index[:, :count] = latents, 0
        return dataclasses.replace(self, clean=clean, timestep_factors=factors, timestep_index=index)


def map_tensors(value: Any, fn: Callable[[Tensor], object]) -> Any:
    """`value` with `fn` applied to every tensor inside tuples, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, tuple):
        return tuple(map_tensors(v, fn) for v in value)
    if isinstance(value, Mapping):
        return {k: map_tensors(v, fn) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, (Curve, LatentSize, VideoSize, type)):
        changed = {f.name: map_tensors(getattr(value, f.name), fn) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    return value


def _join(value: Any, others: Sequence[Tensor]) -> Any:
    following = iter(others)
    return map_tensors(value, lambda tensor: torch.cat((tensor, next(following))))


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor inside tuples, mappings and dataclasses, in the order of `map_tensors`."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, collect)
    return found


@dataclass(frozen=True)
class StepInfo:
    """The position of a prediction in its run: step `index` of `total` and window number `window`. `evaluation` counts
    the evaluations of one step; most solvers make one.
    """

    index: int
    total: int
    window: int = 0
    evaluation: int = 0
