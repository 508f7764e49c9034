"""One reader for all that users have: judged by content, upright, on white, and harmless whatever a file says it is."""

import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.attack import FAULTS
from tests.attack.media import attack
from tests.trainer.material import number_of, numbered, write_video
from wan_core import media
from wan_core.media import MediaError, load_video, probe
from wancore.headless.video import VideoFromFile
from wancore.trainer.data import clips as trainer

RED, GREEN, BLUE, GREY = (220, 20, 20), (20, 200, 20), (20, 20, 220), (120, 120, 120)
QUARTERS = np.zeros((32, 64, 3), np.uint8)
QUARTERS[:16, :32], QUARTERS[:16, 32:], QUARTERS[16:, :32], QUARTERS[16:, 32:] = RED, GREEN, BLUE, GREY
"""Another colour in each corner, so that every turn and mirror image differs."""


def corners(frame) -> list[tuple[int, ...]]:
    """The colours at the four corners, each as the nearest of those above."""
    values = np.asarray(frame).astype(float)
    found = [values[3, 3], values[3, -4], values[-4, 3], values[-4, -4]]
    return [min((RED, GREEN, BLUE, GREY), key=lambda c: np.abs(value - c).sum()) for value in found]


def everyones(path: Path) -> list[np.ndarray]:
    """The frames as Python, training and `headless` see them, each (T, H, W, 3) in 0 to 255."""
    clip = probe(path)
    trained = trainer.read(clip, range(clip.num_frames)).mul(255).numpy()
    video = VideoFromFile(path)
    shown = video.get_components().images.mul(255).numpy()
    assert video.get_dimensions() == (clip.width, clip.height) == trained.shape[2:0:-1]
    return [np.stack([np.asarray(f) for f in load_video(path)]), trained, shown]


