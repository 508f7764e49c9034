"""Videos under the name that was given, in the container that its suffix says, whole or not at all."""

import os

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.material import number_of, numbered
from wan_core import VideoData, media
from wan_core.media import load_video, probe, save_frames, save_video

RAMP = torch.linspace(0, 1, 7)[:, None, None, None].expand(7, 32, 48, 3)
FORMS = {
    "tensor": RAMP,
    "array": (RAMP.numpy() * 255).astype(np.uint8),
    "grey": (RAMP.numpy()[..., :1] * 65535).astype(np.uint16),
    "images": [Image.fromarray((f.numpy() * 255).astype(np.uint8)) for f in RAMP],
    "transparent": [Image.fromarray((f.numpy() * 255).astype(np.uint8)).convert("RGBA") for f in RAMP],
    "arrays": list(RAMP.numpy() * 255),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_video_survives_its_file(tmp_path, form):
    path = save_video(FORMS[form], tmp_path / "deep" / "a.mp4", fps=12, metadata={"prompt": '{"a": 1}'})
    clip = probe(path)
    assert (clip.num_frames, clip.fps, clip.width, clip.height, clip.codec) == (7, 12.0, 48, 32, "h264")
    assert (media.frames_to_tensor(load_video(path)) - RAMP).abs().mean() < 0.02
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]
    with av.open(str(path)) as container:
        assert container.metadata["prompt"] == '{"a": 1}'


@pytest.mark.parametrize(
    ("suffix", "container", "codec"),
    [
        (".mp4", "mov,mp4,m4a,3gp,3g2,mj2", "h264"),
        (".m4v", "mov,mp4,m4a,3gp,3g2,mj2", "h264"),
        (".MOV", "mov,mp4,m4a,3gp,3g2,mj2", "h264"),
        (".mkv", "matroska,webm", "h264"),
        (".avi", "avi", "h264"),
        (".webm", "matroska,webm", "vp9"),
        (".gif", "gif", "gif"),
    ],
)
@pytest.mark.parametrize("fps", [8, 16, 29.97])
def test_a_suffix_is_what_it_says(tmp_path, suffix, container, codec, fps):
    path = save_video(numbered(9, 48, 32), str(tmp_path / f"a{suffix}"), fps)
    with av.open(str(path)) as file:
        assert (file.format.name, file.streams.video[0].codec_context.name) == (container, codec)
        if suffix == ".MOV":
            assert file.metadata["major_brand"] == "qt  "
    clip = probe(path)
    assert (clip.num_frames, clip.width, clip.height) == (9, 48, 32)
    assert clip.fps == pytest.approx(fps, rel=0.02)
    assert [number_of(np.asarray(frame) / 255, 9) for frame in load_video(path)] == list(range(9))


def test_a_gif_has_the_colours_of_each_frame(tmp_path):
    frames = [np.full((16, 16, 3), colour, np.uint8) for colour in ((250, 3, 7), (4, 250, 9), (8, 5, 250))]
    for shown, given in zip(load_video(save_video(frames, tmp_path / "a.gif")), frames, strict=True):
        assert np.abs(np.asarray(shown).astype(int) - given).max() <= 4


def test_the_name_that_was_given_is_written_over(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"an older clip")
    assert save_video(numbered(3), path) == path == save_video(numbered(5), path)
    assert probe(path).num_frames == 5 and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "link.mp4").symlink_to(path)
    save_video(numbered(7), tmp_path / "link.mp4")
    assert (tmp_path / "link.mp4").is_symlink() and probe(path).num_frames == 7


def frame(side=16):
    return Image.new("RGB", (side, 16))


NAN = torch.rand(3, 16, 16, 3)
NAN[2, 0, 0, 0] = float("nan")


