"""Camera paths: the named moves, what rows and files may hold, and moves one after another."""

import math

import pytest
import torch

from wan_core.conditioning.camera import DEFAULT_SPEED, MODES, MOVES, CameraPath
from wan_core.conditioning.pose_rows import DEFAULT_ORIGIN, origin_from_text

S = DEFAULT_SPEED
TRANSLATIONS = {
    "None": (0, 0, 0),
    "Left": (S, 0, 0),
    "Right": (-S, 0, 0),
    "Up": (0, S, 0),
    "Down": (0, -S, 0),
    "LeftUp": (S, S, 0),
    "LeftDown": (S, -S, 0),
    "RightUp": (-S, S, 0),
    "RightDown": (-S, -S, 0),
    "In": (0, 0, -2 * S),
    "Out": (0, 0, 2 * S),
}
"""World-to-camera translation per frame in VideoX-Fun's trajectory files."""

move = CameraPath.from_direction


def close(path: CameraPath, other: CameraPath) -> bool:
    return torch.allclose(torch.tensor(path.rows), torch.tensor(other.rows), atol=1e-9)


def turned(axis: int, degrees: float, position=(0.0, 0.0, 0.0)) -> list[float]:
    """The pose row of a camera at `position`, turned about one of its axes."""
    angle = math.radians(degrees)
    pose = torch.eye(4, dtype=torch.float64)
    first, second = (axis + 1) % 3, (axis + 2) % 3
    pose[first, first] = pose[second, second] = math.cos(angle)
    pose[first, second], pose[second, first] = -math.sin(angle), math.sin(angle)
    pose[:3, 3] = torch.tensor(position)
    return [*DEFAULT_ORIGIN[:7], *torch.linalg.inv(pose)[:3].flatten().tolist()]


def test_every_published_direction_is_there():
    assert set(MOVES) == {*TRANSLATIONS, "CW", "ACW"}


@pytest.mark.parametrize("direction", TRANSLATIONS)
def test_a_move_adds_its_translation_every_frame_and_nothing_else(direction):
    path = move(direction, 81)
    assert path.num_frames == 81
    assert path.rows[0] == tuple(map(float, DEFAULT_ORIGIN))
    for frame, row in enumerate(path.rows):
        expected = [frame, *DEFAULT_ORIGIN[1:]]
        for column, step in zip((10, 14, 18), TRANSLATIONS[direction], strict=True):
            expected[column] = frame * step
        assert row == pytest.approx(expected, abs=1e-12)


def test_eighty_steps_go_as_far_as_the_authors_files():
    assert move("Left", 81).rows[-1][10] == pytest.approx(1.4814814814814814)


@pytest.mark.parametrize(("direction", "sign"), [("CW", 1), ("ACW", -1)])
def test_a_roll_turns_a_third_of_pi_in_81_frames(direction, sign):
    matrices = move(direction, 82).world_to_camera
    rotation = matrices[:, :3, :3]
    assert torch.allclose(rotation @ rotation.mT, torch.eye(3, dtype=torch.float64).expand(82, 3, 3))
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(82, dtype=torch.float64))
    assert matrices[:, :3, 3].abs().max() == 0
    angle = sign * math.pi / 3
    expected = [[math.cos(angle), math.sin(angle), 0], [-math.sin(angle), math.cos(angle), 0], [0, 0, 1]]
    assert torch.allclose(rotation[81], torch.tensor(expected, dtype=torch.float64))


def test_speed_scales_a_move_and_its_sign_turns_it_round():
    assert move("In", 5, 0.01).rows[-1][18] == pytest.approx(-0.08)
    assert close(move("Left", 5, -0.3), move("Right", 5, 0.3))
    assert close(move("CW", 5, -0.3), move("ACW", 5, 0.3))


def test_an_origin_gives_the_lens_and_the_first_pose_and_moves_stay_the_cameras_own():
    origin = turned(1, 40, (1.0, 2.0, 3.0))
    origin[1:5] = 0.7, 0.8, 0.4, 0.6
    path = move("LeftUp", 9, origin=origin)
    assert path.rows[0][1:] == pytest.approx(origin[1:])
    assert path.lens[-1, :4].tolist() == [0.7, 0.8, 0.4, 0.6]
    assert torch.allclose(path.poses, move("LeftUp", 9).poses)


