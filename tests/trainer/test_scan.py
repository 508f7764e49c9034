"""A folder is a data set: everything in it is a sample, the caption of one, or named with the reason why it is not."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.trainer.material import number_of, numbered, write_video
from wan_core.files import files_below
from wan_core.media import probe
from wancore.nodes import host
from wancore.nodes.training_run import files_mark
from wancore.trainer.config import TrainConfig
from wancore.trainer.data.cache import LatentCache
from wancore.trainer.data.clips import read
from wancore.trainer.data.dataset import load
from wancore.trainer.data.report import check
from wancore.trainer.flags import ConfigError

SUFFIXES = ("mp4", "MP4", "m4v", "mov", "mkv", "webm", "ts", "mpg", "3gp", "gif", "png", "tiff", "TIF", "jfif", "avif")
ODD = ("clip.mp4.bak", "clip", "clip.xyz")
"""Names that only their content tells."""


def settings(folder: Path) -> TrainConfig:
    return TrainConfig(dataset_base_path=str(folder), height=32, width=32, num_frames=5)


def report(folder: Path):
    return check(load(settings(folder)), settings(folder))


def names(found) -> list[str]:
    return sorted(row.name for row in found.rows)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered(5))


def put(clip: Path, *files: Path) -> None:
    """A clip or picture under each of these names, with a caption."""
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        kind = file.suffix.lower()
        if kind in (".png", ".tiff", ".tif", ".jfif", ".avif"):
            Image.new("RGB", (32, 32)).save(file)
        elif kind in (".webm", ".ts", ".mpg", ".gif", ".mkv"):
            codec = {".mpg": "mpeg2video"}.get(kind)
            write_video(file, numbered(5), fps=25, codec=codec)
        else:
            shutil.copy(clip, file)
        file.with_suffix(".txt").write_text(f"a clip {file.name}")


def test_every_usual_and_unusual_suffix_is_read(tmp_path, clip):
    files = [tmp_path / f"{n:02}.{suffix}" for n, suffix in enumerate(SUFFIXES)]
    files += [tmp_path / f"odd{n}" / name for n, name in enumerate(ODD)]
    put(clip, *files)
    found = report(tmp_path)
    assert names(found) == sorted(file.name for file in files) and not found.bad
    assert not any("left out" in notice for notice in found.notices)


def test_linked_folders_and_files_are_read_without_going_round(tmp_path, clip):
    data, far = tmp_path / "data", tmp_path / "far"
    put(clip, data / "a.mp4", far / "b.mp4", far / "deep" / "c.mp4", tmp_path / "file.mp4")
    (data / "more").symlink_to(far)
    (data / "again").symlink_to(data)
    (far / "deep" / "up").symlink_to(far)
    (data / "d.mp4").symlink_to(tmp_path / "file.mp4")
    (data / "d.txt").write_text("a link")
    assert names(report(data)) == ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
    assert {row.sample.target.relative_to(data).as_posix() for row in report(data).rows} == {
        "a.mp4", "d.mp4", "more/b.mp4", "more/deep/c.mp4",
    }  # fmt: skip


def test_captions_are_found_whatever_their_case(tmp_path, clip):
    shutil.copy(clip, tmp_path / "Shot.MP4")
    (tmp_path / "shot.TXT").write_text("a caption")
    assert [row.sample.captions for row in report(tmp_path).rows] == [("a caption",)]


def test_a_folder_of_frames_with_a_caption_beside_it_is_a_clip(tmp_path, clip):
    for name, count in (("shot.1", 12), ("short", 2)):
        (tmp_path / name).mkdir()
        for index, frame in enumerate(numbered(count)):
            Image.fromarray(frame).save(tmp_path / name / f"{index}.png")
        (tmp_path / f"{name}.txt").write_text("frames")
    # A text beside a folder of samples is no caption of a clip.
    put(clip, tmp_path / "no frames" / "a.mp4", tmp_path / "pictures" / "b.png")
    for name in ("no frames", "pictures"):
        (tmp_path / f"{name}.txt").write_text("notes")
    found = report(tmp_path)
    assert names(found) == ["a.mp4", "b.png", "shot.1"]
    assert any("pictures.txt (no picture or clip has that name)" in notice for notice in found.notices)
    assert "2 frames, fewer than the 5 wanted" in str(found.bad[0])
    row = next(row for row in found.rows if row.name == "shot.1")
    assert (row.target.num_frames, row.target.fps) == (12, 16)
    assert [number_of(frame, 12) for frame in read(row.target, [0, 2, 11])] == [0, 2, 11]


def test_the_cache_knows_the_frames_of_a_folder(tmp_path):
    (tmp_path / "shot").mkdir()
    for index, frame in enumerate(numbered(3)):
        Image.fromarray(frame).save(tmp_path / "shot" / f"{index}.png")
    cache = LatentCache(tmp_path / "cache")
    first = cache.file_hash(tmp_path / "shot")
    assert cache.file_hash(tmp_path / "shot") == first
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "shot" / "1.png")
    assert cache.file_hash(tmp_path / "shot") != first


def test_what_is_left_out_is_named_with_its_reason(tmp_path, clip):
    put(clip, tmp_path / "a.mp4")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF-1.4")
    (tmp_path / "latents.npz").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "orphan.txt").write_text("a caption")
    (tmp_path / "lost.bin").symlink_to(tmp_path / "gone")
    (tmp_path / ".hidden.pdf").write_bytes(b"")
    (tmp_path / ".cache").mkdir()
    put(clip, tmp_path / ".cache" / "b.mp4")
    (notice,) = (notice for notice in report(tmp_path).notices if "left out" in notice)
    for part in (
        "notes.pdf (",
        "latents.npz (",
        "orphan.txt (no picture or clip has that name)",
        "lost.bin (there is no",
    ):
        assert part in notice
    assert "hidden" not in notice and "b.mp4" not in notice and names(report(tmp_path)) == ["a.mp4"]
    for n in range(20):
        (tmp_path / f"x{n}.pdf").write_bytes(b"%PDF")
    assert "and 14 more" in str(report(tmp_path))


def test_a_folder_without_a_sample_says_why(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4")
    with pytest.raises(ConfigError, match=r"holds no samples\. Left out: a\.pdf \("):
        load(settings(tmp_path))


def test_bad_rows_of_known_kinds_are_rows(tmp_path):
    (tmp_path / "broken.m4v").write_bytes(b"x")
    (tmp_path / "broken.txt").write_text("a clip")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "pipe.txt").write_text("a clip")
    (tmp_path / "lost.mp4").symlink_to(tmp_path / "gone.mp4")
    (tmp_path / "lost.txt").write_text("a clip")
    bad = {row.sample.target.name: str(row) for row in report(tmp_path).bad}
    assert "cannot be read" in bad["broken.m4v"]
    assert "not a regular file" in bad["pipe.mp4"] and "there is no file" in bad["lost.mp4"]


def test_model_lists_follow_links_as_comfyui_does(tmp_path):
    root, far = tmp_path / "models" / "loras", tmp_path / "far"
    (far / "deep").mkdir(parents=True)
    root.mkdir(parents=True)
    for file in (root / "a.safetensors", far / "b.SAFETENSORS", far / "deep" / "c.pt", far / "notes.md"):
        file.write_bytes(b"")
    (root / "nas").symlink_to(far)
    (far / "up").symlink_to(root)
    (root / "d.safetensors").symlink_to(far / "b.SAFETENSORS")
    host.configure(models_dir=tmp_path / "models")
    try:
        listed = host.current.list_files("loras")
        assert listed == ["a.safetensors", "d.safetensors", "nas/b.SAFETENSORS", "nas/deep/c.pt"]
        assert all(host.current.model_path("loras", name).exists() for name in listed)
    finally:
        host.configure()


def test_a_mark_changes_with_files_behind_a_link(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "more").symlink_to(tmp_path / "far")
    before = files_mark([tmp_path / "data"])
    (tmp_path / "far" / "a.mp4").write_bytes(b"x")
    assert files_mark([tmp_path / "data"]) != before
    assert [file.name for file in files_below(tmp_path / "data")] == ["a.mp4"]


def test_a_clip_is_probed_once_whatever_it_is_called(tmp_path, clip):
    shutil.copy(clip, tmp_path / "a.jpg")
    assert probe(tmp_path / "a.jpg").num_frames == 5
