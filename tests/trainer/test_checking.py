"""The check of a data set by itself: report, picture and exit code."""

import subprocess

import pytest
from PIL import Image

from tests import fork_server
from tests.trainer import material
from tests.trainer.runs import ROOT, environment
from wancore.trainer.check import main

SMALL = ["--height", "32", "--width", "32", "--num_frames", "5"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    material.write_dataset(folder / "good", count=3, width=32, height=32, num_frames=9)
    material.write_video(folder / "bad" / "短.mp4", material.numbered(3))
    (folder / "bad" / "metadata.csv").write_text("video,prompt\n短.mp4,a 狗\n", encoding="utf-8")
    return folder


def test_good_data_is_reported_and_drawn(data, tmp_path, capsys):
    words = ["--dataset_base_path", str(data / "good"), *SMALL, "--extra_inputs", "control_video,reference_image"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "3 good rows, 0 bad" in capsys.readouterr().out
    assert "3 good rows" in (tmp_path / "out" / "report.txt").read_text(encoding="utf-8")
    sheet = Image.open(tmp_path / "out" / "contact_sheet.png")
    assert sheet.width == 4 * 184 + 8 and sheet.height == 3 * 166
    cells = [sheet.crop((8 + 184 * i, 8, 184 + 184 * i, 140)).getcolors(10**6) for i in range(4)]
    assert len({str(sorted(c)) for c in cells}) == 4


def test_data_is_sized_and_counted_for_the_model_that_is_named(tmp_path, capsys):
    """The sides of TI2V-5B are multiples of 32, its frames 24 in a second."""
    settings = material.config(tmp_path, "ti2v_5b", width=48, output_path="out", lora_rank=4)
    assert main(material.flags(settings)) == 0
    out = capsys.readouterr().out
    assert "as 64x32, 5 frames" in out and "at 24 frames per second (2 at 16)" in out
    assert "activations of 4 tokens" in out and "not counted" not in out


def test_bad_data_is_named_and_drawn_without(data, tmp_path, capsys):
    words = ["--dataset_base_path", str(data / "bad"), *SMALL, "--out", str(tmp_path)]
    assert main(words) == 2
    assert "row 1 (短.mp4)" in capsys.readouterr().err
    assert "fewer than the 5 wanted" in (tmp_path / "report.txt").read_text(encoding="utf-8")
    assert Image.open(tmp_path / "contact_sheet.png").size


def test_captions_of_any_script_and_length_are_drawn(data, tmp_path):
    (data / "bad" / "long.csv").write_text(f"video,prompt\n短.mp4,{'一只狗 ' * 80}\n", encoding="utf-8")
    words = ["--dataset_base_path", str(data / "bad"), "--dataset_metadata_path", str(data / "bad" / "long.csv")]
    assert main([*words, *SMALL[:4], "--num_frames", "1", "--out", str(tmp_path)]) == 0


def test_the_command_runs_from_the_shell(data):
    words = [
        fork_server.python(),
        "-m",
        "trainer.check",
        "--dataset_base_path",
        str(data / "good"),
        *SMALL,
        "--lora_rnk",
        "3",
    ]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Did you mean --lora_rank" in done.stderr and "Traceback" not in done.stderr
