"""Where results go is checked before anything runs: names, folders, and what the editor replaces in them."""

import json
import os
from datetime import datetime
from pathlib import Path

import pytest

from wan_core.settings import RunSettings
from wancore.headless.cli import BAD_USAGE, main
from wancore.headless.folders import Folders
from wancore.headless.overrides import expand_prefixes
from wancore.headless.workflow import Workflow
from wancore.nodes.vae import VAEDecode

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / "workflows" / "api" / "t2v.json"


def run(capsys, *arguments: str) -> tuple[int, str]:
    """The exit code and the messages of a run that must end before a model is loaded."""
    try:
        code = main(["run", str(WORKFLOW), "--tiny", "--quiet", *arguments])
    except SystemExit as error:
        code = error.code
    return code, capsys.readouterr().err


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr("wancore.headless.runner.ExecutionPlan.of", lambda *_: pytest.fail("the workflow was run"))


NAMES = {
    "300 letters": ("a" * 300, "has 300 bytes in UTF-8"),
    "90 Chinese letters": ("猫" * 90, "has 270 bytes in UTF-8"),
    "a folder of 300": ("a" * 300 + "/b", "has 300 bytes"),
    "just too long with its number": ("a" * 242, "has 242 bytes"),
    "nothing": ("", "names no file"),
    "a space": (" ", "names no file"),
    "NUL": ("a\0b", "NUL"),
    "a line break": ("a\nb", "control character"),
    "half a character": ("a\ud83d", "surrogates"),
    "outside": ("../x", "leads out of the output folder"),
}


@pytest.mark.parametrize("case", NAMES)
def test_a_prefix_that_cannot_be_a_name_is_refused(tmp_path, capsys, case):
    prefix, words = NAMES[case]
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    saver = next(node for node in workflow.values() if node["class_type"] == "SaveVideo")
    saver["inputs"]["filename_prefix"] = prefix
    file = tmp_path / "w.json"
    file.write_text(json.dumps(workflow))
    code = main(["run", str(file), "--tiny", "--quiet", "--out", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert code == BAD_USAGE and not (tmp_path / "out").exists()
    assert words in told
    assert max(map(len, told.splitlines())) < 400


def test_names_that_fit_are_taken(tmp_path):
    folders = Folders(tmp_path / "in", tmp_path / "out")
    for prefix in ("a" * 200, "猫" * 70, "a/b/c", "%year%/x", "video/ComfyUI", "ü.b"):
        folders.check(prefix)
        with folders.numbered_file(prefix, ".mp4") as file:
            file.partial.write_bytes(b"x")
        assert file.path.read_bytes() == b"x"


@pytest.mark.parametrize("kind", ["file", "below a file", "read-only system", "empty", "space", "too long"])
def test_an_output_folder_that_cannot_be_used_is_refused(tmp_path, capsys, kind):
    (tmp_path / "file").write_text("mine")
    out = {
        "file": tmp_path / "file",
        "below a file": tmp_path / "file" / "deep" / "out",
        "read-only system": "/proc/wancore",
        "empty": "",
        "space": " ",
        "too long": tmp_path / "/".join(["d" * 200] * 25),
    }[kind]
    code, told = run(capsys, "--out", str(out))
    assert code == BAD_USAGE
    assert ("is not the name of a folder" if kind in ("empty", "space") else "cannot be used") in told
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_a_prefix_below_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "video").write_text("mine")
    code, told = run(capsys, "--out", str(tmp_path), "--set", "Save video.filename_prefix=video/a")
    assert code == BAD_USAGE and "is a file, and no folder" in told


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path, capsys):
    tmp_path.chmod(0o500)
    code, told = run(capsys, "--out", str(tmp_path / "out"))
    tmp_path.chmod(0o700)
    assert code == BAD_USAGE and "cannot be written to" in told


def test_all_problems_are_told_at_once(tmp_path, capsys):
    sets = {
        "Save video.filename_prefix": "a" * 300,
        "Decode.tiled": "true",
        "Decode.tile_width": 10,
        "Decode.stride_width": 20,
        "Sampler.steps": 0,
    }
    titles = {node["_meta"]["title"] for node in json.loads(WORKFLOW.read_text(encoding="utf-8")).values()}
    decode = next(title for title in titles if "ecode" in title)
    words = [word for name, value in sets.items() for word in ("--set", f"{name}={value}".replace("Decode", decode))]
    code, told = run(capsys, "--out", str(tmp_path / "out"), *words)
    assert code == BAD_USAGE
    assert all(part in told for part in ("300 bytes", "stride_width must be from 1 to tile_width", "steps"))


@pytest.mark.parametrize("tiled", [True, False])
def test_a_stride_above_its_size_matters_when_there_are_tiles(tiled):
    answer = VAEDecode.VALIDATE_INPUTS(tiled=tiled, tile_height=10, stride_height=11)
    assert (answer is True) != tiled
    assert VAEDecode.VALIDATE_INPUTS(tiled=True, tile_height=None, stride_height=11) is True


@pytest.mark.parametrize("name", ["", " ", "a/b", "a\0b", "a" * 250, "猫" * 85, ".hidden", "a\ud800"])
def test_names_of_kept_latents(name):
    with pytest.raises(ValueError, match="name must be a plain file name"):
        RunSettings(name=name)


def graph(prefix: str) -> Workflow:
    values = {"seed": 7, "cfg": 6.0, "shift": 3.5, "add": True, "prompt": "a/b: *c*", "none": None, "link": ["1", 0]}
    return Workflow.from_api(
        {
            "1": {"class_type": "Other", "inputs": {"seed": 1}, "_meta": {"title": "Sampler"}},
            "2": {"class_type": "KSampler", "inputs": values, "_meta": {"title": "My node"}},
            "3": {"class_type": "SaveVideo", "inputs": {"filename_prefix": prefix, "text": "%KSampler.seed%"}},
        }
    )


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("plain", "plain"),
        ("%date:yyyy-MM-dd%/x", "2026-03-04/x"),
        ("%date:yy-M-d h:m:s%", "26-3-4 5:6:7"),
        ("%date:hhmmss%", "050607"),
        ("%date:yyy%", "yyy"),
        ("%KSampler.seed%_%KSampler.cfg%_%KSampler.shift%", "7_6_3.5"),
        ("%My node.seed%", "7"),
        ("%Sampler.seed%", "1"),
        ("%KSampler.add%%KSampler.none%", "true"),
        ("%KSampler.prompt%", "a_b_ _c_"),
        ("%KSampler.link%", "%KSampler.link%"),
        ("%KSampler.gone%-%Gone.seed%", "%KSampler.gone%-%Gone.seed%"),
        ("%width%x%height%_%year%", "%width%x%height%_%year%"),
        ("100%", "100%"),
    ],
)
def test_prefixes_are_expanded_as_the_editor_does(prefix, expected):
    nodes = expand_prefixes(graph(prefix), datetime(2026, 3, 4, 5, 6, 7)).nodes
    assert nodes["3"].inputs["filename_prefix"] == expected
    assert nodes["3"].inputs["text"] == "%KSampler.seed%"
