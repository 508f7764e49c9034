"""Reads pictures, animations, clips and folders of frames.

The type of a file is determined by its content, never by its name. Only the formats listed here are opened, because
others can start programs or refer to further files, and only regular files, because reading a pipe may never end.
"""

import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .pixels import FPS, GROUND, picture_levels, to_eight_bit

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "HEIF")
"""The formats that Pillow may open; those that the installed Pillow lacks are ignored."""

DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,flv,asf,ogg,ivf,obu,mxf,dv,"
    "yuv4mpegpipe"
)
"""The formats that FFmpeg may open: containers that hold the whole clip, and no playlists, lists of files or scripts.
"""

PICTURE_SUFFIXES = tuple(f".{name}" for name in (
    "png", "apng", "jpg", "jpeg", "jpe", "jfif", "webp", "bmp", "dib", "tif", "tiff", "ppm", "pgm", "pnm", "avif",
    "heic", "heif",
))  # fmt: skip
CLIP_SUFFIXES = tuple(f".{name}" for name in (
    "mp4", "m4v", "mov", "qt", "mkv", "webm", "avi", "gif", "wmv", "asf", "flv", "f4v", "mpg", "mpeg", "m2v", "ts",
    "mts", "m2ts", "ogv", "3gp", "3g2", "mxf", "dv", "y4m", "ivf", "obu",
))  # fmt: skip
"""The files of a folder that count as pictures and clips, before they are opened."""

MAX_PIXELS = 2**27
"""The most pixels of one frame; more is a mistake or an attack."""

MAX_CLIP_PIXELS = 2**34
"""The most pixels of all frames in memory, and of an animation, of which a small file may hold any number."""

STILL_BRANDS = ("heic", "heix", "mif1", "msf1", "avif")
"""Pictures in a video container, of which FFmpeg decodes one tile only."""

ORIENTATION = 0x0112
"""The EXIF tag of a picture's orientation."""

DEFAULT_DURATION, SHORTEST_GIF = 100.0, 20.0
"""Milliseconds: the time of a frame that has none, and the least of a GIF's frame, below which it has none."""


class MediaError(ValueError):
    """A file that is missing, damaged, or of a type that is not read. The message names it."""


@dataclass(frozen=True)
class Clip:
    """The properties of a file or a folder of frames. A picture is a clip of one frame.

    Attributes:
        path: the file or folder.
        times: when each frame is shown, in seconds after the first.
        fps: frames per second; None for a picture.
        width, height: in pixels, after rotation to upright.
        codec: FFmpeg's or Pillow's name for the encoding of its frames.
    """

    path: Path
    times: tuple[float, ...]
    fps: float | None
    width: int
    height: int
    codec: str = ""

    @property
    def num_frames(self) -> int:
        return len(self.times)


def probe(path: str | Path) -> Clip:
    """The properties of a file or folder. Of a clip the first frame is decoded, of an animation all.

    Raises:
        MediaError: it is missing, of an unknown type, too large, or cannot be decoded.
    """
    path = Path(path)
    if _is_folder(path):
        return _probe_folder(path)
    with _reading(path), _picture(path) as image:
        if image is not None:
            return _probe_picture(path, image)
    return _probe_video(path)


def frames(path: str | Path) -> Iterator[np.ndarray]:
    """Every frame in display order, upright, as (H, W, 3): uint8, or as of `pixels.picture_levels`. Transparent pixels
    are white.

    Raises:
        MediaError: as of `probe`; or a frame cannot be decoded, or has another size than the first.
    """
    path, shape = Path(path), None
    for index, frame in enumerate(_frames(path)):
        if shape not in (None, frame.shape):
            raise MediaError(
                f"{path}: frame {index} is {frame.shape[1]}x{frame.shape[0]}, the first {shape[1]}x{shape[0]}; "
                "all frames of a clip must have one size"
            )
        shape = frame.shape
        yield frame


def load_video(path: str | Path) -> list[Image.Image]:
    """Every frame of a clip, an animation, a picture or a folder of frames as RGB PIL images.

    Raises:
        MediaError: a ValueError, as of `frames`; or the frames are too large to be in memory at once.
    """
    found: list[Image.Image] = []
    for frame in frames(path):
        found.append(Image.fromarray(to_eight_bit(frame)))
        if len(found) * frame.shape[0] * frame.shape[1] > MAX_CLIP_PIXELS:
            raise MediaError(f"{path} holds too many frames to be read at once; VideoData reads one at a time")
    return found