def with_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """An mp4 with another display matrix in its track header."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", *(n << 16 for n in (a, b)), 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((1, 0, 0, 1), lambda f: f),
        ((0, 1, -1, 0), lambda f: np.rot90(f, -1)),
        ((0, -1, 1, 0), lambda f: np.rot90(f)),
        ((-1, 0, 0, -1), lambda f: np.rot90(f, 2)),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda f: f.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda f: np.rot90(f, 2).swapaxes(0, 1)),
    ],
)
def test_a_phones_clip_is_shown_upright_by_every_reader(tmp_path, matrix, turn):
    path = with_matrix(write_video(tmp_path / "phone.mp4", [QUARTERS] * 3), *matrix)
    for found in everyones(path):
        assert found.shape == (3, *turn(QUARTERS).shape)
        assert corners(found[1]) == corners(turn(QUARTERS))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_by_its_exif_by_every_reader(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(QUARTERS)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
    shown = stored.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else stored
    for name in ("a.jpg", "a.png", "a.webp", "a.tiff"):
        stored.save(tmp_path / name, exif=exif)
        for found in everyones(tmp_path / name):
            assert found.shape[2:0:-1] == shown.size and corners(found[0]) == corners(shown)


def animation(path: Path, kind: str, count: int = 5) -> Path:
    frames = [Image.fromarray(frame) for frame in numbered(count, 48, 32)]
    options = {"lossless": True} if kind == "WEBP" else {}
    with path.open("wb") as file:
        frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=100, **options)
    return path


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.mp4", "a.jpg"])
@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_a_clip_whatever_its_suffix_says(tmp_path, kind, name):
    path = animation(tmp_path / name, kind)
    clip = probe(path)
    assert (clip.num_frames, clip.width, clip.height) == (5, 48, 32)
    assert clip.fps == pytest.approx(10) and clip.times == pytest.approx((0, 0.1, 0.2, 0.3, 0.4))
    for found in everyones(path):
        assert [number_of(frame / 255, 5) for frame in found] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["clip.png", "clip", "clip.txt"])
def test_a_clip_is_a_clip_and_a_picture_a_picture_whatever_the_suffix_says(tmp_path, name):
    shutil.copy(write_video(tmp_path / "a.mp4", numbered(5), fps=10), tmp_path / name)
    assert (probe(tmp_path / name).num_frames, probe(tmp_path / name).fps) == (5, 10)
    with (tmp_path / name).open("wb") as file:
        Image.fromarray(QUARTERS).save(file, "PNG")
    assert (probe(tmp_path / name).num_frames, probe(tmp_path / name).fps) == (1, None)
    for found in everyones(tmp_path / name):
        assert (found[0].round() == QUARTERS).all()


def test_a_still_gif_and_webp_are_pictures(tmp_path):
    for name in ("a.gif", "a.webp", "a.tiff", "a.bmp", "a.ppm", "a.avif"):
        Image.fromarray(QUARTERS).save(tmp_path / name)
        assert probe(tmp_path / name).fps is None and corners(load_video(tmp_path / name)[0]) == corners(QUARTERS)


DEEP = np.linspace(0, 65535, 64 * 48).reshape(48, 64)
DEPTHS = {
    "16.png": Image.fromarray(DEEP.astype(np.uint16)),
    "16.tiff": Image.fromarray(DEEP.astype(np.uint16)),
    "16.pgm": Image.fromarray(DEEP.astype(np.uint16)),
    "32.tiff": Image.fromarray(DEEP.astype(np.int32)),
    "float.tiff": Image.fromarray((DEEP / 65535).astype(np.float32)),
    "float255.tiff": Image.fromarray((DEEP / 257).astype(np.float32)),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_a_deep_picture_keeps_its_ramp(tmp_path, name):
    DEPTHS[name].save(tmp_path / name)
    for found in everyones(tmp_path / name):
        assert found[0, ..., 0] / 255 == pytest.approx(DEEP / 65535, abs=0.6 / 255)


def test_what_is_transparent_is_white(tmp_path):
    clear = np.zeros((32, 64, 4), np.uint8)
    clear[:, 32:] = (*RED, 255)
    picture = Image.fromarray(clear)
    picture.save(tmp_path / "a.png")
    picture.convert("P").save(tmp_path / "palette.png", transparency=picture.convert("P").getpixel((0, 0)))
    other = Image.fromarray(np.flipud(clear) // 2)
    for kind in ("GIF", "WEBP", "PNG"):
        with (tmp_path / f"b.{kind}").open("wb") as file:
            options = {"lossless": True} if kind == "WEBP" else {}
            picture.save(file, kind, save_all=True, append_images=[other], duration=[100, 200], **options)
    with av.open(str(tmp_path / "c.mov"), "w") as container:
        stream = container.add_stream("qtrle", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "argb"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(clear, format="rgba")))
        container.mux(stream.encode())
    for file in tmp_path.iterdir():
        for found in everyones(file):
            assert found[0, :, :28].min() > 250, file
            assert np.abs(found[0, 16, 50] - RED).max() < 40, file


def frames_folder(folder: Path, count: int) -> Path:
    folder.mkdir()
    for index, frame in enumerate(numbered(count)):
        Image.fromarray(frame).save(folder / f"frame_{index}.{'PNG' if index % 2 else 'jpg'}")
    (folder / "notes.txt").write_text("not a frame")
    return folder


def test_a_folder_of_frames_is_a_clip_in_the_order_of_its_numbers(tmp_path):
    folder = frames_folder(tmp_path / "shot.1", 12)
    clip = probe(folder)
    assert (clip.num_frames, clip.fps, clip.width, clip.height) == (12, 16, 32, 32)
    for found in everyones(folder):
        assert [number_of(frame / 255, 12) for frame in found] == list(range(12))
    media.check_frame(clip, 11)
    Image.new("RGB", (8, 8)).save(folder / "frame_5.PNG")
    with pytest.raises(MediaError, match=r"frame_5\.PNG is 8x8"):
        probe(folder)


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it has these sides."""
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + bytes(64)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{} loop\n%%EOF\n"
HOSTILE = {
    "EPS": EPS,
    "EPS in a preview": b"\xc5\xd0\xd3\xc6" + struct.pack("<2I", 32, len(EPS)) + bytes(20) + EPS,
    "HLS": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:1/a.ts\n#EXT-X-ENDLIST\n",
    "concat": b"ffconcat version 1.0\nfile whole.mp4\n",
    "DASH": b'<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period/></MPD>\n',
    "SDP": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(60),
    "PDF": b"%PDF-1.4\n%%EOF\n",
    "bomb": bomb(60000, 60000),
    "wide bomb": bomb(2**31 - 1, 1),
    "text": b"hello",
    "nothing": b"",
    "PNG without pixels": bomb(8, 8),
    "subtitles": b"1\n00:00:00,000 --> 00:00:01,000\nhello\n",
}


def flood(width: int, height: int, count: int) -> bytes:
    """A GIF of so many frames, each one pixel on a large canvas."""
    frame = b"\x2c" + struct.pack("<4HB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<2H3B", width, height, 0x80, 0, 0) + bytes(6) + frame * count + b";"


