"""Which samples form a batch, which caption, inputs and frames of a sample are used in an epoch, and the steps of a run
in their order.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from wan_core.conditioning.camera import CameraPath
from wan_core.conditioning.inputs import VideoInputs
from wan_core.media import Clip

from ..config import TrainConfig
from .clips import ALIGNED_KINDS, BOTH, INPUTS, START, draw_mask, frames_at_rate, input_names, mask_kind, read
from .report import Row


def batches(
    shapes: Sequence[Hashable], seed: int, epoch: int, batch_size: int, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """The batches of one process in one epoch, each a list of positions in `shapes`.

    All positions of a batch have one shape. The processes' batches of one index form a global batch of one shape too,
    and hold together the positions that a single process of `world` times the batch size would take. Every position
    occurs; where a shape's last positions do not divide among the processes, some of its positions occur twice.

    Args:
        shapes: what must be equal within a batch, per position.
        seed, epoch: choose the permutation.
        batch_size: positions per process.
        rank, world: which of how many processes.

    Raises:
        ValueError: there is no position, or `rank` is not one of `world`.
    """
    if not shapes or batch_size < 1 or not 0 <= rank < world:
        raise ValueError(f"No batches of {batch_size} from {len(shapes)} samples for process {rank} of {world}.")
    buckets: dict[Hashable, list[int]] = {}
    order = permutation(len(shapes), seed, epoch)
    for position in order:
        buckets.setdefault(shapes[position], []).append(position)
    place = {position: index for index, position in enumerate(order)}
    together = [part for bucket in buckets.values() for part in _parts(bucket, batch_size * world, world)]
    together.sort(key=lambda part: place[part[0]])
    share = [len(part) // world for part in together]
    return [part[rank * n : (rank + 1) * n] for part, n in zip(together, share, strict=True)]


def permutation(count: int, seed: int, epoch: int) -> list[int]:
    """The positions 0 to `count` - 1 in the order of `epoch`."""
    generator = torch.Generator().manual_seed(mix_seeds(seed, epoch))
    return torch.randperm(count, generator=generator).tolist()


def mix_seeds(*numbers: int) -> int:
    """One seed of 63 bits from several numbers, unlike for neighbours (the finaliser of SplitMix64, Steele et al. 2014,
    applied to each)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def _parts(bucket: list[int], size: int, world: int) -> list[list[int]]:
    """`bucket` in parts of `size`; the last one may be smaller, and repeats positions until `world` divides it."""
    parts = [bucket[start : start + size] for start in range(0, len(bucket), size)]
    last = parts[-1]
    parts[-1] = last + [bucket[index % len(bucket)] for index in range(-len(last) % world)]
    return parts


