"""The check of a data set before any model is loaded: every file is opened, and every bad row named at once."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from wan_core.conditioning.camera import CameraPath
from wan_core.media import Clip, MediaError, check_frame, probe
from wan_core.models.config import DEFAULT_GEOMETRY, Geometry
from wan_core.types import VideoSize

from ..config import TrainConfig
from .clips import ALIGNED_KINDS, INPUTS, ExtraInput, frames_at_rate, native_size, pick_frames, usable_frames
from .dataset import MOST_NAMED, Dataset, Sample

ASPECT_TOLERANCE = 0.02
"""How far the aspect ratio of a control clip may be from that of its target, relative."""

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
        size: the size that it is brought to.
        count: frames of the target at the frame rate of the run.
    """

    sample: Sample
    target: Clip
    clips: Mapping[str, tuple[Clip, ...]]
    size: VideoSize
    count: int

    @property
    def name(self) -> str:
        return self.target.path.name

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, frames with those of reference pictures in front, rows and columns of its latents."""
        references = len(self.clips.get("vace_reference_image", ()))
        size = self.size.latent
        return (size.geometry.channels, references + size.frames, size.height, size.width)

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
class OpenedSample:
    """A sample whose files were opened.

    Attributes:
        sample: the row of the metadata.
        target: the clip that is trained; None when it is missing or damaged.
        clips: the clips and pictures of each input's column.
        problems: what is wrong with its files and cells.
    """

    sample: Sample
    target: Clip | None
    clips: Mapping[str, tuple[Clip, ...]]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class DatasetReport:
    """What the check found. `str` of it is the text that users see.

    Attributes:
        source: the metadata file, or the folder.
        opened: every sample, to be sized for another model without opening its files again.
        rows, bad: the samples that can be trained, and those that cannot.
        problems: what is wrong with the data set as a whole.
        notices: what users should know about the good rows.
    """

    source: Path
    opened: tuple[OpenedSample, ...]
    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...]
    problems: tuple[str, ...]
    notices: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.rows)} good rows, {len(self.bad)} bad."]
        lines += [f"  Problem: {problem}" for problem in self.problems]
        lines += [f"  Bad {bad}" for bad in self.bad]
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


@dataclass(frozen=True)
class SizeRule:
    """The size that clips are brought to.

    Attributes:
        fixed: one for all; None when each clip keeps its own.
        longest: frames of a clip that is long enough.
        geometry: of the model.
    """

    fixed: VideoSize | None
    longest: int
    geometry: Geometry
    config: TrainConfig

    @classmethod
    def of(cls, config: TrainConfig, geometry: Geometry) -> "SizeRule":
        if config.size is None:
            return cls(None, usable_frames(config.clip_frames, config.clip_frames, geometry), geometry, config)
        fixed = VideoSize.rounded(**config.size.as_dict(), geometry=geometry)
        return cls(fixed, fixed.num_frames, geometry, config)

    def size(self, clip: Clip, count: int) -> VideoSize:
        """The size of `clip`, which has `count` frames at the frame rate of the run.

        Raises:
            MediaError: it is too short.
        """
        frames = 1 if clip.fps is None else self.longest
        if count < frames:
            if self.config.short_clip == "error":
                rate = f" at {self.config.fps:g} fps" if self.config.fps else ""
                raise MediaError(
                    f"it has {count} frames{rate}, fewer than the {frames} wanted; use longer clips, a smaller "
                    "--num_frames, or --short_clip trim"
                )
            frames = usable_frames(count, frames, self.geometry)
        own = native_size(clip.width, clip.height, self.config.max_pixels, self.geometry)
        width, height = (self.fixed.width, self.fixed.height) if self.fixed else own
        return VideoSize(width, height, frames, self.geometry)


def check(
    dataset: Dataset, config: TrainConfig, on_progress: Callable[[int, int], None] | None = None
) -> DatasetReport:
    """Open every file of `dataset` and see whether the run that `config` describes can train it.

    Sizes are those of Wan 2.1's geometry, because no model is known yet; see `fit_to_geometry`.

    Args:
        on_progress: called as (done, total) rows.
    """
    rule = SizeRule.of(config, DEFAULT_GEOMETRY)

    def open_and_fit(sample: Sample) -> tuple[OpenedSample, Row | BadRow]:
        opened = _open(sample, config)
        return opened, _fit(opened, rule)

    opened, results = [], []
    with ThreadPoolExecutor(THREADS) as pool:
        for one, result in pool.map(open_and_fit, dataset.samples):
            opened.append(one)
            results.append(result)
            if on_progress is not None:
                on_progress(len(opened), len(dataset.samples))
    return _report(dataset, rule, opened, results)


def fit_to_geometry(report: DatasetReport, dataset: Dataset, config: TrainConfig, geometry: Geometry) -> DatasetReport:
    """`report` of `check` with the sizes that a model of `geometry` trains."""
    if geometry.matches(DEFAULT_GEOMETRY):
        return report
    rule = SizeRule.of(config, geometry)
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(lambda opened: _fit(opened, rule), report.opened))
    return _report(dataset, rule, report.opened, results)


def _report(
    dataset: Dataset, rule: SizeRule, opened: Sequence[OpenedSample], results: Sequence[Row | BadRow]
) -> DatasetReport:
    rows = tuple(result for result in results if isinstance(result, Row))
    bad = tuple(result for result in results if isinstance(result, BadRow))
    return DatasetReport(
        dataset.source, tuple(opened), rows, bad, dataset.problems, tuple(_notices(rows, dataset, rule))
    )


def _open(sample: Sample, config: TrainConfig) -> OpenedSample:
    problems = list(sample.problems)
    target: Clip | None = None
    clips: dict[str, tuple[Clip, ...]] = {}
    if sample.target is not None:
        try:
            target = probe(sample.target)
        except MediaError as error:
            problems.append(str(error))
    for name in config.extra_inputs:
        row = INPUTS[name]
        try:
            if row.is_file:
                clips[name] = _input_files(row, sample.files[name])
            elif row.column is not None:
                _check_value(row, sample.values.get(name))
        except ValueError as error:
            problems.append(str(error))
    return OpenedSample(sample, target, clips, tuple(problems))


def _fit(opened: OpenedSample, rule: SizeRule) -> Row | BadRow:
    """The row with its size, after a look at the last frame that is trained."""
    target, config, problems = opened.target, rule.config, list(opened.problems)
    if target is None:
        return BadRow(opened.sample, tuple(problems))
    indices = frames_at_rate(target, config.fps)
    try:
        size = rule.size(target, len(indices))
        check_frame(target, indices[max(pick_frames(len(indices), size.num_frames, config.frame_pick))])
    except MediaError as error:
        return BadRow(opened.sample, (*problems, str(error)))
    for name, clips in opened.clips.items():
        if INPUTS[name].kind in ALIGNED_KINDS:
            try:
                _check_aligned(INPUTS[name], clips[0], target, len(indices), size, config)
            except ValueError as error:
                problems.append(str(error))
    if problems:
        return BadRow(opened.sample, tuple(problems))
    return Row(opened.sample, target, opened.clips, size, len(indices))


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
            "both are cropped in the same way, so their aspect ratios must be equal"
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
        raise ValueError(f"{row.name} is {text!r}; it must be a number") from None
    if not row.low <= value <= row.high or value in (float("inf"), float("-inf")):
        raise ValueError(f"{row.name} is {text}; it must be from {row.low:g} to {row.high:g}")


def _notices(rows: Sequence[Row], dataset: Dataset, rule: SizeRule) -> Iterator[str]:
    config = rule.config
    if dataset.left_out:
        named, more = dataset.left_out[:MOST_NAMED], len(dataset.left_out) - MOST_NAMED
        yield f"left out: {'; '.join(named)}" + (f"; and {more} more" if more > 0 else "")
    for name in config.data_file_keys:
        if name in INPUTS and name not in config.extra_inputs:
            yield f"the column {name} is not used; add --extra_inputs {name} to train with it"
    rates = Counter(round(row.target.fps, 2) for row in rows if row.target.fps)
    fps = rule.geometry.fps
    strange = {rate: n for rate, n in rates.items() if abs(rate - fps) > 0.5}
    if strange and config.fps is None:
        listed = ", ".join(f"{n} at {rate:g}" for rate, n in sorted(strange.items()))
        yield (
            f"clips that are not at {fps:g} frames per second ({listed}) are used frame by frame, so that their motion "
            f"is learned too slow or too fast; --fps {fps:g} brings them to the rate of {rule.geometry.name}"
        )
    pictures = sum(row.target.fps is None for row in rows)
    if 0 < pictures < len(rows):
        yield f"pictures among the rows: {pictures}, each a clip of one frame"
    shorter = sum(row.size.num_frames < rule.longest for row in rows if row.target.fps)
    if shorter:
        yield f"clips shorter than {rule.longest} frames, trimmed to the largest {rule.geometry.length_rule}: {shorter}"
    cropped = sum(
        abs(row.target.width * row.size.height / (row.target.height * row.size.width) - 1) > ASPECT_TOLERANCE
        for row in rows
    )
    if cropped:
        yield f"clips of another aspect ratio than they are trained in, cropped at their sides: {cropped}"
    sizes = Counter(row.size for row in rows)
    if len(sizes) > 1:
        listed = ", ".join(f"{n} of {size}" for size, n in sizes.items())
        yield f"{len(sizes)} sizes, each in batches of its own: {listed}"
