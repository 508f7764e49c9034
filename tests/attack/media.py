"""Damaged pictures and clips: whole files of every kind, changed at random, are read as users' files are."""

import random
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tests.attack import Trial
from wan_core.media import MediaError, load_video, probe, save_video
from wancore.headless.video import VideoFromFile
from wancore.trainer.data import clips as trainer

LIMIT_SECONDS = 20
ALLOWED_MB = 200
SUFFIXES = (".png", ".mp4", ".jpg", ".webp", "")


def _pictures(count: int) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 255, (count, 48, 64, 3), np.uint8)
    return [Image.fromarray(frame) for frame in noise]


def whole_files(folder: Path) -> dict[str, bytes]:
    """One sound file of each kind, by its kind."""
    frames = _pictures(5)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        frames[0].save(folder / f"picture.{kind}", kind)
    for kind in ("PNG", "WEBP", "GIF", "TIFF"):
        frames[0].save(folder / f"animation.{kind}", kind, save_all=True, append_images=frames[1:], duration=60)
    Image.fromarray(np.arange(3072, dtype=np.uint16).reshape(48, 64)).save(folder / "depth.png")
    frames[0].convert("RGBA").save(folder / "alpha.png")
    frames[0].convert("P").save(folder / "palette.png", transparency=3)
    for suffix in ("mp4", "mov", "mkv", "avi", "webm"):
        save_video(frames, folder / f"clip.{suffix}")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _flipped(data: bytearray, draw: random.Random) -> bytearray:
    for _ in range(draw.choice((1, 8, 64))):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return data


def _head(data: bytearray, draw: random.Random) -> bytearray:
    for _ in range(draw.choice((1, 4, 16))):
        data[draw.randrange(min(len(data), 256))] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))
    return data


def _cut(data: bytearray, draw: random.Random) -> bytearray:
    return data[: draw.randrange(len(data))]


def _emptied(data: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(data))
    end = min(len(data), start + draw.choice((4, 100, 2000)))
    data[start:end] = bytes(end - start)
    return data


def _inserted(data: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(data))
    return data[:start] + bytearray(draw.randbytes(draw.choice((1, 4, 1000)))) + data[start:]


def _doubled(data: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(data))
    return data[:start] + data


CHANGES: dict[str, Callable[[bytearray, random.Random], bytearray]] = {
    "bytes": _flipped, "header": _head, "cut": _cut, "emptied": _emptied, "inserted": _inserted, "doubled": _doubled,
}  # fmt: skip


def _read(path: Path) -> None:
    clip = probe(path)
    frames = load_video(path)
    trained = trainer.read(clip, [0])
    video = VideoFromFile(path)
    size = video.get_dimensions()
    if not frames or trained.shape[1:3] != (clip.height, clip.width) or frames[0].size != size:
        raise AssertionError(f"{len(frames)} frames of {frames[0].size}, {clip}")


def _verdict(path: Path) -> tuple[str, str]:
    """What reading a file that may be damaged comes to."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    result: list[tuple[str, str]] = []

    def read() -> None:
        try:
            _read(path)
            result.append(("survived", ""))
        except MediaError as error:
            result.append(("clear" if str(path) in str(error) else "raw", str(error)))
        except BaseException as error:
            result.append(("raw", f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(LIMIT_SECONDS)
    if not result:
        return "hang", f"{time.monotonic() - started:.0f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if grown > ALLOWED_MB + 2 * path.stat().st_size / 1e6:
        return "memory", f"{grown:.0f} MB more; {result[0]}"
    return result[0]


def attack(count: int, seed: int) -> Iterator[Trial]:
    """`count` changed files under a suffix that may be another kind's."""
    with tempfile.TemporaryDirectory(prefix="wancore_") as work:
        place = Path(work, "whole")
        place.mkdir()
        files = whole_files(place)
        for number in range(count):
            draw = random.Random(f"{seed} {number}")
            kind, change = draw.choice(list(files)), draw.choice(list(CHANGES))
            path = Path(work, f"changed{draw.choice(SUFFIXES)}")
            path.write_bytes(CHANGES[change](bytearray(files[kind]), draw))
            yield Trial(f"{change} of {kind} ({seed} {number})", *_verdict(path))
