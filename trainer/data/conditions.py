"""Rows of a data set as what a model is trained on: latents and conditioning, made by the functions of inference."""

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_core.conditioning.inputs import condition, numeric_conditioning
from wan_core.conditioning.text import clean_prompt
from wan_core.media import fitting, frames_to_pixels
from wan_core.models.config import TEXT_TOKENS
from wan_core.types import Conditioning, VaceInput, VideoSize

from ..config import TrainConfig
from ..model.load import FoundModels
from .cache import Encoders, LatentCache
from .choices import Choice, Media, choose, fixed
from .clips import INPUTS, WHOLE, frames_at_rate
from .report import Row

CACHE_VERSION = 2
"""Raise it when the same files and options are encoded to other tensors than before."""

ENCODED = ("input_image", "end_image", "inpaint_video", "control_video", "reference_image", "vace")
"""Prefixes of inputs that pass through an encoder. The others are cheap to compute again."""

EXACT = ("clean", "timestep_factors", "timestep_index")
"""Encoded tensors that keep their dtype: frames that are part of the noisy latents, and whole numbers."""

Shape = tuple[VideoSize, tuple[str, ...], int]
"""What must be equal within a batch: size, the names of the inputs, and the number of VACE reference frames."""


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """One sample as a model is trained on it, on the CPU.

    Attributes:
        latents: (z, R + F, h, w) in float32, normalised; the R VACE references come first and are trained too.
        cond: for one video, fitted to the model.
        caption: what `cond.text` was made of.
        position: its place in the epoch's data, for random numbers.
        name: of the clip's file.
        pixels: (3, T, H, W) in [-1, 1], only where the VAE is trained.
    """

    latents: Tensor
    cond: Conditioning
    caption: str
    position: int
    name: str
    pixels: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Several samples of one shape.

    Attributes:
        latents: (B, z, R + F, h, w).
        cond: for B videos.
        captions, positions, names: of each.
        pixels: (B, 3, T, H, W), only where the VAE is trained.
    """

    latents: Tensor
    cond: Conditioning
    captions: tuple[str, ...]
    positions: tuple[int, ...]
    names: tuple[str, ...]
    pixels: Tensor | None = None


def collate(samples: Sequence[EncodedSample]) -> Batch:
    """`samples` as one batch.

    Raises:
        ValueError: their shapes or inputs differ.
    """
    present = {tuple(f.name for f in fields(s.cond) if getattr(s.cond, f.name) is not None) for s in samples}
    shapes = {tuple(s.latents.shape) for s in samples}
    if len(shapes) != 1 or len(present) != 1:
        raise ValueError(f"A batch needs samples of one shape with the same inputs; got {shapes} with {present}.")
    pixels = [s.pixels for s in samples if s.pixels is not None]
    return Batch(
        latents=torch.stack([s.latents for s in samples]),
        cond=reduce(Conditioning.joined, (s.cond for s in samples)),
        captions=tuple(s.caption for s in samples),
        positions=tuple(s.position for s in samples),
        names=tuple(s.name for s in samples),
        pixels=torch.stack(pixels) if pixels else None,
    )


class Examples:
    """The rows of a data set as `Encoded` samples: `config.dataset_repeat` times each row makes the positions of an
    epoch.

    The random choices for a sample depend on (seed, epoch, position) only.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        models: FoundModels,
        encoders: Encoders,
        config: TrainConfig,
        cache: LatentCache | None = None,
    ) -> None:
        self.rows, self.models, self.encoders, self.config, self.cache = tuple(rows), models, encoders, config, cache
        self._identities: dict[str, Any] = {}
        self._once = _Once()

    def __len__(self) -> int:
        return len(self.rows) * self.config.dataset_repeat

    def row(self, position: int) -> Row:
        """The row of a position."""
        return self.rows[position % len(self.rows)]

    def shapes(self, epoch: int) -> Sequence[Hashable]:
        """What must be equal within a batch, per position: the shape, and the expert of a pair that is trained."""
        if self._draws_inputs:
            shapes = [self._shape(self.choose(position, epoch)) for position in range(len(self))]
        else:
            shapes = self.config.dataset_repeat * [self._shape(self.fixed(row)) for row in range(len(self.rows))]
        experts = self.models.objective(self.config).experts(self.config.seed, epoch, range(len(self)))
        return shapes if self.models.boundary is None else list(zip(shapes, experts, strict=True))

    @property
    def shapes_change(self) -> bool:
        """Whether `shapes` differ from epoch to epoch, because inputs or experts are drawn."""
        return self._draws_inputs or self.models.boundary is not None

    @property
    def _draws_inputs(self) -> bool:
        return self.config.random_mask or self.config.condition_dropout > 0

    def _shape(self, choice: Choice) -> Shape:
        references = choice.row.clips.get("vace_reference_image", ())
        return choice.row.size, choice.inputs, len(references) if "vace_reference_image" in choice.names else 0

    def choose(self, position: int, epoch: int) -> Choice:
        """The random choices for a position in an epoch."""
        config = self.config
        return _of_picture(choose(self.row(position), config, self._kept(config.extra_inputs), epoch, position))

    def fixed(self, position: int) -> Choice:
        """The choices for a position without randomness, for validation."""
        return _of_picture(fixed(self.row(position), self.config))

    def _kept(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """What condition dropout leaves of the inputs `names`."""
        dropped = self.models.droppable(names)
        return tuple(name for name in names if name not in dropped)

    def get(self, position: int, epoch: int) -> EncodedSample:
        """The sample of a position in an epoch, from the cache where it is there.

        Raises:
            ValueError: a file cannot be read any more; the message names the row.
        """
        return self.encode(self.choose(position, epoch), position)

    @torch.no_grad()
    def encode(self, choice: Choice, position: int) -> EncodedSample:
        """The sample of a choice, from the cache where it is there.

        Raises:
            ValueError: a file cannot be read any more; the message names the row.
        """
        row = choice.row
        with self._reading(row):
            media = Media(choice, self.config)
            text = self._cached(self._text_parts(choice.caption), lambda: self._text(choice.caption))
            latents = self._cached(self._latent_parts(choice), lambda: self._latents(media))["latents"]
            encoded = self._cached(self._condition_parts(choice), lambda: self._encoded_inputs(media))
            inputs = media.inputs(lambda name: not name.startswith(ENCODED))
            cond = numeric_conditioning(Conditioning(text=_padded(text["text"])), inputs, row.size)
            cond = self.models.fit(_unpacked(encoded, cond, choice.inputs, row.size), row.size)
        if "leading" in encoded:
            latents = torch.cat((encoded["leading"], latents), 2)
        return EncodedSample(
            latents=latents[0],
            cond=cond,
            caption=choice.caption,
            position=position,
            name=row.name,
            pixels=frames_to_pixels(media.frames)[0] if "vae" in self.config.trainable_models else None,
        )

    def fill(
        self,
        rank: int = 0,
        world: int = 1,
        on_progress: Callable[[int, int], None] | None = None,
        stops: Callable[[], bool] = lambda: False,
    ) -> None:
        """Encode this process's share of what the cache lacks.

        Captions come first, so that the text encoder is freed before the other encoders load. Call `encoders.free()`
        afterwards. `on_progress` is called as (done, total). `stops` is asked before each sample whether to end early.

        Raises:
            ValueError: a file cannot be read; the message names the row.
        """
        choices = [self.fixed(position) for position in range(len(self.rows))]
        if self.config.condition_dropout:
            choices += [replace(choice, names=self._kept(choice.names)) for choice in choices]
        captions = {caption: None for row in self.rows for caption in row.sample.captions} | {"": None}
        texts = list(captions)[rank::world]
        mine = choices[rank::world]
        total = len(texts) + len(mine)
        waiting: list[str | Choice] = [*texts, *mine]
        for done, work in enumerate(waiting, 1):
            if stops():
                return
            if isinstance(work, str):
                self._fill_one(self._text_parts(work), partial(self._text, work))
            else:
                if "text_encoder" in self.encoders.loaded:
                    self.encoders.free()
                self._fill_pictures(work)
            if on_progress is not None:
                on_progress(done, total)

    @torch.no_grad()
    def _fill_pictures(self, choice: Choice) -> None:
        with self._reading(choice.row):
            media = Media(choice, self.config)
            self._fill_one(self._latent_parts(choice), lambda: self._latents(media))
            self._fill_one(self._condition_parts(choice), lambda: self._encoded_inputs(media))

    def _fill_one(self, parts: Mapping[str, Any] | None, make: Callable[[], dict[str, Tensor]]) -> None:
        """Make what `parts` describes, unless the cache has it."""
        cache = self.cache
        if cache is not None and parts is not None and (key := cache.key(parts)) not in cache:
            cache.put(key, _finite(make()))

    def _cached(self, parts: Mapping[str, Any] | None, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors for `parts` from the cache, or from `make`, which are then cached. None has no tensors."""
        if parts is None:
            return {}
        if self.cache is None:
            return _finite(make())
        key = self.cache.key(parts)
        kept = self.cache.get(key)
        if kept is None:
            kept = _finite(make())
            self.cache.put(key, kept)
        return kept

    @contextmanager
    def _reading(self, row: Row) -> Iterator[None]:
        """Around work on a row: adds the row's name to errors, and logs each note on the fitting of pictures once."""
        fitting.log.addFilter(self._once)
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{row.sample.where} ({row.name}): {error}") from error
        finally:
            fitting.log.removeFilter(self._once)

    @torch.no_grad()
    def _text(self, caption: str) -> dict[str, Tensor]:
        """The rows (1, L, D) of a caption's tokens; the zero rows after them are left out."""
        embedding = self.encoders.text.encode([caption])[0].cpu()
        tokens = int(embedding.any(1).nonzero().max()) + 1
        return {"text": embedding[None, :tokens]}

    def _latents(self, media: "Media") -> dict[str, Tensor]:
        return {"latents": self.encoders.latents.frames(media.frames).cpu()}

    def _encoded_inputs(self, media: "Media") -> dict[str, Tensor]:
        """The tensors of all inputs that pass through an encoder, in the dtype that the model computes in."""
        inputs = media.inputs(lambda name: name.startswith(ENCODED))
        encoders = self.encoders
        size = media.choice.row.size
        cond = condition(Conditioning(), inputs, self.models.variant, size, encoders.latents, encoders.image)
        tensors = {name: tensor.cpu() for name, tensor in _packed(cond).items()}
        tensors = {name: t if name in EXACT else t.to(encoders.dtype) for name, t in tensors.items()}
        count = cond.prefix_frames(size.latent.frames)
        if count and cond.vace:
            tensors["leading"] = cond.vace[0].context[:, : size.geometry.channels, :count].float().cpu()
        return tensors

    def _identity(self, kind: str) -> Any:
        if kind not in self._identities:
            assert self.cache is not None, "what outputs depend on is asked for their place in the cache"
            self._identities[kind] = self.encoders.identity(kind, self.cache)
        return self._identities[kind]

    def _text_parts(self, caption: str) -> dict[str, Any]:
        if self.cache is None:
            return {}
        return {
            "what": "text",
            "version": CACHE_VERSION,
            "caption": clean_prompt(caption),
            "encoder": self._identity("text_encoder"),
        }

    def _latent_parts(self, choice: Choice) -> dict[str, Any]:
        if self.cache is None:
            return {}
        row = choice.row
        return {
            "what": "latents",
            "version": CACHE_VERSION,
            "encoder": self._identity("vae"),
            "file": self.cache.file_hash(row.target.path),
            "frames": [frames_at_rate(row.target, self.config.fps)[place] for place in choice.places],
            "size": [row.size.width, row.size.height, row.size.num_frames],
        }

    def _condition_parts(self, choice: Choice) -> dict[str, Any] | None:
        """None when no input passes through an encoder."""
        if not any(name.startswith(ENCODED) for name in choice.inputs):
            return None
        if self.cache is None:
            return {}
        files = {name: choice.row.clips.get(name, ()) for name in choice.names}
        return {
            **self._latent_parts(choice),
            "what": "condition",
            "variant": self.models.variant.name,
            "image_encoder": self._identity("image_encoder"),
            "inputs": {
                name: [[self.cache.file_hash(c.path), [*frames_at_rate(c, self.config.fps)]] for c in clips]
                for name, clips in files.items()
                if name.startswith(ENCODED)
            },
        }


def _of_picture(choice: Choice) -> Choice:
    """`choice`; where its clip is a picture and a start image would be a clean frame, so that nothing of it would be
    left to learn, without a start image.
    """
    size = choice.row.size.latent
    if size.frames > 1 or not size.geometry.frame_times:
        return choice
    names = tuple(name for name in choice.names if INPUTS[name].kind not in ("start", "end"))
    return replace(choice, names=names, mask=choice.mask and WHOLE)


class _Once(logging.Filter):
    """Lets each text through once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        is_new = text not in self._seen
        self._seen.add(text)
        return is_new


def _finite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, checked: the output of an encoder that overflowed must not reach the cache.

    Raises:
        ValueError: one of them holds NaN or infinity.
    """
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"encoding gave NaN or infinity in its {broken[0]}; try --mixed_precision no")
    return tensors


def _packed(cond: Conditioning) -> dict[str, Tensor]:
    """The tensors that encoders made, by name."""
    tensors: dict[str, Tensor | None] = {f"slots.{name}": tensor for name, tensor in (cond.slots or {}).items()}
    tensors |= {f"vace.{index}": vace.context for index, vace in enumerate(cond.vace or ())}
    tensors |= {"clip": cond.image_tokens, "reference": cond.reference}
    tensors |= {name: getattr(cond, name) for name in EXACT}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _unpacked(tensors: Mapping[str, Tensor], cond: Conditioning, names: Sequence[str], size: VideoSize) -> Conditioning:
    """`cond` with the tensors of `_packed`."""
    slots = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("slots.")}
    vace = tuple(VaceInput(context=tensor) for name, tensor in tensors.items() if name.startswith("vace."))
    found: dict[str, Any] = {"slots": slots or None, "vace": vace or None}
    found |= {"image_tokens": tensors.get("clip"), "reference": tensors.get("reference")}
    found |= {name: tensors.get(name) for name in EXACT}
    return cond.with_inputs(*names, size=size, **found)


def _padded(text: Tensor) -> Tensor:
    return F.pad(text, (0, 0, 0, TEXT_TOKENS - text.shape[1]))