HOSTILE["flood"] = flood(10000, 10000, 400)


@pytest.mark.parametrize("suffix", [".png", ".mp4"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_plain_picture_or_clip_is_refused_by_name(tmp_path, monkeypatch, kind, suffix):
    write_video(tmp_path / "whole.mp4", numbered(3))
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(HOSTILE[kind])
    for read in (probe, load_video, lambda p: list(media.frames(p)), lambda p: VideoFromFile(p).get_components()):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read(path)


@pytest.mark.parametrize("name", ["pipe", "device", "empty folder", "missing", "nul", "broken link", "http", "concat"])
def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path, name):
    path = tmp_path / name
    match name:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/zero")
        case "empty folder":
            path.mkdir()
        case "nul":
            path = tmp_path / "a\0b"
        case "broken link":
            path.symlink_to(tmp_path / "gone")
        case "http":
            path = Path("http://127.0.0.1:1/a.mp4")
        case "concat":
            path = Path(f"concat:{write_video(tmp_path / 'a.mp4', numbered(3))}")
    for read in (probe, load_video):
        with pytest.raises(MediaError, match=re.escape(str(path))):
            read(path)


def test_a_mov_that_points_to_another_file_does_not_lead_there(tmp_path):
    """A data reference ("dref") of an mp4 may name a file; its own says that the data is here."""
    write_video(tmp_path / "a.mp4", numbered(3))
    data = (tmp_path / "a.mp4").read_bytes()
    assert b"url \x00\x00\x00\x01" in data
    bad = tmp_path / "b.mp4"
    bad.write_bytes(data.replace(b"url \x00\x00\x00\x01", b"alis\x00\x00\x00\x00"))
    with av.open(str(bad)) as container:
        assert container.streams.video
    assert len(load_video(bad)) == 3


def damaged(path: Path, kind: str) -> Path:
    """A file whose end or middle is broken."""
    if kind == "video":
        data = bytearray(
            write_video(path, np.random.default_rng(0).integers(0, 255, (9, 48, 64, 3), np.uint8)).read_bytes()
        )
        at = data.index(b"mdat") + 600
        data[at : at + 5000] = bytes(5000)
    else:
        data = bytearray(animation(path, kind, 9).read_bytes()) if kind != "JPEG" else bytearray()
        if kind == "JPEG":
            Image.fromarray(QUARTERS).save(path, "JPEG")
            data = bytearray(path.read_bytes())
        del data[len(data) * 2 // 3 :]
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", ["video", "WEBP", "PNG", "JPEG"])
def test_an_error_of_a_library_names_the_file(tmp_path, kind):
    path = damaged(tmp_path / "shot 7.mp4", kind)
    with pytest.raises(MediaError, match=re.escape(str(path))):
        load_video(path)
    with pytest.raises(MediaError, match=re.escape(str(path))):
        trainer.read(probe(path), [0, 8])


def test_frames_of_several_sizes_and_odd_names(tmp_path):
    small, large = (write_video(tmp_path / f"{n}.ts", numbered(3, n, n), codec="mpeg2video") for n in (32, 64))
    (tmp_path / "both.ts").write_bytes(small.read_bytes() + large.read_bytes())
    with pytest.raises(MediaError, match=r"both\.ts.*64x64, the first 32x32"):
        load_video(tmp_path / "both.ts")
    for name in ("file:x.mp4", "-i.mp4", "a|b.mp4", "ü 猫.mp4", "pipe:0", os.fsdecode(b"\xff.mp4")):
        shutil.copy(write_video(tmp_path / "plain.mp4", numbered(3)), tmp_path / name)
        assert probe(tmp_path / name).num_frames == 3


def test_a_cover_is_not_the_clip(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        clip = container.add_stream("libx264", rate=16)
        clip.width, clip.height, clip.pix_fmt = 32, 32, "yuv420p"
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        for frame in numbered(5):
            container.mux(clip.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux([*cover.encode(), *clip.encode()])
    assert (probe(tmp_path / "a.mp4").num_frames, probe(tmp_path / "a.mp4").width) == (5, 32)


def test_torch_sees_what_pillow_shows(tmp_path):
    path = animation(tmp_path / "a.webp", "WEBP", 3)
    shown = media.frames_to_tensor(load_video(path))
    assert torch.equal(shown, trainer.read(probe(path), range(3)))


def test_changed_files_are_read_or_refused_by_name():
    faults = [trial for trial in attack(60, seed=1) if trial.verdict in FAULTS]
    assert not faults