STREAM = 0xDA7A
"""Makes these seeds differ from those of the objective for the same sample."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The random choices for one sample in one epoch.

    Attributes:
        row: the sample.
        caption: one of its captions, or nothing.
        names: the extra inputs that it is trained with.
        places: which frames of the clip, at the frame rate of the run.
        mask: the kind of random mask; None without one.
        seed: of that mask.
    """

    row: Row
    caption: str
    names: tuple[str, ...]
    places: tuple[int, ...]
    mask: str | None = None
    seed: int = 0

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs by the names that `wan_core.variants` uses."""
        masked = {None: (), START: ("input_image",), BOTH: ("input_image", "end_image")}
        return input_names(self.names) + masked.get(self.mask, ("inpaint_video",))


def choose(row: Row, config: TrainConfig, kept: tuple[str, ...], epoch: int, position: int) -> Choice:
    """The choices for `row` at a position in an epoch. Condition dropout leaves the inputs `kept`.

    They depend on (seed, epoch, position) only.
    """
    seed = mix_seeds(STREAM, config.seed, epoch, position)
    generator = torch.Generator().manual_seed(seed)
    which, no_caption, no_condition, start, kind = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    captions = row.sample.captions
    return Choice(
        row=row,
        caption="" if no_caption < config.caption_dropout else captions[int(which * len(captions))],
        names=kept if no_condition < config.condition_dropout else config.extra_inputs,
        places=tuple(row.places(config, start)),
        mask=mask_kind(kind) if config.random_mask else None,
        seed=mix_seeds(seed),
    )


def fixed(row: Row, config: TrainConfig) -> Choice:
    """`row` without random choices: its first caption, all inputs, the first frames. A random mask leaves the first
    frame."""
    return Choice(
        row=row,
        caption=row.sample.captions[0],
        names=config.extra_inputs,
        places=tuple(row.places(config)),
        mask=START if config.random_mask else None,
    )


class Media:
    """The pixels of one choice, read when they are asked for."""

    def __init__(self, choice: Choice, config: TrainConfig) -> None:
        self.choice, self.config = choice, config
        self._frames: Tensor | None = None

    @property
    def frames(self) -> Tensor:
        """The trained clip (T, H, W, 3) in [0, 1]."""
        if self._frames is None:
            self._frames = self._aligned(self.choice.row.target)
        return self._frames

    def inputs(self, wanted: Callable[[str], bool]) -> VideoInputs:
        """Those inputs whose names `wanted` accepts."""
        choice = self.choice
        values: dict[str, Any] = {}
        for name in choice.names:
            if wanted(INPUTS[name].gives):
                values[INPUTS[name].gives] = self._value(name)
        if choice.mask is not None and wanted("inpaint_video"):
            values |= self._masked()
        return VideoInputs(**values)

    def _value(self, name: str) -> Any:
        row, kind = self.choice.row, INPUTS[name].kind
        if kind in ("start", "end"):
            return self.frames[:1] if kind == "start" else self.frames[-1:]
        if INPUTS[name].gives == "camera":
            return self._camera()
        if kind == "number":
            return float(row.sample.values[name])
        clips = row.clips[name]
        if kind in ALIGNED_KINDS:
            frames = self._aligned(clips[0])
            return frames[..., 0] if kind == "mask" else frames
        pictures = tuple(read(clip, [0]) for clip in clips)
        return pictures if kind == "pictures" else pictures[0]

    def _masked(self) -> dict[str, Tensor]:
        kind, size = self.choice.mask, self.choice.row.size
        if kind in (START, BOTH):
            return {"input_image": self.frames[:1]} | ({"end_image": self.frames[-1:]} if kind == BOTH else {})
        assert kind is not None, "asked for where a mask was drawn"
        generator = torch.Generator().manual_seed(self.choice.seed)
        mask = draw_mask(kind, size.num_frames, size.height, size.width, generator)
        return {"inpaint_video": self.frames, "inpaint_mask": mask}

    def _camera(self) -> CameraPath:
        """The camera path of a pose file, cut to the trained frames, or of a named direction."""
        sample, places = self.choice.row.sample, self.choice.places
        if "camera_path" in self.choice.names:
            path = CameraPath.from_file(sample.files["camera_path"][0])
            if path.num_frames > max(places):
                return replace(path, rows=tuple(path.rows[place] for place in places))
            return path
        speed = INPUTS["camera_control_speed"].default
        assert speed is not None, "a column that may be left out has a default"
        if "camera_control_speed" in self.choice.names:
            speed = float(sample.values.get("camera_control_speed", speed))
        return CameraPath.from_direction(sample.values["camera_control_direction"], len(places), speed)

    def _aligned(self, clip: Clip) -> Tensor:
        """The frames of `clip` at the places of this choice; a picture is repeated."""
        size = self.choice.row.size
        stored = frames_at_rate(clip, self.config.fps)
        places = self.choice.places if clip.fps is not None else [0] * size.num_frames
        return read(clip, [stored[place] for place in places], size.width, size.height)


@dataclass(frozen=True)
class Step:
    """One optimizer step of one process.

    Attributes:
        number: of the step, from 1.
        epoch: from 0.
        batches: positions in the epoch, one group per forward pass.
        samples: how many samples all processes take in it together.
        ends_epoch: whether it is the last one of its epoch.
    """

    number: int
    epoch: int
    batches: tuple[tuple[int, ...], ...]
    samples: int
    ends_epoch: bool


@dataclass(frozen=True)
class Plan:
    """All steps of a run.

    Attributes:
        config: its settings.
        shapes: what must be equal within a batch, by position, for an epoch.
        rank, world: which of how many processes.
        shapes_change: whether `shapes` differ from epoch to epoch.
    """

    config: TrainConfig
    shapes: Callable[[int], Sequence[Hashable]]
    rank: int = 0
    world: int = 1
    shapes_change: bool = False

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Steps of each epoch."""
        if not self.shapes_change:
            return (len(self._groups(0)),) * self.config.num_epochs
        return tuple(len(self._groups(epoch)) for epoch in range(self.config.num_epochs))

    @cached_property
    def total(self) -> int:
        """Steps of the run."""
        whole = sum(self.lengths)
        return whole if self.config.max_steps is None else min(whole, self.config.max_steps)

    def steps(self, done: int = 0) -> Iterator[Step]:
        """The steps after the first `done`."""
        number = 0
        for epoch, length in enumerate(self.lengths):
            if number + length > done:
                for index, group in enumerate(self._groups(epoch)):
                    step = number + index + 1
                    if done < step <= self.total:
                        samples = self.world * sum(map(len, group))
                        yield Step(step, epoch, group, samples, index == length - 1)
            number += length

    def _groups(self, epoch: int) -> list[tuple[tuple[int, ...], ...]]:
        """The batches of `epoch` by step; the last step of an epoch may have fewer."""
        config = self.config
        found = batches(self.shapes(epoch), config.seed, epoch, config.batch_size, self.rank, self.world)
        size = config.gradient_accumulation_steps
        return [tuple(map(tuple, found[start : start + size])) for start in range(0, len(found), size)]


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The learning rate of step number `step` of `total`: it grows linearly over the warm-up, is exactly what was typed
    in the first step after it, and then stays (`constant`) or falls towards zero after the last step.
    """
    warmup = config.warmup_steps
    if step <= warmup:
        return config.learning_rate * step / (warmup + 1)
    share = (step - warmup - 1) / max(1, total - warmup)
    falls = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}
    return config.learning_rate * falls[config.lr_scheduler]
