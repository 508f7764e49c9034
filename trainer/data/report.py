"""The check of a data set before any model is loaded: every file is opened, and every bad row named at once."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from wan_core.conditioning.camera import CameraPath
from wan_core.media import FPS, Clip, MediaError, check_frame, probe
from wan_core.models.config import DEFAULT_GEOMETRY, Geometry
from wan_core.types import VideoSize

from ..config import TrainConfig
from .clips import ALIGNED_KINDS, INPUTS, ExtraInput, frames_at_rate, native_size, pick_frames, usable_frames
from .dataset import MOST_NAMED, Dataset, Sample

ASPECT_TOLERANCE = 0.02
"""How far the shape of a control clip may be from that of the clip that it belongs to."""

THREADS = 8
SHOWN_ROWS = 3


class DatasetError(ValueError):
    """A data set that cannot be trained; the message is the whole report."""


@dataclass(frozen=True)
class Row:
    """A sample that can be trained.

    Attributes:
        sample: the row of the metadata.
        target: the clip that is trained.
        clips: the clips and pictures of each input's column.
        size: what it is brought to.
        count: how many frames the target has at the frame rate of the run.
    """

    sample: Sample
    target: Clip
    clips: Mapping[str, tuple[Clip, ...]]
    size: VideoSize
    count: int

    @property
    def name(self) -> str:
        return self.target.path.name

    def places(self, config: TrainConfig, fraction: float = 0.0) -> list[int]:
        """Which of the `count` frames are used; `fraction` in [0, 1) chooses where `random` starts."""
        return pick_frames(self.count, self.size.num_frames, config.frame_pick, fraction)

    def __str__(self) -> str:
        rate = f" at {self.target.fps:g} fps" if self.target.fps else ""
        held = f"{self.target.num_frames} frames{rate}, {self.target.width}x{self.target.height}"
        return f"{self.name} ({held}) as {self.size}: {self.sample.captions[0]!r}"


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained, and every reason why."""

    sample: Sample
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        name = self.sample.target.name if self.sample.target else "no file"
        return f"{self.sample.where} ({name}): {'; '.join(self.reasons)}"


@dataclass(frozen=True)
class DatasetReport:
    """What the check found. As text it is what a user is shown."""

    source: Path
    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...]
    problems: tuple[str, ...]
    notices: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.rows)} good rows, {len(self.bad)} bad."]
        lines += [f"  {problem}" for problem in self.problems]
        lines += [f"  {bad}" for bad in self.bad]
        lines += [f"  Note: {notice}" for notice in self.notices]
        lines += [f"  For example {row}" for row in self.rows[:SHOWN_ROWS]]
        return "\n".join(lines)

    def require(self, on_bad_sample: str) -> tuple[Row, ...]:
        """The good rows.

        Raises:
            DatasetError: no row is good, the data set as a whole is wrong, or a row is bad and `on_bad_sample` is not
                `skip`.
        """
        if self.problems or not self.rows or (self.bad and on_bad_sample != "skip"):
            hint = "" if self.problems or not self.rows else "\nRepair them, or leave them out by --on_bad_sample skip."
            raise DatasetError(f"{self}{hint}")
        return self.rows


def check(
    dataset: Dataset,
    config: TrainConfig,
    on_progress: Callable[[int, int], None] | None = None,
    geometry: Geometry = DEFAULT_GEOMETRY,
) -> DatasetReport:
    """Open every file of `dataset` and see whether the run that `config` describes can train it.

    Args:
        on_progress: called as (done, total) rows.
        geometry: of the model, once that is known; sizes are rounded to it.
    """
    fixed = config.size and VideoSize.rounded(**config.size.as_dict(), geometry=geometry)
    rows: list[Row] = []
    bad: list[BadRow] = []
    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(lambda sample: _checked(sample, config, fixed, geometry), dataset.samples)
        for done, result in enumerate(results, 1):
            if isinstance(result, Row):
                rows.append(result)
            else:
                bad.append(result)
            if on_progress is not None:
                on_progress(done, len(dataset.samples))
    return DatasetReport(
        dataset.source, tuple(rows), tuple(bad), dataset.problems, tuple(_notices(rows, dataset, config))
    )


def _checked(sample: Sample, config: TrainConfig, fixed: VideoSize | None, geometry: Geometry) -> Row | BadRow:
    reasons = list(sample.problems)
    target: Clip | None = None
    size: VideoSize | None = None
    count = 0
    clips: dict[str, tuple[Clip, ...]] = {}
    if sample.target is not None:
        try:
            target = probe(sample.target)
            count = len(frames_at_rate(target, config.fps))
            size = _size(target, count, config, fixed, geometry)
            check_frame(target, _last_frame(target, count, size, config))
        except MediaError as error:
            reasons.append(str(error))
            target = None
    for name in config.extra_inputs:
        row = INPUTS[name]
        try:
            if row.is_file:
                clips[name] = _input_files(row, sample.files[name])
                if row.kind in ALIGNED_KINDS and target is not None and size is not None:
                    _check_aligned(row, clips[name][0], target, count, size, config)
            elif row.column is not None:
                _check_value(row, sample.values.get(name))
        except ValueError as error:
            reasons.append(str(error))
    if reasons or target is None or size is None:
        return BadRow(sample, tuple(reasons))
    return Row(sample, target, clips, size, count)


