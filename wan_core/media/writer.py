"""Videos and frames on their way into files, whole or not at all."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ..atomic import replacing
from ..files import is_there
from .pixels import FPS, Frames, eight_bit


@dataclass(frozen=True)
class Kind:
    """How a video file of a suffix is written: container, encoder, pixel format, and
    `worst`, the largest `crf`; 0 where there is no such scale."""

    format: str
    codec: str = "libx264"
    pixels: str = "yuv420p"
    worst: int = 51
    options: Mapping[str, str] = field(default_factory=dict)


KINDS: Mapping[str, Kind] = {
    ".mp4": Kind("mp4"),
    ".m4v": Kind("mp4"),
    ".mov": Kind("mov"),
    ".mkv": Kind("matroska"),
    # AVI has no place for the times of frames that are shown in another order than they are stored.
    ".avi": Kind("avi", options={"bf": "0"}),
    ".webm": Kind("webm", "libvpx-vp9", worst=63, options={"b": "0", "deadline": "good", "cpu-used": "4"}),
    ".gif": Kind("gif", "gif", "pal8", worst=0),
}
"""What `save_video` writes, by suffix."""


def save_video(
    frames: Frames,
    save_path: str | Path,
    fps: float = FPS,
    quality: float = 9,
    ffmpeg_params: Sequence[str] | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a video in place of what is there under that name, and return its path. It appears under its name only
    when it is whole; after an error what was there is untouched.

    Args:
        frames: one video. What only comes frame by frame, as a pipeline's `output_type="stream"`, is written as it
            comes.
        save_path: where to write; missing folders are made. The suffix chooses the container: .mp4, .m4v, .mov, .mkv
            and .avi hold H.264, .webm VP9, .gif an animation of 256 colours in each frame.
        fps: frames per second.
        quality: 0 (smallest file) to 10 (best), the scale of imageio's ffmpeg writer; a GIF has none.
        ffmpeg_params: options of the encoder as on ffmpeg's command line, such as ["-crf", "18", "-preset", "slow"],
            with -c:v for another encoder and -pix_fmt for another pixel format.
        metadata: text entries for the container.

    Raises:
        ValueError: no frames, frames of different or odd sizes or with NaN, an unknown suffix or option, fps not above
            0, or quality outside of 0 to 10; or the file cannot be written.
    """
    # As every program that saves over a link, write to what it points to.
    target = Path(os.path.realpath(save_path))
    kind = KINDS.get(target.suffix.lower())
    if kind is None or is_there(target, Path.is_dir):
        raise ValueError(f"save_path must be a file name that ends in {', '.join(KINDS)}; got {str(save_path)!r}.")
    encode = _encoder(kind, frames, fps, quality, ffmpeg_params, metadata)
    with _writing(save_path), replacing(target) as partial:
        encode(partial)
    return target


def write_video(
    frames: Frames,
    file: Path | BinaryIO,
    fps: float = FPS,
    quality: float = 9,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an mp4 into `file`, in place of its content. Arguments and errors are those of `save_video`."""
    encode = _encoder(KINDS[".mp4"], frames, fps, quality, None, metadata)
    with _writing(file):
        encode(file)


def _encoder(
    kind: Kind,
    frames: Frames,
    fps: float,
    quality: float,
    params: Sequence[str] | None,
    metadata: Mapping[str, str] | None,
) -> Callable[[Path | BinaryIO], None]:
    """What writes the video into a file; everything that can be known before the first frame is encoded is checked."""
    rate, kind = _rate(fps), _adjusted(kind, quality, params)
    pictures = eight_bit(frames)
    first = next(pictures)
    height, width = first.shape[:2]
    if kind.pixels == "yuv420p" and (height % 2 or width % 2):
        raise ValueError(f"A video in {kind.pixels} needs even sides; got {width}x{height}. Crop or resize the frames.")
    return lambda file: _encode(file, kind, chain([first], pictures), (width, height), rate, metadata or {})


def save_frames(frames: Frames, save_path: str | Path) -> list[Path]:
    """Write each frame as `<number>.png`, from 0, into the folder `save_path`, in place of what is there.

    Raises:
        ValueError: no frames, frames of different sizes or with NaN, or the folder cannot be written to.
    """
    files = []
    for index, picture in enumerate(eight_bit(frames)):
        files.append(Path(save_path) / f"{index}.png")
        with _writing(save_path), replacing(files[-1]) as partial:
            Image.fromarray(picture).save(partial)
    return files


@contextmanager
def _writing(path: str | Path | BinaryIO) -> Iterator[None]:
    """An error of the file system becomes a ValueError that names `path`."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}.") from error