def check_frame(clip: Clip, index: int) -> None:
    """Check that frame `index` can be decoded, from the nearest key frame on.

    Raises:
        MediaError: it cannot.
    """
    if clip.fps is None or index == 0:
        return
    if _is_folder(clip.path):
        next(_frames(frame_files(clip.path)[index]))
        return
    with _reading(clip.path), _picture(clip.path) as image:
        if image is not None:
            return  # `probe` has decoded all of it
    with _reading(clip.path, index), _video(clip.path) as (container, stream):
        start = stream.start_time or 0
        container.seek(start + int(clip.times[index] / stream.time_base), stream=stream)
        if next(container.decode(stream), None) is not None:
            return
    # Some containers have no index of key frames, and seeking ends at their end.
    if sum(1 for _ in _decoded(clip.path)) <= index:
        raise MediaError(f"{clip.path}: frame {index} cannot be decoded")


def frame_files(folder: Path) -> list[Path]:
    """The pictures in `folder`, in the order of the numbers in their names.

    Raises:
        MediaError: there is none.
    """
    with _reading(folder):
        inside = list(folder.iterdir())
    files = (file for file in inside if file.suffix.lower() in PICTURE_SUFFIXES and file.name[0] != ".")

    def natural(path: Path) -> tuple[Any, ...]:  # 2.png before 10.png
        return tuple((int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name))

    if found := sorted(files, key=natural):
        return found
    raise MediaError(f"{folder} is a folder without pictures")


@contextmanager
def pictures(path: str | Path) -> Iterator[Iterator[Image.Image]]:
    """The frames of a picture or an animation as Pillow images: upright, in their own mode, with transparency.

    Raises:
        MediaError: the file is missing, of another type, too large or damaged.
    """
    path = Path(path)
    with _reading(path), _picture(path) as image:
        if image is None:
            raise MediaError(f"{path} is not a picture of a type that is read ({', '.join(PICTURE_FORMATS)})")
        yield _upright(image)


