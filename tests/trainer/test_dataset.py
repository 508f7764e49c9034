"""Metadata in every form, and the one report that names every defect before a model is loaded."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests import fork_server
from tests.trainer.material import numbered, write_metadata, write_video
from wan_core.conditioning.pose_rows import DEFAULT_ORIGIN
from wancore.trainer.config import TrainConfig
from wancore.trainer.data.dataset import load
from wancore.trainer.data.report import DatasetError, DatasetReport, check
from wancore.trainer.data.synthetic import write_dataset
from wancore.trainer.flags import ConfigError


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """Clips and pictures that rows are made of."""
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "clip.mp4", numbered(9, 64, 32))
    write_video(folder / "long.mp4", numbered(21, 64, 32), fps=24)
    write_video(folder / "short.mp4", numbered(4, 64, 32))
    write_video(folder / "square.mp4", numbered(9, 32, 32))
    write_video(folder / "twice.mp4", numbered(18, 64, 32), fps=32)
    Image.new("RGB", (64, 32), "red").save(folder / "picture.png")
    (folder / "broken.mp4").write_text("no video")
    row = " ".join(map(str, DEFAULT_ORIGIN))
    (folder / "poses.txt").write_text("\n".join([row] * 9))
    (folder / "bad_poses.txt").write_text("1 2 3")
    return folder


def config(folder: Path, **changes) -> TrainConfig:
    return TrainConfig(**{"dataset_base_path": str(folder), "height": 32, "width": 64, "num_frames": 5, **changes})


def checked(folder: Path, rows, name="metadata.csv", **changes) -> DatasetReport:
    """The report on `rows`, whose metadata is written into `folder`."""
    path = write_metadata(folder, rows, name)
    try:
        settings = config(folder, dataset_metadata_path=str(path), **changes)
        return check(load(settings), settings)
    finally:
        path.unlink()


ROWS = [
    {"prompt": "first, with a comma", "video": "clip.mp4", "motion_bucket_id": "20"},
    {"prompt": "zweite Zeile äöü 雪", "video": "long.mp4", "motion_bucket_id": "100"},
    {"prompt": "a picture", "video": "picture.png", "motion_bucket_id": "0"},
]


@pytest.mark.parametrize("name", ["metadata.csv", "rows.json", "rows.JSONL"])
def test_all_forms_of_metadata_say_the_same(media, name):
    path = write_metadata(media, ROWS, name.lower())
    path = path.rename(media / name) if path.name != name else path
    data = load(config(media, dataset_metadata_path=str(path), extra_inputs=("motion_bucket_id",)))
    path.unlink()
    assert [s.captions for s in data.samples] == [(row["prompt"],) for row in ROWS]
    assert [s.target for s in data.samples] == [media / row["video"] for row in ROWS]
    assert [dict(s.values) for s in data.samples] == [{"motion_bucket_id": row["motion_bucket_id"]} for row in ROWS]
    assert not data.problems and not any(s.problems for s in data.samples)


def test_metadata_as_spreadsheets_write_it(media):
    path = media / "metadata.csv"
    path.write_bytes('\ufeffprompt,video,note\r\n"two\nlines",clip.mp4,\r\n,clip.mp4,x\r\n'.encode())
    data = load(config(media))
    path.unlink()
    assert data.source == path
    assert data.samples[0].captions == ("two\nlines",)
    assert data.samples[1].problems == ("the caption (column prompt) is empty",)


def test_windows_paths_several_captions_and_several_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.mp4").write_bytes(b"")
    row = {"prompt": ["one", " ", "two"], "video": r"sub\a.mp4", "vace_reference_image": ["x.png", "y.png"]}
    write_metadata(tmp_path, [row], "metadata.json")
    sample = load(config(tmp_path, extra_inputs=("vace_reference_image",))).samples[0]
    assert sample.captions == ("one", "two") and sample.target == tmp_path / "sub" / "a.mp4"
    assert sample.files["vace_reference_image"] == (tmp_path / "x.png", tmp_path / "y.png")
    write_metadata(tmp_path, [{**row, "vace_reference_image": '["x.png", "y.png"]'}])
    sample = load(config(tmp_path, extra_inputs=("vace_reference_image",))).samples[0]
    assert sample.files["vace_reference_image"] == (tmp_path / "x.png", tmp_path / "y.png")


def test_a_folder_with_captions_beside_the_files(media, tmp_path):
    for name in ("clip.mp4", "picture.png"):
        shutil.copy(media / name, tmp_path)
    (tmp_path / "clip.txt").write_text("a clip\n", encoding="utf-8-sig")
    settings = config(tmp_path)
    report = check(load(settings), settings)
    assert [row.sample.captions for row in report.rows] == [("a clip",)]
    assert "picture.txt" in str(report) and "row 2 (picture.png)" in str(report)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"prompt,video\n", "m.csv", "holds no samples"),
        ("prompt,video\né,clip.mp4\n".encode("latin-1"), "m.csv", "UTF-8"),
        (b"{}", "m.json", "list of objects"),
        (b"[", "m.json", "cannot be read"),
        (b"x", "m.parquet", "csv"),
        (None, "missing.csv", "missing.csv"),
    ],
)
def test_metadata_that_cannot_be_read_at_all(tmp_path, content, name, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(config(tmp_path, dataset_metadata_path=str(tmp_path / name)))
    with pytest.raises(ConfigError, match="not a folder"):
        load(config(tmp_path / "nowhere"))


DEFECTS = {
    "a missing file": ({"video": "gone.mp4"}, "there is no file"),
    "no video": ({"video": "broken.mp4"}, "broken.mp4 cannot be read as a video"),
    "too short": ({"video": "short.mp4"}, "4 frames, fewer than the 5 wanted"),
    "no caption": ({"prompt": ""}, "caption .* is empty"),
    "no clip": ({"video": ""}, "names no clip"),
    "an unknown kind": ({"video": "poses.txt"}, "type of file is not read"),
    "no control": ({"control_video": ""}, "control_video is empty; it should hold a control video"),
    "a missing control": ({"control_video": "gone.mp4"}, "control_video: there is no file"),
    "a short control": ({"control_video": "short.mp4"}, "control_video .* has 4 frames; the clip needs 5"),
    "a control of another shape": ({"control_video": "square.mp4"}, "32x32, the clip 64x32"),
    "a reference that is none": ({"reference_image": "broken.mp4"}, "reference_image: .* cannot be read"),
    "two references": ({"reference_image": ["picture.png", "clip.mp4"]}, "holds 2 files; it takes one"),
    "no number": ({"motion_bucket_id": "fast"}, "'fast'; it must be a number"),
    "a number out of range": ({"motion_bucket_id": 101}, "from 0 to 100"),
    "not a number at all": ({"motion_bucket_id": float("nan")}, "motion_bucket_id is empty"),
    "an unknown direction": ({"camera_control_direction": "Sideways"}, "Left"),
    "a broken pose file": ({"camera_path": "bad_poses.txt"}, "bad_poses.txt, line 1"),
    "everything at once": ({"prompt": "", "video": "gone.mp4", "control_video": ""}, "empty.*no file.*control_video"),
}
INPUTS = ("control_video", "reference_image", "motion_bucket_id", "camera_control_direction", "camera_path")
GOOD = {
    "prompt": "a caption",
    "video": "clip.mp4",
    "control_video": "twice.mp4",
    "reference_image": "picture.png",
    "motion_bucket_id": 50,
    "camera_control_direction": "Left",
    "camera_path": "poses.txt",
}


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_one_report_names_every_defect_and_changes_nothing(media, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(media, folder)
    write_metadata(folder, [GOOD, *({**GOOD, **change} for change, _ in DEFECTS.values()), GOOD], "metadata.json")
    before = digest(folder)
    settings = config(folder, extra_inputs=INPUTS)
    report = check(load(settings), settings)
    assert [row.sample.position for row in report.rows] == [0, len(DEFECTS) + 1]
    assert [bad.sample.position for bad in report.bad] == list(range(1, len(DEFECTS) + 1))
    for bad, (_, message) in zip(report.bad, DEFECTS.values(), strict=True):
        assert re.search(message, str(bad))
        assert str(bad) in str(report) and str(bad).startswith(f"row {bad.sample.position + 1} ")
    with pytest.raises(DatasetError) as caught:
        report.require("error")
    assert str(report) in str(caught.value) and "--on_bad_sample skip" in str(caught.value)
    assert report.require("skip") == report.rows
    assert digest(folder) == before


def test_rows_with_too_many_cells_and_broken_lines(media):
    (media / "metadata.csv").write_text("prompt,video\na red, ball,clip.mp4\nfine,clip.mp4\n")
    settings = config(media)
    report = check(load(settings), settings)
    (media / "metadata.csv").unlink()
    assert len(report.rows) == 1 and "put captions with commas in quotes" in str(report.bad[0])
    (media / "metadata.jsonl").write_text('{"prompt": "a", "video": "clip.mp4"}\n{"prompt": \n\n[1]\n')
    report = check(load(settings), settings)
    (media / "metadata.jsonl").unlink()
    assert len(report.rows) == 1 and "no JSON" in str(report.bad[0]) and "no object" in str(report.bad[1])


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"caption": "x", "video": "clip.mp4"}, {}, "no column prompt; the metadata has caption, video"),
        ({"prompt": "x", "clip": "clip.mp4"}, {}, "no column video or image"),
        ({"prompt": "x", "video": "clip.mp4"}, {"extra_inputs": ("control_video",)}, "no column control_video"),
        ({"prompt": "x", "video": "clip.mp4"}, {"data_file_keys": ("video", "depth")}, "names depth"),
        ({"prompt": "x", "video": "clip.mp4"}, {"data_file_keys": ("control_video",)}, "neither video nor image"),
    ],
)
def test_wrong_columns_stop_the_run_even_when_bad_rows_may_be_left_out(media, row, changes, message):
    report = checked(media, [row], **changes)
    with pytest.raises(DatasetError, match=message):
        report.require("skip")


def test_videos_and_images_may_stand_in_columns_of_their_own(media):
    rows = [{"prompt": "x", "video": "clip.mp4", "image": ""}, {"prompt": "y", "video": "", "image": "picture.png"}]
    report = checked(media, rows)
    assert [(row.name, row.size.num_frames) for row in report.require("error")] == [("clip.mp4", 5), ("picture.png", 1)]
    only = checked(media, rows, data_file_keys=("image",))
    assert [row.name for row in only.rows] == ["picture.png"] and "names no clip (column image)" in str(only.bad[0])


def test_no_good_row_stops_the_run(media):
    with pytest.raises(DatasetError, match="0 good rows, 1 bad"):
        checked(media, [{"prompt": "x", "video": "short.mp4"}]).require("skip")


def test_a_column_with_a_default_may_be_missing(media):
    names = ("camera_control_direction", "camera_control_speed")
    report = checked(
        media, [{"prompt": "x", "video": "clip.mp4", "camera_control_direction": "In"}], extra_inputs=names
    )
    assert len(report.rows) == 1 and not report.problems


@pytest.mark.parametrize(
    ("video", "changes", "expected"),
    [
        ("clip.mp4", {}, (64, 32, 5)),
        ("clip.mp4", {"num_frames": 8}, (64, 32, 9)),
        ("picture.png", {}, (64, 32, 1)),
        ("short.mp4", {"short_clip": "trim"}, (64, 32, 1)),
        ("clip.mp4", {"short_clip": "trim", "num_frames": 81}, (64, 32, 9)),
        ("long.mp4", {"fps": 12.0, "num_frames": 9}, (64, 32, 9)),
        ("twice.mp4", {"fps": 16.0, "num_frames": 9}, (64, 32, 9)),
        ("square.mp4", {"height": None, "width": None}, (32, 32, 5)),
        ("clip.mp4", {"height": None, "width": None, "max_pixels": 512}, (32, 16, 5)),
    ],
)
def test_what_a_clip_is_brought_to(media, video, changes, expected):
    (row,) = checked(media, [{"prompt": "x", "video": video}], **changes).require("error")
    assert (row.size.width, row.size.height, row.size.num_frames) == expected


def test_too_short_only_after_the_change_of_rate(media):
    report = checked(media, [{"prompt": "x", "video": "long.mp4"}], fps=6.0, num_frames=9)
    assert "6 frames at 6 fps, fewer than the 9 wanted" in str(report)


def test_notices_tell_of_rates_pictures_shapes_and_sizes(media):
    names = ("clip.mp4", "long.mp4", "picture.png", "square.mp4")
    text = str(checked(media, [{"prompt": "x", "video": name} for name in names]))
    assert "(1 at 24)" in text and "--fps 16" in text
    assert "pictures among the rows: 1" in text and "cropped at their sides: 1" in text
    assert "3 of 64x32, 5 frames, 1 of 64x32, 1 frames" in text
    unused = checked(media, [GOOD], "m.json", data_file_keys=("video", "control_video"))
    assert "the column control_video is not used; add --extra_inputs control_video" in str(unused)
    assert "(1 at 24)" not in str(checked(media, [{"prompt": "x", "video": "long.mp4"}], fps=16.0))


def test_progress_is_told(media):
    path = write_metadata(media, ROWS)
    settings, seen = config(media), []
    check(load(settings), settings, lambda *progress: seen.append(progress))
    path.unlink()
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_fingerprint_follows_the_data_and_not_the_place(tmp_path):
    write_dataset(tmp_path / "a", count=2, width=32, height=32, num_frames=5)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, moved = (load(config(tmp_path / name)).fingerprint for name in "ab")
    assert first == moved
    metadata = tmp_path / "b" / "metadata.csv"
    metadata.write_text(metadata.read_text().replace("red", "pink"))
    assert load(config(tmp_path / "b")).fingerprint != first
    clip = tmp_path / "a" / "media" / "000_video.mp4"
    clip.write_bytes(clip.read_bytes() + b"x")
    assert load(config(tmp_path / "a")).fingerprint not in (first, load(config(tmp_path / "b")).fingerprint)


def test_the_synthetic_data_is_good_for_every_input_and_is_not_overwritten(tmp_path):
    root = Path(__file__).parents[2]
    command = [
        fork_server.python(),
        "-m",
        "trainer.data.synthetic",
        str(tmp_path / "data"),
        "--count",
        "2",
        "--num_frames",
        "5",
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    names = ("control_video", "reference_image", "vace_video", "vace_video_mask", "vace_reference_image")
    names += ("motion_bucket_id", "camera_control_direction", "camera_control_speed")
    settings = config(tmp_path / "data", height=48, extra_inputs=names)
    assert len(check(load(settings), settings).require("error")) == 2
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 100_000
    with pytest.raises(ValueError, match="is there already"):
        write_dataset(tmp_path / "data")


def test_a_dataset_as_json_reads_numbers_and_text_alike(media):
    rows = [{"prompt": 7, "video": "clip.mp4", "motion_bucket_id": 12.5}]
    assert json.loads(json.dumps(rows)) == rows
    (row,) = checked(media, rows, "m.json", extra_inputs=("motion_bucket_id",)).require("error")
    assert row.sample.captions == ("7",) and float(row.sample.values["motion_bucket_id"]) == 12.5


def test_a_confined_data_set_names_nothing_outside_of_its_folder(media, tmp_path):
    """What a workflow trains on may have been uploaded by anybody."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "linked").symlink_to(media, target_is_directory=True)
    outside = [str(media / "clip.mp4"), "../data/../secret.mp4", "..\\secret.mp4", '["linked/../../secret.mp4"]']
    rows = [{"prompt": "a", "video": name, "control_video": "linked/clip.mp4"} for name in outside]
    rows.append({"prompt": "linked", "video": "linked/clip.mp4", "control_video": "linked/../linked/clip.mp4"})
    rows.append({"prompt": "input", "video": "linked/clip.mp4", "control_video": "/etc/passwd"})
    found = checked(folder, rows, confined=True, extra_inputs=("control_video",))
    assert [row.sample.captions for row in found.rows] == [("linked",)]
    assert [str(bad).count("outside of the data set's folder") for bad in found.bad] == [1] * 5
    free = checked(folder, [{"prompt": "a", "video": str(media / "clip.mp4")}])
    assert len(free.rows) == 1
