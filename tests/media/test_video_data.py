"""A clip whose frames are read when they are asked for, as DiffSynth's scripts use it."""

import numpy as np
import pytest
from PIL import Image

from tests.trainer.material import number_of, numbered, write_video
from wan_core import VideoData, load_video
from wan_core.media import MediaError, save_frames
from wan_core.media.fitting import as_frames

COUNT = 12


@pytest.fixture(params=["video", "gif", "folder", "file_list"])
def data(request, tmp_path):
    if request.param in ("folder", "file_list"):
        save_frames(numbered(COUNT, 48, 32), tmp_path / "frames")
        names = [f"{n}.png" for n in range(COUNT)] if request.param == "file_list" else None
        return VideoData(image_folder=str(tmp_path / "frames"), file_list=names)
    suffix = {"video": ".mp4", "gif": ".gif"}[request.param]
    return VideoData(str(write_video(tmp_path / f"a{suffix}", numbered(COUNT, 48, 32))))


def numbers(frames):
    return [number_of(np.asarray(frame) / 255, COUNT) for frame in frames]


def test_frames_by_number_in_any_order(data):
    assert len(data) == COUNT and data.shape() == (32, 48)
    order = [0, 3, 3, 11, 2, -1, -12, 5]
    assert numbers(data[n] for n in order) == [n % COUNT for n in order]
    assert numbers(data) == numbers(data.raw_data()) == list(range(COUNT))
    assert data[0].mode == "RGB" and isinstance(data[0], Image.Image)
    for n in (COUNT, -COUNT - 1):
        with pytest.raises(IndexError):
            data[n]


def test_a_length_and_a_size(data, tmp_path):
    data.set_length(5)
    assert len(data) == data.length == 5 and numbers(data) == [0, 1, 2, 3, 4]
    with pytest.raises(IndexError):
        data[5]
    data.set_shape(16, 64)
    assert (data.height, data.width) == data.shape() == (16, 64)
    assert {frame.size for frame in data} == {(64, 16)} and as_frames(data, "x").shape == (5, 16, 64, 3)
    data.save_images(tmp_path / "out")
    assert numbers(VideoData(image_folder=tmp_path / "out")) == [0, 1, 2, 3, 4]
    for bad in (0, COUNT + 1):
        with pytest.raises(ValueError, match="length must be from 1 to 12"):
            data.set_length(bad)


def test_frames_are_cropped_at_the_centre_and_resized_as_pillow_does(tmp_path):
    path = write_video(tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 255, (2, 32, 64, 3), np.uint8))
    stored = load_video(path)[1]
    assert VideoData(path, height=32, width=64)[1] == stored
    assert VideoData(path, height=16, width=16)[1] == stored.crop((16, 0, 48, 32)).resize((16, 16))
    assert VideoData(path, height=10, width=64)[1] == stored.crop((0, 11, 64, 21)).resize((64, 10))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "video_file or image_folder"),
        ({"video_file": "gone.mp4"}, "no file gone.mp4"),
        ({"image_folder": "gone"}, "gone"),
        ({"video_file": "a.mp4", "height": 0}, "height must be"),
        ({"video_file": "a.mp4", "width": 1.5}, "width must be"),
    ],
)
def test_what_cannot_be_opened(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.mp4", numbered(2))
    with pytest.raises(ValueError, match=words):
        VideoData(**arguments)


def test_a_frame_that_is_damaged_is_named(tmp_path):
    path = write_video(tmp_path / "a.mkv", np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), np.uint8))
    data = VideoData(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert data[0].size == (64, 64)
    with pytest.raises(MediaError, match=r"a\.mkv: frame \d+"):
        data[39]