@pytest.mark.parametrize(
    ("direction", "columns"),
    [
        ("Left", {9: 1}), ("Right", {9: -1}), ("Up", {13: 1}), ("Down", {13: -1}), ("RightUp", {9: -1, 13: 1}),
        ("In", {18: -1}), ("Out", {18: 1}),
    ],
)  # fmt: skip
def test_the_diffsynth_mode_changes_the_columns_that_diffsynth_changes(direction, columns):
    path = move(direction, 5, 0.1, mode="diffsynth")
    row = [4, *DEFAULT_ORIGIN[1:]]
    for column, sign in columns.items():
        row[column] += sign * 0.4
    assert path.rows[4] == pytest.approx(row)
    assert path.rows[4] != move(direction, 5, 0.1).rows[4]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"direction": "Sideways"}, "'Sideways'.*Left, Right"),
        ({"direction": "left"}, "'left'"),
        ({"direction": "Left", "mode": "wrong"}, "official, diffsynth"),
        ({"direction": "CW", "mode": "diffsynth"}, "mode official"),
        ({"direction": "Left", "num_frames": 0}, "num_frames"),
        ({"direction": "Left", "num_frames": 2.5}, "num_frames"),
        ({"direction": "Left", "speed": math.nan}, "speed"),
        ({"direction": "Left", "speed": "fast"}, "speed"),
        ({"direction": "Left", "origin": (0, 1, 1)}, "origin has 3 numbers"),
        ({"direction": "Left", "origin": [0, 0, *DEFAULT_ORIGIN[2:]]}, "origin.*focal"),
    ],
)
def test_a_wrong_move_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        move(**{"num_frames": 5, **arguments})


def test_left_and_then_up_goes_left_and_then_up():
    path = move("Left", 3, 0.5).then(move("Up", 3, 0.25))
    translations = [(row[10], row[14], row[18]) for row in path.rows]
    assert translations == [(0, 0, 0), (0.5, 0, 0), (1, 0, 0), (1, 0.25, 0), (1, 0.5, 0)]
    assert [row[0] for row in path.rows] == [0, 1, 2, 3, 4]