def _size(clip: Clip, count: int, config: TrainConfig, fixed: VideoSize | None, geometry: Geometry) -> VideoSize:
    """What the target is brought to.

    Raises:
        MediaError: it is too short.
    """
    longest = fixed.num_frames if fixed else usable_frames(config.clip_frames, config.clip_frames, geometry)
    wanted = 1 if clip.fps is None else longest
    if count < wanted:
        if config.short_clip == "error":
            rate = f" at {config.fps:g} fps" if config.fps else ""
            raise MediaError(f"it has {count} frames{rate}, fewer than the {wanted} wanted; --short_clip trim shortens")
        wanted = usable_frames(count, wanted, geometry)
    own = native_size(clip.width, clip.height, config.max_pixels, geometry)
    width, height = (fixed.width, fixed.height) if fixed else own
    return VideoSize(width, height, wanted, geometry)


def _last_frame(clip: Clip, count: int, size: VideoSize, config: TrainConfig) -> int:
    return frames_at_rate(clip, config.fps)[max(pick_frames(count, size.num_frames, config.frame_pick))]


def _input_files(row: ExtraInput, paths: Sequence[Path]) -> tuple[Clip, ...]:
    """The files of an input's cell, opened.

    Raises:
        ValueError: there is none, or several where one is expected, or one cannot be read.
    """
    if not paths:
        raise ValueError(f"{row.name} is empty; it should hold {row.help}")
    if len(paths) > 1 and row.kind != "pictures":
        raise ValueError(f"{row.name} holds {len(paths)} files; it takes one")
    if row.kind == "poses":
        CameraPath.from_file(paths[0])
        return ()
    try:
        return tuple(map(probe, paths))
    except MediaError as error:
        raise ValueError(f"{row.name}: {error}") from error


def _check_aligned(row: ExtraInput, clip: Clip, target: Clip, count: int, size: VideoSize, config: TrainConfig) -> None:
    """Raise ValueError unless `clip` follows `target` frame by frame; a picture holds still for all of them."""
    if clip.fps is not None:
        places = pick_frames(count, size.num_frames, config.frame_pick)
        needed = count if config.frame_pick == "random" else max(places) + 1
        have = len(frames_at_rate(clip, config.fps))
        if have < needed:
            raise ValueError(f"{row.name} ({clip.path.name}) has {have} frames; the clip needs {needed}")
        check_frame(clip, frames_at_rate(clip, config.fps)[needed - 1])
    shapes = clip.width / clip.height, target.width / target.height
    if abs(shapes[0] / shapes[1] - 1) > ASPECT_TOLERANCE:
        raise ValueError(
            f"{row.name} ({clip.path.name}) is {clip.width}x{clip.height}, the clip {target.width}x{target.height}: "
            "they are cropped alike, and must have one shape"
        )


def _check_value(row: ExtraInput, text: str | None) -> None:
    """Raise ValueError unless a cell is a number or word that its input takes."""
    if text is None:
        if row.default is None:
            raise ValueError(f"{row.name} is empty; it should hold {row.help}")
        return
    if row.kind == "word":
        if text not in row.choices:
            raise ValueError(f"{row.name} is {text!r}; it must be one of {', '.join(row.choices)}")
        return
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{row.name} is {text!r}, which is no number") from None
    if not row.low <= value <= row.high or value in (float("inf"), float("-inf")):
        raise ValueError(f"{row.name} is {text}; it must be from {row.low:g} to {row.high:g}")


def _notices(rows: Sequence[Row], dataset: Dataset, config: TrainConfig) -> Iterator[str]:
    if dataset.left_out:
        named, more = dataset.left_out[:MOST_NAMED], len(dataset.left_out) - MOST_NAMED
        yield f"left out: {'; '.join(named)}" + (f"; and {more} more" if more > 0 else "")
    for name in config.data_file_keys:
        if name in INPUTS and name not in config.extra_inputs:
            yield f"the column {name} is not used; add --extra_inputs {name} to train with it"
    rates = Counter(round(row.target.fps, 2) for row in rows if row.target.fps)
    strange = {rate: n for rate, n in rates.items() if abs(rate - FPS) > 0.5}
    if strange and config.fps is None:
        listed = ", ".join(f"{n} at {rate:g}" for rate, n in sorted(strange.items()))
        yield (
            f"clips that are not at {FPS} frames per second ({listed}) are used frame by frame, so that their motion "
            f"is learned slower or faster than it is; --fps {FPS} brings them to Wan's rate"
        )
    pictures = sum(row.target.fps is None for row in rows)
    if 0 < pictures < len(rows):
        yield f"pictures among the rows: {pictures}, each a clip of one frame"
    shorter = sum(row.size.num_frames < config.clip_frames for row in rows if row.target.fps)
    if shorter:
        rule = DEFAULT_GEOMETRY.length_rule
        yield f"clips shorter than {config.clip_frames} frames, trimmed to the largest {rule}: {shorter}"
    cropped = sum(
        abs(row.target.width * row.size.height / (row.target.height * row.size.width) - 1) > ASPECT_TOLERANCE
        for row in rows
    )
    if cropped:
        yield f"clips of another shape than they are trained in, cropped at their sides: {cropped}"
    sizes = Counter(row.size for row in rows)
    if len(sizes) > 1:
        listed = ", ".join(f"{n} of {size}" for size, n in sizes.items())
        yield f"{len(sizes)} sizes, each in batches of its own: {listed}"
