"""Writes videos and frames to files, which appear whole or not at all."""

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
class Encoding:
    """How video files of one suffix are written: container, encoder, pixel format, and `worst`, the largest value of
    `crf`; 0 for encoders without it.
    """

    format: str
    codec: str = "libx264"
    pixels: str = "yuv420p"
    worst: int = 51
    options: Mapping[str, str] = field(default_factory=dict)


ENCODINGS: Mapping[str, Encoding] = {
    ".mp4": Encoding("mp4"),
    ".m4v": Encoding("mp4"),
    ".mov": Encoding("mov"),
    ".mkv": Encoding("matroska"),
    # AVI stores no display times, so frames must be stored in the order that they are shown: no B frames.
    ".avi": Encoding("avi", options={"bf": "0"}),
    ".webm": Encoding("webm", "libvpx-vp9", worst=63, options={"b": "0", "deadline": "good", "cpu-used": "4"}),
    ".gif": Encoding("gif", "gif", "pal8", worst=0),
}
"""By suffix, for `save_video`."""


def save_video(
    frames: Frames,
    save_path: str | Path,
    fps: float = FPS,
    quality: float = 9,
    ffmpeg_params: Sequence[str] | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a video, replacing a file of that name, and return its path. It appears under its name only when it is
    complete; after an error the earlier file is untouched.

    Args:
        frames: one video. An iterator, such as a pipeline's `output_type="stream"`, is written as it yields.
        save_path: the file; missing folders are created. The suffix chooses the container: .mp4, .m4v, .mov, .mkv
            and .avi hold H.264, .webm VP9, .gif an animation of 256 colours in each frame.
        fps: frames per second.
        quality: 0 (smallest file) to 10 (best), the scale of imageio's ffmpeg writer; a GIF has none.
        ffmpeg_params: options of the encoder as on ffmpeg's command line, such as ["-crf", "18", "-preset", "slow"],
            -c:v for another encoder, and -pix_fmt for another pixel format.
        metadata: text entries for the container.

    Raises:
        ValueError: no frames, frames of different or odd sizes or with NaN, an unknown suffix or option, fps not above
            0, or quality outside of 0 to 10; or the file cannot be written.
    """
    # A link stays a link, and its target is written.
    target = Path(os.path.realpath(save_path))
    encoding = ENCODINGS.get(target.suffix.lower())
    if encoding is None or is_there(target, Path.is_dir):
        raise ValueError(f"save_path must be a file name that ends in {', '.join(ENCODINGS)}; got {str(save_path)!r}.")
    encode = _encoder(encoding, frames, fps, quality, ffmpeg_params, metadata)
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
    """Write an mp4 to `file`, replacing its content. Arguments and errors are those of `save_video`."""
    encode = _encoder(ENCODINGS[".mp4"], frames, fps, quality, None, metadata)
    with _writing(file):
        encode(file)


def _encoder(
    encoding: Encoding,
    frames: Frames,
    fps: float,
    quality: float,
    params: Sequence[str] | None,
    metadata: Mapping[str, str] | None,
) -> Callable[[Path | BinaryIO], None]:
    """A function that writes the video to a file. Everything that is known before the first frame is checked here."""
    rate, encoding = _rate(fps), _with_options(encoding, quality, params)
    pictures = eight_bit(frames)
    first = next(pictures)
    height, width = first.shape[:2]
    if encoding.pixels == "yuv420p" and (height % 2 or width % 2):
        raise ValueError(
            f"A video in {encoding.pixels} needs even sides; got {width}x{height}. Crop or resize the frames."
        )
    return lambda file: _encode(file, encoding, chain([first], pictures), (width, height), rate, metadata or {})


def save_frames(frames: Frames, save_path: str | Path) -> list[Path]:
    """Write each frame as `<number>.png`, from 0, into the folder `save_path`, replacing files of these names.

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


def _with_options(encoding: Encoding, quality: float, params: Sequence[str] | None) -> Encoding:
    """`encoding` with the options of a quality and of ffmpeg's arguments.

    Raises:
        ValueError: the quality is not a number from 0 to 10, or the arguments are not options with values.
    """
    if not isinstance(quality, (int, float, np.number)) or not 0 <= quality <= 10:
        raise ValueError(f"A video needs a quality from 0 to 10; got {quality!r}.")
    words = [str(word) for word in params or ()]
    if isinstance(params, str) or len(words) % 2 or any(not name.startswith("-") for name in words[::2]):
        raise ValueError(f"ffmpeg_params must be options with their values, as ['-crf', '18']; got {params!r}.")
    options = {name[1:].removesuffix(":v"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    codec = next((options.pop(name) for name in ("c", "codec", "vcodec") if name in options), encoding.codec)
    # The defaults belong to the default encoder; another one may not know them.
    own = {**encoding.options, "crf": str(round((1 - float(quality) / 10) * encoding.worst))} if encoding.worst else {}
    return replace(
        encoding, codec=codec, pixels=options.pop("pix_fmt", encoding.pixels),
        options={**(own if codec == encoding.codec else {}), **options},
    )  # fmt: skip


def _encode(
    file: Path | BinaryIO,
    encoding: Encoding,
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

    options: dict[str, object] = dict(encoding.options)
    muxing = {}
    if encoding.format in ("mp4", "mov"):
        # Without this flag, mov and mp4 drop metadata of names that they do not know.
        muxing["movflags"] = f"{options.pop('movflags', '')}+use_metadata_tags"
    try:
        target = f"file:{file}" if isinstance(file, Path) else file
        with av.open(target, "w", format=encoding.format, options=muxing) as container:
            container.metadata.update(metadata)
            stream = container.add_stream(encoding.codec, rate=rate)
            assert isinstance(stream, av.VideoStream)
            stream.width, stream.height = size
            stream.pix_fmt = encoding.pixels
            stream.options = options
            frames = _palettes(pictures, size, rate) if encoding.format == "gif" else map(_frame, pictures)
            for frame in frames:
                packets = stream.encode(frame)
                if unknown := stream.codec_context.options:
                    raise ValueError(f"ffmpeg_params: {encoding.codec} has no option {', '.join(unknown)}.")
                container.mux(packets)
            container.mux(stream.encode())
    except (av.ArgumentError, av.codec.codec.UnknownCodecError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"The video cannot be encoded with {encoding.codec}, {encoding.pixels} and {options} ({reason})."
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
