"""The drawn world, and the judge that reads it back from pixels."""

from dataclasses import replace

import numpy as np
import pytest

from wancore.trainer.data.judge import ATTRIBUTES, measure, overlap, psnr, score
from wancore.trainer.data.synthetic import CAMERAS, COLOURS, GROUNDS, MOTIONS, SHAPES, Scene

SIZE = (96, 64, 9)

SCENES = [
    Scene.random(seed, colour=colour, shape=shape, ground=ground, motion=motion)
    for seed, (colour, shape, ground, motion) in enumerate(
        (list(COLOURS)[i % 6], list(SHAPES)[i % 3], list(GROUNDS)[i // 2 % 4], list(MOTIONS)[(i + i // 8) % 8])
        for i in range(24)
    )
    if (shape, motion) != ("ball", "spins")
]
"""Every value of each attribute, in other company each time."""


def describe(scene: Scene) -> str:
    return f"{scene.colour} {scene.shape} {scene.motion} {scene.ground}"


@pytest.mark.parametrize("scene", SCENES, ids=describe)
def test_a_clip_is_read_as_it_was_drawn(scene):
    drawing = scene.drawn(*SIZE)
    reading = measure(drawing.video)
    assert {name: getattr(reading, name) for name in ATTRIBUTES} == {name: getattr(scene, name) for name in ATTRIBUTES}
    assert reading.camera == "None"
    if scene.motion not in ("spins", "still"):
        assert reading.speed == pytest.approx(scene.speed, abs=0.05)
    assert min(overlap(a, b) for a, b in zip(reading.masks, drawing.masks > 0.5, strict=True)) > 0.85
    assert reading.dot < 0.1


@pytest.mark.parametrize("camera", CAMERAS)
def test_the_cameras_motion_is_read_from_the_ground(camera):
    scene = Scene.random(3, camera=camera, motion="still", camera_speed=1 / 30)
    reading = measure(scene.drawn(*SIZE).video)
    assert (reading.camera, reading.motion) == (camera, "still")
    if camera == "Left":  # the lens of the default origin sees 1 / 0.532 of the distance; eight steps of a thirtieth
        assert reading.ground_travel[0] == pytest.approx(0.532 * 8 / 30, abs=0.01)


@pytest.mark.parametrize("size", [(64, 64, 5), (64, 96, 9), (160, 96, 17)], ids=str)
def test_a_scene_is_the_same_at_any_size_and_length(size):
    scenes = SCENES[:3]
    assert score([measure(scene.drawn(*size).video) for scene in scenes], scenes)["all"] == 1


REVERSED = {"right": "left", "left": "right", "up": "down", "down": "up", "grows": "shrinks", "shrinks": "grows"}


@pytest.mark.parametrize("motion", REVERSED)
def test_a_clip_that_runs_backwards_is_noticed(motion):
    scene = Scene.random(7, motion=motion)
    assert measure(scene.drawn(*SIZE).video[::-1]).motion == REVERSED[motion]


def test_exchanged_channels_and_an_empty_picture_are_noticed():
    scene = Scene.random(2, colour="red", ground="night")
    clip = scene.drawn(*SIZE).video
    assert measure(clip[..., ::-1]).colour == "blue"
    empty = measure(np.broadcast_to(clip[0, :4, :4].mean((0, 1)).astype(np.uint8), clip.shape))
    assert (empty.colour, empty.shape, empty.motion, empty.ground) == (None, None, None, "night")


def test_the_dot_is_a_style_that_changes_nothing_else():
    for seed in range(4):
        plain, dotted = (measure(Scene.random(seed, dotted=on).drawn(*SIZE).video) for on in (False, True))
        assert plain.dot < 0.1 and dotted.dot > 0.6
        assert [getattr(plain, name) for name in ATTRIBUTES] == [getattr(dotted, name) for name in ATTRIBUTES]


def test_controls_and_masks_belong_to_their_clip():
    scene = Scene.random(5, motion="right", shape="box")
    drawing = scene.drawn(*SIZE)
    inside = drawing.masks > 0.5
    assert psnr(drawing.masked[:, :8], drawing.video[:, :8]) > 60
    assert (drawing.masked[inside] == 127).all()
    assert not (drawing.mask_video[..., 0][~inside] > 127).all()
    outline = drawing.edges[..., 0] > 127
    wider, narrower = (replace(scene, radius=scene.radius * factor).drawn(*SIZE).masks > 0 for factor in (1.15, 0.85))
    assert outline.any() and not (outline & ~wider).any() and not (outline & narrower).any()
    assert drawing.depth[inside].min() > drawing.depth[drawing.masks == 0].max()


def test_a_fixed_attribute_leaves_the_others_as_they_are():
    assert replace(Scene.random(4), colour="red") == Scene.random(4, colour="red")
    assert len({Scene.random(seed) for seed in range(50)}) == 50


def test_captions_name_what_is_seen():
    words = {table[name] for table, name in ((SHAPES, "box"), (MOTIONS, "left"))}
    for seed in range(20):
        scene = Scene.random(seed, colour="red", shape="box", motion="left", camera="In" if seed % 2 else "None")
        english, chinese = scene.caption(seed), scene.caption(seed, "chinese")
        assert "red" in english and "红色的" in chinese
        for word in words:
            assert any(one in english for one in word.english) and any(one in chinese for one in word.chinese)
        assert ("camera" in english, "镜头" in chinese) == (seed % 2 == 1,) * 2
        assert not any(letter.isascii() for letter in chinese)
    assert len({Scene.random(1).caption(seed) for seed in range(30)}) > 8