def test_a_move_after_a_roll_goes_along_the_rolled_axes():
    quarter = move("CW", 2, (math.pi / 2) / (2 * math.pi / 9))
    path = quarter.then(move("Right", 2, 1.0))
    # Rolled clockwise by a quarter, the camera's right is the world's down.
    assert torch.allclose(path.poses[-1, :3, 3], torch.tensor([0.0, 1, 0], dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("direction", [d for d in MOVES if "CW" not in d])
def test_two_half_moves_are_one_whole_move(direction, mode):
    half = move(direction, 41, mode=mode)
    assert close(half.then(half), move(direction, 81, mode=mode))


@pytest.mark.parametrize("direction", ["CW", "ACW"])
def test_two_half_rolls_are_one_whole_roll(direction):
    half = move(direction, 41)
    assert close(half.then(half), move(direction, 81))


def test_composition_is_associative_and_forgets_where_the_second_path_began():
    a, b, c = move("CW", 4), move("In", 5), move("LeftDown", 3, 0.1)
    assert close(a.then(b).then(c), a.then(b.then(c)))
    far = move("In", 5, origin=turned(0, 25, (3.0, -1.0, 2.0)))
    assert close(a.then(far), a.then(b))


def test_a_lens_belongs_to_its_part():
    zoomed = [*DEFAULT_ORIGIN]
    zoomed[1] = 0.9
    path = move("Left", 3).then(move("Left", 3, origin=zoomed))
    assert path.lens[:, 0].tolist() == [0.532139961] * 3 + [0.9] * 2


@pytest.mark.parametrize("direction", MOVES)
def test_resampling_keeps_an_even_motion_even(direction):
    longer = move(direction, 41).resampled(81)
    assert close(longer, move(direction, 81, DEFAULT_SPEED / 2))
    assert close(longer.resampled(41), move(direction, 41))


def test_resampling_a_sheared_path_keeps_its_shear():
    path = move("Left", 41, mode="diffsynth").resampled(81)
    assert path.sheared
    assert close(path, move("Left", 81, DEFAULT_SPEED / 2, mode="diffsynth"))


def test_resampling_turns_along_the_shorter_arc_at_even_pace():
    path = CameraPath.from_rows([turned(1, 170, (0.0, 0, 0)), turned(1, 190, (2.0, 0, 4))]).resampled(5)
    expected = [turned(1, 170 + 5 * k, (0.5 * k, 0.0, 1.0 * k)) for k in range(5)]
    assert close(path, CameraPath.from_rows([[k, *row[1:]] for k, row in enumerate(expected)]))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("degrees", [1e-7, 30, 179.9])
def test_halfway_of_any_turn_is_half_the_turn(axis, degrees):
    path = CameraPath.from_rows([turned(axis, 0), turned(axis, degrees)]).resampled(3)
    assert path.rows[1][7:] == pytest.approx(turned(axis, degrees / 2)[7:], abs=1e-9)


def test_the_ends_of_resampling():
    path = move("Left", 41)
    assert path.resampled(41) is path
    assert path.resampled(1).rows == path.rows[:1]
    still = move("Left", 1).resampled(9)
    assert still.num_frames == 9
    assert len({row[1:] for row in still.rows}) == 1
    with pytest.raises(ValueError, match="num_frames"):
        path.resampled(0)


def line(row) -> str:
    return " ".join(map(str, row))


GOOD = [line(row) for row in move("Left", 5).rows]
SHEARED = line(move("Left", 5, mode="diffsynth").rows[-1])
MIRRORED = line([*DEFAULT_ORIGIN[:7], -1, *DEFAULT_ORIGIN[8:]])


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(["https://www.youtube.com/watch?v=1", *GOOD]),
        "\n".join(["", *GOOD, ""]),
        "\n".join(GOOD),
        "\r\n".join(["header", *(row.replace(" ", ", ") for row in GOOD)]),
        "\n".join(f"({row.replace(' ', ', ')})," for row in GOOD),
        "\n" + "\n".join(row.split(" ", 1)[1] for row in GOOD),
    ],
    ids=["header", "blank header", "no header", "commas", "tuples", "18 numbers"],
)
def test_a_pose_file_is_read(tmp_path, text):
    file = tmp_path / "path.txt"
    file.write_text(text, encoding="utf-8", newline="")
    assert CameraPath.from_file(file) == move("Left", 5)
    assert CameraPath.from_text(text) == move("Left", 5)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "no pose rows"),
        (["header"], "no pose rows.*19 numbers"),
        (["header", GOOD[0], "1 2 3"], "line 3 has 3 numbers"),
        (["header", GOOD[0], GOOD[1] + " 1"], "line 3 has 20 numbers"),
        (["1 2 3", GOOD[0]], "line 1 has 3 numbers"),
        (["header", GOOD[0], "", GOOD[1].replace("0.532139961", "nan")], "line 4: column 2 is nan"),
        (["header", GOOD[0].replace("0.532139961", "inf")], "line 2: column 2 is inf"),
        (["header", GOOD[0], GOOD[1].replace("0.532139961", "half")], "line 3: column 2 is not a number: 'half'"),
        (["header", "header", GOOD[0]], "line 2"),
        (["header", GOOD[0].replace("0.532139961", "-0.5")], "line 2: the focal"),
        (["header", GOOD[0], SHEARED], "line 3.*rotation"),
        (["header", MIRRORED], "line 2.*mirrored"),
    ],
)
def test_what_is_wrong_in_a_pose_file_is_named_with_its_line(tmp_path, lines, words):
    file = tmp_path / "path.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"path\.txt.*{words}"):
        CameraPath.from_file(file)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.txt"):
        CameraPath.from_file(tmp_path / "gone.txt")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r"binary\.txt.*text"):
        CameraPath.from_file(tmp_path / "binary.txt")
    with (tmp_path / "long.txt").open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(ValueError, match=r"long\.txt.*1099511627776 bytes, and at most"):
        CameraPath.from_file(tmp_path / "long.txt")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "at least one"),
        ([DEFAULT_ORIGIN, DEFAULT_ORIGIN[:18]], "Row 2.*18 numbers"),
        ([DEFAULT_ORIGIN, [None, *DEFAULT_ORIGIN[1:]]], "Row 2.*column 1"),
        ([[10**400, *DEFAULT_ORIGIN[1:]]], "Row 1.*column 1"),
        ([DEFAULT_ORIGIN, [float("nan"), *DEFAULT_ORIGIN[1:]]], "Row 2.*finite"),
    ],
)
def test_wrong_rows_are_named(rows, words):
    with pytest.raises(ValueError, match=words):
        CameraPath.from_rows(rows)


def test_rounded_rotations_are_taken_as_they_are():
    rows = [[round(v, 2) for v in turned(1, 45)]]
    assert CameraPath.from_rows(torch.tensor(rows, dtype=torch.float64)).rows[0] == tuple(rows[0])


def test_an_origin_as_text():
    assert origin_from_text(" ") == DEFAULT_ORIGIN
    assert origin_from_text(str(DEFAULT_ORIGIN)) == DEFAULT_ORIGIN
    with pytest.raises(ValueError, match="one pose row; got 2"):
        origin_from_text("\n".join(GOOD[:2]))
    with pytest.raises(ValueError, match="origin, line 1 has 2 numbers"):
        origin_from_text("0 1")