@pytest.mark.parametrize(
    ("frames", "options", "words"),
    [
        (torch.rand(0, 16, 16, 3), {}, "at least one frame"),
        ([], {}, "at least one frame"),
        (torch.rand(2, 15, 16, 3), {}, "even sides"),
        (torch.rand(16, 16, 3), {}, "at least one frame"),
        (torch.rand(2, 16, 16, 3), {"fps": 0}, "fps above 0"),
        (torch.rand(2, 16, 16, 3), {"fps": float("nan")}, "fps above 0"),
        (torch.rand(2, 16, 16, 3), {"fps": "fast"}, "fps above 0"),
        (torch.rand(2, 16, 16, 3), {"quality": 11}, "quality from 0 to 10"),
        (torch.rand(2, 16, 16, 3), {"quality": None}, "quality from 0 to 10"),
        ([frame(), frame(32)], {}, "one size"),
        (iter([frame(), frame(32)]), {}, "one size"),
        (iter([]), {}, "at least one frame"),
        ((1 / 0 if i else frame() for i in range(2)), {}, "division"),
        (NAN, {}, "NaN"),
        (iter(NAN), {}, "Frame 2 of the video: .*NaN"),
        (list(NAN.numpy()), {}, "NaN"),
        (iter(torch.rand(2, 16, 16, 3) * 255), {}, r"must be in \[0, 1\]"),
        ([Image.new("RGB", (0, 0))], {}, "Frame 0 of the video has no pixels: 0x0"),
        ([np.zeros((0, 4))], {}, "Frame 0 of the video: it must be a picture"),
        (torch.rand(2, 0, 16, 3), {}, "no pixels: 16x0"),
        (["a.png"], {}, "Frame 0 of the video: it must be a picture"),
        ([frame()], {"ffmpeg_params": ["-vf", "scale=8:8"]}, "has no option vf"),
        ([frame()], {"ffmpeg_params": ["-crf"]}, "ffmpeg_params must be options"),
        ([frame()], {"ffmpeg_params": "-crf 18"}, "ffmpeg_params must be options"),
        ([frame()], {"ffmpeg_params": ["-crf", "much"]}, "cannot be encoded with libx264"),
        ([frame()], {"ffmpeg_params": ["-c:v", "none"]}, "cannot be encoded with none"),
    ],
)
def test_what_cannot_be_written_leaves_the_file_that_is_there(tmp_path, frames, options, words):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"an older clip")
    with pytest.raises((ValueError, ZeroDivisionError), match=words):
        save_video(frames, path, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"] and path.read_bytes() == b"an older clip"


@pytest.mark.parametrize("name", ["a", "a.txt", "a.webp", "a.mp4/", ".mp4", "folder.mp4"])
def test_names_that_are_no_videos_are_refused_with_the_list(tmp_path, name):
    (tmp_path / "folder.mp4").mkdir()
    if name == "a.mp4/":
        (tmp_path / "a.mp4").mkdir()
    with pytest.raises(ValueError, match=r"\.mp4, \.m4v, \.mov, \.mkv, \.avi, \.webm, \.gif"):
        save_video(numbered(2), f"{tmp_path}/{name}")


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.mp4", "/proc/nowhere/a.mp4", tmp_path / f"{'n' * 300}a.mp4"):
        with pytest.raises(ValueError, match=r"a\.mp4 cannot be written"):
            save_video(numbered(2), path)


@pytest.mark.parametrize("name", ["http:a.mp4", "-y.mp4", "a|b.mp4", "%d.mp4", "猫.mp4", os.fsdecode(b"\xff.mp4")])
def test_a_name_is_only_a_name(tmp_path, name):
    assert save_video(numbered(2), tmp_path / name).name == name
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_options_of_the_encoder_are_heard(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), np.uint8)
    sizes = [
        save_video(noise, tmp_path / "a.mp4", **options).stat().st_size
        for options in ({"quality": 2}, {"quality": 9}, {"ffmpeg_params": ["-crf", "1", "-preset", "ultrafast"]})
    ]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    save_video(noise, tmp_path / "b.mp4", ffmpeg_params=["-pix_fmt", "yuv444p", "-profile:v", "high444"])
    save_video(noise, tmp_path / "c.mkv", ffmpeg_params=["-c:v", "libx265", "-x265-params", "log-level=none"])
    with av.open(str(tmp_path / "b.mp4")) as one, av.open(str(tmp_path / "c.mkv")) as other:
        assert one.streams.video[0].codec_context.pix_fmt == "yuv444p"
        assert other.streams.video[0].codec_context.name == "hevc"


def test_positions_are_those_of_diffsynth(tmp_path):
    assert probe(save_video(numbered(3), tmp_path / "a.mp4", 8, 9, ["-crf", "20"])).fps == 8


def test_frames_are_written_as_numbered_pictures(tmp_path):
    files = save_frames(numbered(3), tmp_path / "out")
    assert [file.name for file in files] == ["0.png", "1.png", "2.png"]
    assert [number_of(np.asarray(f) / 255, 3) for f in VideoData(image_folder=tmp_path / "out")] == [0, 1, 2]
    with pytest.raises(ValueError, match="cannot be written"):
        save_frames(numbered(1), files[0])
