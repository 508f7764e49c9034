"""Frames out of files: every format, chosen by number and by time, at a chosen size; and files that are broken."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.material import number_of, numbered, write_video
from wan_core.media import Clip, MediaError, check_frame, probe
from wan_core.media.fitting import resized
from wancore.trainer.data.clips import frames_at_rate, native_size, pick_frames, read, usable_frames

VIDEO_SUFFIXES = (
    ".mp4",
    ".avi",
    ".mov",
    ".wmv",
    ".mkv",
    ".flv",
    ".webm",
    ".gif",
    ".m4v",
    ".ts",
    ".mpg",
    ".3gp",
    ".f4v",
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".jfif")
COUNT = 15


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_every_video_format_gives_each_frame_by_its_number(tmp_path, suffix):
    clip = probe(write_video(tmp_path / f"clip{suffix}", numbered(COUNT), fps=10))
    assert (clip.num_frames, clip.width, clip.height) == (COUNT, 32, 32)
    assert clip.fps == pytest.approx(10, rel=0.01)
    assert clip.times[-1] == pytest.approx(1.4, abs=0.02)
    wanted = [0, 3, 3, 14, 7]
    frames = read(clip, wanted)
    assert frames.shape == (5, 32, 32, 3) and frames.dtype == torch.float32
    assert [number_of(frame, COUNT) for frame in frames] == wanted
    check_frame(clip, 14)


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_picture_format_is_a_clip_of_one_frame(tmp_path, suffix):
    path = tmp_path / f"picture{suffix.upper()}"
    Image.new("RGB", (40, 30), (200, 100, 50)).save(path)
    clip = probe(path)
    assert (clip.num_frames, clip.fps, clip.width, clip.height) == (1, None, 40, 30)
    assert (read(clip, [0])[0].mean((0, 1)) * 255).round().tolist() == pytest.approx([200, 100, 50], abs=3)


@pytest.mark.parametrize(
    ("stored", "fps", "expected"),
    [
        (16, None, list(range(16))),
        (16, 16, list(range(16))),
        (32, 16, [0, 2, 4, 6, 8, 10, 12, 14]),
        (24, 16, [0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15]),
        (8, 16, [n // 2 for n in range(31)]),
        (30, 15, [0, 2, 4, 6, 8, 10, 12, 14]),
    ],
)
def test_frame_rates_are_changed_by_time(stored, fps, expected):
    clip = Clip(None, tuple(n / stored for n in range(16)), stored, 32, 32)
    found = frames_at_rate(clip, fps)
    assert all(
        abs(clip.times[index] - place / (fps or stored)) <= 0.5 / stored + 1e-9 for place, index in enumerate(found)
    )
    assert found[: len(expected)] == pytest.approx(expected, abs=1) and len(found) == pytest.approx(
        len(expected), abs=1
    )


def test_frames_at_uneven_times_are_chosen_by_time():
    clip = Clip(None, (0.0, 0.1, 0.2, 1.0, 1.1), 5, 32, 32)
    assert frames_at_rate(clip, 2) == [0, 2, 3]


@pytest.mark.parametrize(
    ("pick", "fraction", "expected"),
    [
        ("head", 0.9, [0, 1, 2, 3, 4]),
        ("middle", 0, [3, 4, 5, 6, 7]),
        ("spread", 0, [0, 2, 5, 8, 10]),
        ("random", 0, [0, 1, 2, 3, 4]),
        ("random", 0.9999, [6, 7, 8, 9, 10]),
        ("random", 0.5, [3, 4, 5, 6, 7]),
    ],
)
def test_frame_picks(pick, fraction, expected):
    assert pick_frames(11, 5, pick, fraction) == pytest.approx(expected, abs=pick == "spread")
    assert pick_frames(5, 5, pick, fraction) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("count", "wanted", "expected"), [(81, 81, 81), (80, 81, 77), (5, 81, 5), (4, 81, 1), (1, 81, 1), (100, 81, 81)]
)
def test_usable_frames(count, wanted, expected):
    assert usable_frames(count, wanted) == expected


@pytest.mark.parametrize(
    ("size", "pixels", "expected"),
    [
        ((832, 480), 10**9, (832, 480)),
        ((1920, 1080), 1920 * 1080, (1920, 1072)),
        ((1920, 1080), 480 * 832, (832, 464)),
        ((1000, 10), 10**9, (992, 16)),
    ],
)
def test_own_size(size, pixels, expected):
    assert native_size(*size, pixels) == expected


def test_frames_are_cropped_around_the_centre_by_the_function_of_inference(tmp_path):
    stripes = np.zeros((40, 80, 3), np.uint8)
    stripes[:, 30:50] = 255
    clip = probe(write_video(tmp_path / "wide.mp4", [stripes] * 5))
    whole = read(clip, range(5))
    square = read(clip, range(5), 20, 20)
    assert torch.equal(square, resized(whole, 20, 20, "crop"))
    assert square[:, :, 6:14].mean() > 0.95 and square[:, :, :3].mean() < 0.05


def broken(tmp_path, kind):
    path = tmp_path / f"{kind}.mp4"
    if kind == "text":
        path.write_text("not a video")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(write_video(tmp_path / "whole.mp4", numbered(30)).read_bytes()[:600])
    elif kind == "picture":
        path = tmp_path / "picture.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\nrest")
    elif kind == "kind":
        path = tmp_path / "notes.pdf"
        path.write_text("x")
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "picture", "kind", "folder", "missing"])
def test_broken_files_are_named(tmp_path, kind):
    path = broken(tmp_path, kind)
    with pytest.raises(MediaError, match=path.name):
        probe(path)


def test_a_file_that_ends_too_early_names_the_frame(tmp_path):
    path = write_video(tmp_path / "clip.mp4", numbered(5))
    with pytest.raises(MediaError, match=r"clip\.mp4: frame 7 cannot be decoded"):
        read(probe(path), [0, 7])


def test_damage_in_the_middle_is_an_error_and_no_silent_picture(tmp_path):
    path = write_video(tmp_path / "clip.mkv", [*np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), np.uint8)])
    clip = probe(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match=r"clip\.mkv"):
        read(clip, [0, 39])
