"""The camera nodes as ComfyUI calls them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wan_core.conditioning.camera import CameraPath, camera_embedding
from wan_core.conditioning.pose_rows import DEFAULT_ORIGIN
from wan_core.types import Conditioning, VideoSize
from wancore.nodes import NODE_CLASS_MAPPINGS, host, places
from wancore.nodes.host import Standalone

NODES = NODE_CLASS_MAPPINGS
MOVE, ROWS, ENCODE = (NODES[f"WanCore{name}"] for name in ("CameraPath", "CameraPathFile", "CameraEncode"))
POSES = "\n".join(" ".join(map(str, row)) for row in CameraPath.from_direction("Left", 5).rows)


def defaults(cls: type) -> dict:
    """What a graph sends when only widgets are filled in, at their defaults."""
    sections = cls.INPUT_TYPES().values()
    return {name: options["default"] for s in sections for name, (_, options) in s.items() if "default" in options}


def move(**changes) -> CameraPath:
    path, picture = MOVE().build(**{**defaults(MOVE), **changes})
    assert picture.shape == (1, 512, 512, 3)
    assert 0 <= picture.min() < picture.max() <= 1
    return path


@pytest.fixture
def inputs(tmp_path):
    host.configure(device="cpu", input_dir=tmp_path)
    yield tmp_path
    host.configure()


def test_moves_are_the_librarys():
    assert move() == CameraPath.from_direction("Left", 81)
    origin = [*DEFAULT_ORIGIN]
    origin[1] = 0.9
    chosen = {"direction": "In", "speed": 0.25, "num_frames": 9}
    assert move(**chosen, origin=str(origin)) == CameraPath.from_direction("In", 9, 0.25, origin)
    assert move(**chosen, mode="diffsynth") == CameraPath.from_direction("In", 9, 0.25, mode="diffsynth")


def test_moves_follow_each_other():
    first = move(num_frames=41)
    assert move(num_frames=41, direction="Up", previous=first) == first.then(CameraPath.from_direction("Up", 41))


def test_the_picture_shows_the_whole_journey():
    alone = MOVE().build("Up", 0.1, 9)[1]
    whole = MOVE().build("Up", 0.1, 9, previous=move(num_frames=9))[1]
    assert not torch.equal(alone, whole)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"direction": "CW", "mode": "diffsynth"}, "mode official"),
        ({"direction": "Sideways"}, "Sideways"),
        ({"direction": "Left", "origin": "1 2 3"}, "origin, line 1 has 3 numbers"),
    ],
)
def test_a_wrong_move_is_refused_before_the_prompt_starts(values, words):
    assert words in MOVE.VALIDATE_INPUTS(**values)


def test_values_that_other_nodes_give_are_checked_later():
    assert MOVE.VALIDATE_INPUTS(direction=None, mode=None, origin=None) is True
    assert MOVE.VALIDATE_INPUTS(**{name: defaults(MOVE)[name] for name in ("direction", "mode", "origin")}) is True
    assert ROWS.VALIDATE_INPUTS(poses=None, file="None") is True


def test_rows_from_text_and_from_a_file_are_the_same_path(inputs):
    (inputs / "mine.txt").write_text(f"header\n{POSES}\n", encoding="utf-8")
    assert ROWS.INPUT_TYPES()["optional"]["file"][0][:2] == ["None", "mine.txt"]
    pasted, _ = ROWS().build(poses=POSES)
    read, _ = ROWS().build(poses="", file="mine.txt")
    assert pasted == read == CameraPath.from_direction("Left", 5)
    assert ROWS.VALIDATE_INPUTS(poses="", file="mine.txt") is True
    then, _ = ROWS().build(poses=POSES, previous=pasted)
    assert then == pasted.then(pasted)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"poses": " ", "file": "None"}, "needs pose rows"),
        ({"poses": POSES, "file": "mine.txt"}, "not both"),
        ({"poses": "", "file": "gone.txt"}, "no input file 'gone.txt'"),
        ({"poses": "", "file": "wrong.txt"}, "wrong.txt, line 2 has 2 numbers"),
        ({"poses": "header\n1 2"}, "line 2 has 2 numbers"),
    ],
)
def test_wrong_rows_are_refused_before_the_prompt_starts(inputs, values, words):
    (inputs / "mine.txt").write_text(POSES, encoding="utf-8")
    (inputs / "wrong.txt").write_text("header\n1 2", encoding="utf-8")
    assert words in ROWS.VALIDATE_INPUTS(**values)
    with pytest.raises(ValueError, match=words):
        ROWS().build(**values)


def test_a_changed_pose_file_is_read_again(inputs):
    file = inputs / "mine.txt"
    file.write_text(POSES, encoding="utf-8")
    before = ROWS.IS_CHANGED(poses="", file="mine.txt")
    assert ROWS.IS_CHANGED(poses="", file="mine.txt") == before
    file.write_text(f"{POSES}\n{POSES}", encoding="utf-8")
    assert ROWS.IS_CHANGED(poses="", file="mine.txt") != before
    assert ROWS.IS_CHANGED(poses=POSES, file="None") == ROWS.IS_CHANGED(poses=POSES)
    assert "gone.txt" in ROWS.IS_CHANGED(poses="", file="gone.txt")


def test_encoding_gives_the_sampler_rays(caplog):
    caplog.set_level("INFO", "wancore")
    cond = Conditioning(text=torch.zeros(1, 4, 8), size=VideoSize(48, 32, 5))
    path = CameraPath.from_direction("Left", 5)
    (encoded,) = ENCODE().encode(cond, path, width=33, height=32, num_frames=5)
    assert encoded.camera.shape == (1, 24, 2, 32, 48)
    assert torch.equal(encoded.camera, camera_embedding(path, VideoSize(48, 32, 5)))
    assert encoded.inputs == ("camera",)
    assert encoded.size == VideoSize(48, 32, 5)
    assert cond.camera is None
    (alone,) = ENCODE().encode(replace(cond, size=None), path, width=48, height=32, num_frames=9)
    assert alone.size is None and alone.camera.shape == (1, 24, 3, 32, 48)
    assert "Stretching" in caplog.text


def test_the_tiny_forms_fit_together():
    length = MOVE.tiny({})["num_frames"]
    size = ENCODE.tiny({})
    assert length == size["num_frames"]
    (encoded,) = ENCODE().encode(Conditioning(), move(num_frames=length), **size)
    assert encoded.camera.shape == (1, 24, 5, 64, 96)


def test_input_files_without_comfyui(inputs, monkeypatch):
    (inputs / "mine.txt").write_text("x")
    assert places.input_file("mine.txt") == inputs / "mine.txt"
    assert places.input_file(str(inputs / "mine.txt")) == inputs / "mine.txt"
    monkeypatch.chdir(inputs)
    assert places.input_file("./mine.txt").read_text() == "x"
    for name in ("", "gone.txt", ".", "..", __file__, "~", "mine.txt\0", "\ud800"):
        with pytest.raises(ValueError, match="no input file"):
            places.input_file(name)


def test_input_files_in_comfyui_stay_in_its_folders(tmp_path, monkeypatch):
    for folder, name in (("input", "mine.txt"), ("output", "made.txt"), (".", "secret.txt")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text("x")

    class Annotated(Standalone):
        """Folders that a name may choose, as in ComfyUI."""

        def annotated(self, name: str) -> tuple[str, Path]:
            return (name[:-9], self.output_dir()) if name.endswith(" [output]") else (name, self.input_dir())

    folders = Annotated(input_dir=tmp_path / "input", output_dir=tmp_path / "output")
    monkeypatch.setattr(host, "current", folders)
    assert places.list_input_files((".txt",)) == ["mine.txt"]
    assert places.input_file("mine.txt") == tmp_path / "input" / "mine.txt"
    assert places.input_file("made.txt [output]").parent == tmp_path / "output"
    for name in ("../secret.txt", "../secret.txt [output]", str(tmp_path / "secret.txt"), "sub/../../secret.txt"):
        with pytest.raises(ValueError, match="no input file"):
            places.input_file(name)