def _rate(fps: float) -> Fraction:
    try:
        rate = Fraction(float(fps)).limit_denominator(1001)
    except (TypeError, ValueError, OverflowError):
        rate = Fraction(0)
    if not 0 < rate <= 1000:
        raise ValueError(f"A video needs fps above 0 and up to 1000; got {fps!r}.")
    return rate


def _adjusted(kind: Kind, quality: float, params: Sequence[str] | None) -> Kind:
    """`kind` with the options that a quality and ffmpeg's arguments stand for.

    Raises:
        ValueError: the quality is none, or the arguments are not options with values.
    """
    if not isinstance(quality, (int, float, np.number)) or not 0 <= quality <= 10:
        raise ValueError(f"A video needs a quality from 0 to 10; got {quality!r}.")
    words = [str(word) for word in params or ()]
    if isinstance(params, str) or len(words) % 2 or any(not name.startswith("-") for name in words[::2]):
        raise ValueError(f"ffmpeg_params must be options with their values, as ['-crf', '18']; got {params!r}.")
    given = {name[1:].removesuffix(":v"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    codec = next((given.pop(name) for name in ("c", "codec", "vcodec") if name in given), kind.codec)
    own = {**kind.options, "crf": str(round((1 - float(quality) / 10) * kind.worst))} if kind.worst else {}
    return replace(
        kind, codec=codec, pixels=given.pop("pix_fmt", kind.pixels),
        options={**(own if codec == kind.codec else {}), **given},
    )  # fmt: skip


def _encode(
    file: Path | BinaryIO,
    kind: Kind,
    pictures: Iterable[np.ndarray],
    size: tuple[int, int],
    rate: Fraction,
    metadata: Mapping[str, str],
) -> None:
    """Write `pictures` (H, W, 3), uint8.

    Raises:
        ValueError: the encoder does not know an option, or cannot use it.
    """
    import av

    options: dict[str, object] = dict(kind.options)
    muxing = {}
    if kind.format in ("mp4", "mov"):
        muxing["movflags"] = f"{options.pop('movflags', '')}+use_metadata_tags"
    try:
        target = f"file:{file}" if isinstance(file, Path) else file
        with av.open(target, "w", format=kind.format, options=muxing) as container:
            container.metadata.update(metadata)
            stream = container.add_stream(kind.codec, rate=rate)
            assert isinstance(stream, av.VideoStream)
            stream.width, stream.height = size
            stream.pix_fmt = kind.pixels
            stream.options = options
            frames = _palettes(pictures, size, rate) if kind.format == "gif" else map(_frame, pictures)
            for frame in frames:
                packets = stream.encode(frame)
                if unknown := stream.codec_context.options:
                    raise ValueError(f"ffmpeg_params: {kind.codec} has no option {', '.join(unknown)}.")
                container.mux(packets)
            container.mux(stream.encode())
    except (av.ArgumentError, av.codec.codec.UnknownCodecError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"The video cannot be encoded with {kind.codec}, {kind.pixels} and {options} ({reason})."
        ) from error


def _frame(picture: np.ndarray) -> Any:
    import av

    return av.VideoFrame.from_ndarray(picture, format="rgb24")


def _palettes(pictures: Iterable[np.ndarray], size: tuple[int, int], rate: Fraction) -> Iterator[Any]:
    """Each picture as a frame of 256 colours of its own, dithered."""
    import av

    graph = av.filter.Graph()
    source = graph.add_buffer(width=size[0], height=size[1], format=av.VideoFormat("rgb24"), time_base=1 / rate)
    split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
    use, sink = graph.add("paletteuse", "new=1"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for index, picture in enumerate(pictures):
        frame = _frame(picture)
        frame.pts, frame.time_base = index, 1 / rate
        graph.push(frame)
        yield graph.pull()