def _is_folder(path: Path) -> bool:
    """Whether `path` is a folder.

    Raises:
        MediaError: it is neither a folder nor a regular file.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        raise MediaError(f"there is no file {path}") from None
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise MediaError(f"{path} is not a regular file")
    return stat.S_ISDIR(mode)


@contextmanager
def _reading(path: Path, index: int | None = None) -> Iterator[None]:
    """Errors of libraries inside of the block become a MediaError that names the file."""
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        what = f"{path}" if index is None else f"{path}: frame {index}"
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MediaError(f"{what} cannot be read ({reason})") from error


def _frames(path: Path) -> Iterator[np.ndarray]:
    if _is_folder(path):
        for file in frame_files(path):
            yield next(_frames(file))
        return
    with _reading(path), _picture(path) as image:
        if image is not None:
            for picture in _upright(image):
                yield picture_levels(picture)
            return
    yield from _decoded(path)


@contextmanager
def _picture(path: Path) -> Iterator[Image.Image | None]:
    """The file as a Pillow image; None when it is not a picture."""
    if _is_folder(path):
        raise MediaError(f"{path} is a folder; a file is needed")
    if PICTURE_FORMATS[-1] not in Image.OPEN:
        Image.init()
    known = [name for name in PICTURE_FORMATS if name in Image.OPEN]
    try:
        image = Image.open(path, formats=known)
    except UnidentifiedImageError:
        yield None
        return
    with image:
        count = getattr(image, "n_frames", 1)
        if image.width * image.height > MAX_PIXELS or count * image.width * image.height > MAX_CLIP_PIXELS:
            raise MediaError(f"{path} is too large: {image.width}x{image.height} pixels, {count} frames")
        yield image


def _upright(image: Image.Image) -> Iterator[Image.Image]:
    """The frames of an opened picture, turned by its EXIF orientation."""
    # The other pictures of an MPO are not frames, but views of other sizes and purposes. The first picture of some
    # animated PNGs is only for programs that cannot play them.
    first = int(getattr(image, "default_image", False))
    count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    size = None
    for index in range(min(first, count - 1), count):
        image.seek(index)
        image.load()
        # Pages of other sizes are thumbnails.
        if size not in (None, image.size):
            continue
        size = image.size
        yield ImageOps.exif_transpose(image)


def _probe_folder(path: Path) -> Clip:
    """A folder of frames, whose headers are read."""
    files = frame_files(path)
    sizes: dict[tuple[int, int], str] = {}
    for file in files:
        with _reading(file), _picture(file) as image:
            if image is None:
                raise MediaError(f"{file} is not a picture of a type that is read")
            turned = image.getexif().get(ORIENTATION, 1) > 4
            sizes.setdefault(image.size[::-1] if turned else image.size, file.name)
    if len(sizes) > 1:
        named = ", ".join(f"{name} is {width}x{height}" for (width, height), name in sizes.items())
        raise MediaError(f"{path}: all frames of a clip must have one size; {named}")
    width, height = next(iter(sizes))
    return Clip(path, tuple(index / FPS for index in range(len(files))), FPS, width, height, "frames")


def _probe_picture(path: Path, image: Image.Image) -> Clip:
    times, at, size, codec = [], 0.0, (0, 0), (image.format or "").lower()
    for picture in _upright(image):
        times.append(at / 1000)
        duration = image.info.get("duration") or (1000 / FPS if codec == "tiff" else DEFAULT_DURATION)
        at += DEFAULT_DURATION if codec == "gif" and duration < SHORTEST_GIF else duration
        size = picture.size
    fps = None if len(times) == 1 else len(times) / (at / 1000)
    return Clip(path, tuple(times), fps, *size, codec)


@contextmanager
def _video(path: Path) -> Iterator[tuple[Any, Any]]:
    """An open container and its video stream."""
    with open_container(path) as container:
        stream = video_stream(container)
        if stream is None:
            raise MediaError(f"{path} holds no video that can be decoded")
        size = stream.codec_context.width, stream.codec_context.height
        if size[0] * size[1] > MAX_PIXELS:
            raise MediaError(f"{path} is too large: {size[0]}x{size[1]} pixels")
        stream.thread_type = "AUTO"
        yield container, stream


def open_container(source: Path | BinaryIO) -> Any:
    """A clip's file opened by PyAV with one of `DEMUXERS`, without access to other files or the network.

    Raises:
        MediaError: it is missing, not a regular file, or of a type that is not read.
    """
    import av

    if isinstance(source, Path) and _is_folder(source):
        raise MediaError(f"{source} is a folder; a file is needed")
    safe = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file"}
    try:
        container = av.open(f"file:{source.absolute()}" if isinstance(source, Path) else source, options=safe)
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, av.ArgumentError):
            reason = "its type of file is not read"
        raise MediaError(f"{source} cannot be read as a video or a picture ({reason})") from error
    brand = container.metadata.get("major_brand", "")
    if brand in STILL_BRANDS:
        container.close()
        raise MediaError(
            f"{source} is a picture of the type {brand.upper()}, which is not read; save it as PNG or JPEG"
        )
    return container


def video_stream(container: Any) -> Any:
    """The first video stream that is not cover art and that FFmpeg can decode; None when there is none."""
    import av

    cover = av.stream.Disposition.attached_pic
    decodable = (s for s in container.streams.video if s.codec_context is not None and not s.disposition & cover)
    return next(decodable, None)


def _probe_video(path: Path) -> Clip:
    with _reading(path), _video(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        rate = stream.average_rate or stream.guessed_rate or Fraction(FPS)
        stamps, codec = [packet.pts for packet in packets], stream.codec_context.name
    if not packets:
        raise MediaError(f"{path} holds no video frames")
    first = next(_decoded(path))
    if None in stamps or len(set(stamps)) < len(stamps):  # no usable time stamps
        times = [index / float(rate) for index in range(len(packets))]
    else:
        ordered = sorted(stamps)
        times = [float((stamp - ordered[0]) * packets[0].time_base) for stamp in ordered]
    return Clip(path, tuple(times), float(rate), first.shape[1], first.shape[0], codec)


def _decoded(path: Path) -> Iterator[np.ndarray]:
    """Every frame of a clip in display order, upright, as (H, W, 3) uint8."""
    index = -1
    with _reading(path), _video(path) as (container, stream):
        decoder = container.decode(stream)
        while True:
            with _reading(path, index + 1):
                frame = next(decoder, None)
            if frame is None:
                break
            index += 1
            if frame.width * frame.height > MAX_PIXELS:
                raise MediaError(f"{path}: frame {index} is too large, {frame.width}x{frame.height} pixels")
            yield _upright_pixels(_rgb(frame), frame.side_data)
        if index < 0:
            raise MediaError(f"{path} holds no frame that can be decoded")


def _rgb(frame: Any) -> np.ndarray:
    """A decoded frame as (H, W, 3) uint8, on white where it is transparent."""
    layout = frame.format
    # The last of four components is the alpha channel; older versions of PyAV do not report it for planar formats.
    if len(layout.components) < 4 and not layout.has_palette:
        return frame.to_ndarray(format="rgb24")
    layer = Image.fromarray(frame.to_ndarray(format="rgba"))
    return np.array(Image.alpha_composite(Image.new("RGBA", layer.size, GROUND), layer).convert("RGB"))


def _upright_pixels(picture: np.ndarray, side_data: Mapping[Any, Any]) -> np.ndarray:
    """A picture rotated and mirrored by its display matrix, in which cameras store how they were held."""
    found = next((data for data in side_data if data.type.name == "DISPLAYMATRIX"), None)
    if found is None:
        return picture
    # A pixel at (x, y) is shown at (a x + c y, b x + d y).
    (a, b, _), (c, d, _), _ = np.frombuffer(bytes(found), np.int32).reshape(3, 3)
    if abs(b) + abs(c) > abs(a) + abs(d):
        picture = picture.swapaxes(0, 1)
        a, d = c, b
    picture = picture[:, ::-1] if a < 0 else picture
    picture = picture[::-1] if d < 0 else picture
    return np.ascontiguousarray(picture)
