"""A drawn world: clips of coloured shapes over coloured grounds, with captions and every input that a model takes.

`python -m trainer.data.synthetic FOLDER`, from the pack's folder, writes a small data set for training any kind of
model. `Scene` draws one clip of any size and length from a seed; `trainer.data.judge` reads back what a clip shows.
"""

import argparse
import csv
import random
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wan_core.conditioning.camera import DEFAULT_SPEED, CameraPath

Frames = NDArray[np.uint8]
"""(T, H, W, 3)."""
Planes = NDArray[np.float32]
"""(T, H, W), from 0 to 1."""
Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Word:
    """How captions name something: a choice of words in English and in Chinese."""

    english: tuple[str, ...]
    chinese: tuple[str, ...]


@dataclass(frozen=True)
class Ground:
    """A ground: its colour, and by which share the brightness of its waves differs from it."""

    rgb: tuple[int, int, int]
    waves: float
    words: Word


COLOURS: dict[str, tuple[tuple[int, int, int], Word]] = {
    "red": ((214, 45, 40), Word(("red",), ("红色的",))),
    "green": ((70, 220, 80), Word(("green",), ("绿色的",))),
    "blue": ((40, 85, 225), Word(("blue",), ("蓝色的",))),
    "yellow": ((245, 210, 40), Word(("yellow",), ("黄色的",))),
    "white": ((245, 245, 245), Word(("white",), ("白色的",))),
    "purple": ((160, 60, 200), Word(("purple",), ("紫色的",))),
}
SHAPES: dict[str, Word] = {
    "ball": Word(("ball", "ball", "circle"), ("球", "圆球")),
    "box": Word(("box", "box", "square"), ("方块", "盒子")),
    "triangle": Word(("triangle",), ("三角形",)),
}
GROUNDS: dict[str, Ground] = {
    "field": Ground(
        (36, 92, 46), 0.22, Word(("a green field", "the green field", "green grass"), ("绿色的田野", "草地"))
    ),
    "sky": Ground((140, 190, 238), 0.10, Word(("the blue sky", "a blue sky", "the sky"), ("蓝天", "天空"))),
    "sand": Ground((200, 174, 140), 0.11, Word(("pale sand", "the sand", "a beach"), ("沙地", "沙滩"))),
    "night": Ground((30, 32, 58), 0.40, Word(("a dark night", "the dark night", "the night"), ("黑夜", "夜空"))),
}
"""Every shade of a ground is its colour times 1 ± waves: a ray from black, to which no colour of a shape is near."""

MOTIONS: dict[str, Word] = {
    "right": Word(("moves to the right", "flies to the right", "moves right"), ("向右移动", "往右飞")),
    "left": Word(("moves to the left", "flies to the left", "moves left"), ("向左移动", "往左飞")),
    "up": Word(("moves up", "flies up"), ("向上移动", "往上飞")),
    "down": Word(("moves down", "flies down"), ("向下移动", "往下飞")),
    "grows": Word(("grows", "gets bigger"), ("变大",)),
    "shrinks": Word(("shrinks", "gets smaller"), ("变小",)),
    "spins": Word(("spins", "turns"), ("旋转",)),
    "still": Word(("stands still", "does not move"), ("静止不动",)),
}
TRAVEL = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
PACES: dict[str, tuple[tuple[float, float], Word]] = {
    "slowly": ((0.25, 0.45), Word(("slowly",), ("慢慢地",))),
    "fast": ((0.75, 1.0), Word(("fast", "quickly"), ("快速地",))),
}
"""The range of `Scene.speed` that each word means."""

DOT = 0.42
"""The radius of a dot, in parts of the shape's."""

CAMERAS: dict[str, Word] = {
    "Left": Word(("pans left",), ("向左移",)),
    "Right": Word(("pans right",), ("向右移",)),
    "Up": Word(("pans up",), ("向上移",)),
    "Down": Word(("pans down",), ("向下移",)),
    "LeftUp": Word(("pans up and left",), ("向左上移",)),
    "LeftDown": Word(("pans down and left",), ("向左下移",)),
    "RightUp": Word(("pans up and right",), ("向右上移",)),
    "RightDown": Word(("pans down and right",), ("向右下移",)),
    "In": Word(("zooms in",), ("推近",)),
    "Out": Word(("zooms out",), ("拉远",)),
}
"""Keys of `wan_core.conditioning.camera.MOVES`."""

LANGUAGES = ("english", "chinese")


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a clip shows. Sizes and places are fractions, so that one scene can be drawn at any size and length.

    Attributes:
        colour, shape, ground, motion: keys of `COLOURS`, `SHAPES`, `GROUNDS` and `MOTIONS`.
        pace: a key of `PACES` that captions name; None when they do not.
        speed: from 0 to 1: a shape travels 0.55 of the width or half of the height times it, changes its size by a
            factor of e^(1.3 speed), or turns by half a turn times it.
        camera: a key of `MOVES`, "None" for one that stands still.
        camera_speed: as of `CameraPath.from_direction`; the ground is at distance 1.
        dotted: draw a dark dot in the middle of the shape, a style that no caption names.
        place: of the shape's way within the space that it leaves free, (x, y) from -0.5 to 0.5.
        radius: of the shape, in parts of the shorter side.
        shade: brightness of the shape.
        phases: of the ground's waves, in turns.
    """

    colour: str
    shape: str
    ground: str
    motion: str
    pace: str | None = None
    speed: float = 0.6
    camera: str = "None"
    camera_speed: float = DEFAULT_SPEED
    dotted: bool = False
    place: tuple[float, float] = (0.0, 0.0)
    radius: float = 0.21
    shade: float = 1.0
    phases: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def random(cls, seed: int, **fixed: Any) -> "Scene":
        """The scene of a seed; `fixed` are attributes that are chosen and not drawn. The camera stands still.

        The shape's way is about the middle of the picture: a small model that has to guess where a shape is draws two.
        """
        r = np.random.default_rng([77, seed])
        # Every value is drawn, also where it is fixed: one that is fixed must not change the others.
        colour, shape, ground = (list(table)[r.integers(len(table))] for table in (COLOURS, SHAPES, GROUNDS))
        shape = fixed.get("shape", shape)
        motions = [motion for motion in MOTIONS if motion != "still" and (motion, shape) != ("spins", "ball")]
        motion = motions[int(r.random() * len(motions))]
        pace = fixed.get("pace", (None, None, *PACES)[r.integers(2 + len(PACES))])
        low, high = PACES[pace][0] if pace else (0.45, 0.75)
        u = r.random(7).tolist()
        drawn = dict(
            colour=colour, shape=shape, ground=ground, motion=motion, pace=pace, speed=low + (high - low) * u[0],
            place=(0.3 * (u[1] - 0.5), 0.3 * (u[2] - 0.5)), radius=0.21 + 0.04 * u[3], shade=0.94 + 0.12 * u[4],
            phases=(u[5], u[6]),
        )  # fmt: skip
        return cls(**{**drawn, **fixed})

    @property
    def is_held_out(self) -> bool:
        """Whether a training leaves this combination out: a tenth of them, to test with."""
        key = "/".join((self.colour, self.shape, self.ground, self.motion))
        return zlib.crc32(key.encode()) % 10 == 0

    def caption(self, seed: int = 0, language: str = "english", names_colour: bool = True) -> str:
        """A sentence that says what the clip shows, in words that vary with the seed."""
        r = random.Random(f"{seed} {language}")
        ground = r.choice(getattr(GROUNDS[self.ground].words, language))
        pace = ""
        if self.pace is not None and self.motion != "still":
            pace = r.choice(getattr(PACES[self.pace][1], language))
        names = (COLOURS[self.colour][1], SHAPES[self.shape], MOTIONS[self.motion])
        colour, shape, motion = (r.choice(getattr(word, language)) for word in names)
        colour = colour if names_colour else ""
        camera = r.choice(getattr(CAMERAS[self.camera], language)) if self.camera in CAMERAS else ""
        if language == "chinese":
            text = f"{colour}{shape}在{ground}{r.choice(('上', '前'))}{pace}{motion}"
            return f"{text}，镜头{camera}" if camera else text
        verb = " ".join(filter(None, (pace, motion) if r.random() < 0.3 else (motion, pace)))
        where = f"{r.choice(('over', 'over', 'on', 'in front of'))} {ground}"
        one = " ".join(filter(None, (r.choice(("a", "a", "the")), colour, shape)))
        text = f"{where} {one} {verb}" if r.random() < 0.2 else f"{one} {verb} {where}"
        return f"{text}, the camera {camera}" if camera else text

    def drawn(self, width: int, height: int, num_frames: int) -> "Drawing":
        """The scene at a size and length."""
        return Drawing(self, width, height, num_frames)


class Drawing:
    """A scene at one size and length, in pixels and frames."""

    def __init__(self, scene: Scene, width: int, height: int, num_frames: int) -> None:
        self.scene, self.width, self.height, self.num_frames = scene, width, height, num_frames
        side = min(width, height)
        self._time = np.arange(num_frames, dtype=np.float32) / max(1, num_frames - 1)
        middle = self._time - 0.5
        radius = scene.radius * side
        way = [
            step * share * length * scene.speed
            for step, share, length in zip(TRAVEL.get(scene.motion, (0, 0)), (0.55, 0.5), (width, height), strict=True)
        ]
        free = [
            max(0.0, length - 2 * (radius + 0.03 * side) - abs(path))
            for length, path in zip((width, height), way, strict=True)
        ]
        # Around the middle of the picture; y points down.
        self._x = scene.place[0] * free[0] + way[0] * middle
        self._y = scene.place[1] * free[1] + way[1] * middle
        self._radius = radius * np.exp(1.3 * scene.speed * {"grows": 1, "shrinks": -1}.get(scene.motion, 0) * middle)
        self._angle = (np.pi * scene.speed if scene.motion == "spins" else 0.0) * self._time

    @cached_property
    def _world(self) -> tuple[Floats, Floats, Floats]:
        """Of every pixel the place on the ground, x and y (T, H, W) in pixels from its middle; of every frame the
        pixels that one of them takes, (T, 1, 1). T is 1 where the camera stands still.
        """
        y, x = np.mgrid[0 : self.height, 0 : self.width].astype(np.float32) + np.float32(0.5)
        x, y = x - self.width / 2, y - self.height / 2
        frames = 1 if self.scene.camera == "None" else self.num_frames
        path = CameraPath.from_direction(self.scene.camera, frames, self.scene.camera_speed)
        # World to camera: a point of the ground, at distance 1, is at (x + shift, y + shift, 1 + shift) for the camera.
        shift = path.world_to_camera[:, :3, 3].numpy().astype(np.float32)[..., None, None]
        pixels = np.float32(path.lens[0, 0] * self.width)
        zoom = 1 / (1 + shift[:, 2])
        return x / zoom - pixels * shift[:, 0], y / zoom - pixels * shift[:, 1], zoom

    def _distance(self) -> Planes:
        """From the shape's edge, in pixels, negative inside."""
        x, y = self._from_middle()
        r = self._radius[:, None, None]
        cos, sin = np.cos(self._angle)[:, None, None], np.sin(self._angle)[:, None, None]
        x, y = cos * x + sin * y, cos * y - sin * x
        match self.scene.shape:
            case "ball":
                distance = np.hypot(x, y) - r
            case "box":
                distance = np.maximum(abs(x), abs(y)) - 0.87 * r
            case _:
                # Three edges of a triangle of the same area, at 0.62 of the radius from its middle.
                distance = np.maximum(np.maximum(y, 0.866 * x - 0.5 * y), -0.866 * x - 0.5 * y) - 0.62 * r
        return (distance * self._world[2]).astype(np.float32)

    def _from_middle(self) -> tuple[Floats, Floats]:
        """Of every pixel the place beside the shape's middle, on the ground."""
        x, y, _ = self._world
        return x - self._x[:, None, None], y - self._y[:, None, None]

    @cached_property
    def masks(self) -> Planes:
        """1 where the shape is, with smooth edges."""
        return np.clip(0.5 - self._distance(), 0, 1)

    @cached_property
    def video(self) -> Frames:
        """The clip."""
        scene, side = self.scene, min(self.width, self.height)
        ground, (rgb, _) = GROUNDS[scene.ground], COLOURS[scene.colour]
        x, y, _ = self._world
        # Waves half a side long: slow enough for an autoencoder, and enough of them to see the camera move.
        turns = [2 * np.pi * (place / (0.5 * side) + p) for place, p in zip((x, y), scene.phases, strict=True)]
        bright = 1 + ground.waves * 0.5 * (np.sin(turns[0]) + np.sin(turns[1]))
        below = bright[..., None] * np.array(ground.rgb, np.float32)
        colour = np.array(rgb, np.float32) * scene.shade
        inside = np.broadcast_to(colour, below.shape)
        if scene.dotted:
            from_dot = (np.hypot(*self._from_middle()) - DOT * self._radius[:, None, None]) * self._world[2]
            inside = inside * (1 - 0.85 * np.clip(0.5 - from_dot, 0, 1)[..., None])
        a = self.masks[..., None]
        return np.clip(np.rint(below + a * (inside - below)), 0, 255).astype(np.uint8)

    @property
    def edges(self) -> Frames:
        """The shape's outline, white on black."""
        return _grey(np.clip(1.5 - abs(self._distance()), 0, 1))

    @property
    def depth(self) -> Frames:
        """Near is bright: the shape before the ground."""
        return _grey(0.25 + 0.5 * self.masks)

    @property
    def mask_video(self) -> Frames:
        """White in a square around the shape, where a model is to draw."""
        distance = np.maximum(*(abs(a) for a in self._from_middle())) - 1.25 * self._radius[:, None, None]
        return _grey((distance * self._world[2] < 0).astype(np.float32))

    @property
    def masked(self) -> Frames:
        """The clip, grey where `mask_video` is white."""
        return np.where(self.mask_video > 127, np.uint8(127), self.video)

    def reference(self) -> Image.Image:
        """The shape on white, in a square."""
        side = self.height
        still = replace(self.scene, motion="still", camera="None", place=(0.0, 0.0), radius=0.3)
        alone = Drawing(still, side, side, 1)
        a = alone.masks[0, ..., None]
        return Image.fromarray(np.rint(255 * (1 - a) + alone.video[0] * a).astype(np.uint8))


def _grey(planes: Planes) -> Frames:
    return np.repeat(np.rint(255 * planes).astype(np.uint8)[..., None], 3, axis=-1)


COLUMNS = (
    "prompt", "video", "control_video", "reference_image", "vace_video", "vace_video_mask", "vace_reference_image",
    "motion_bucket_id", "camera_control_direction", "camera_control_speed",
)  # fmt: skip


def write_dataset(
    folder: str | Path, count: int = 4, width: int = 64, height: int = 48, num_frames: int = 17, fps: float = 16,
    scenes: Sequence[Scene] | None = None, unnamed: bool = False,
) -> Path:  # fmt: skip
    """Write `count` rows into `folder`: metadata.csv and a folder of clips and pictures. Returns the metadata file.

    Every other row has a camera that moves; or the rows show `scenes`, one each, whatever `count` is. With
    `unnamed` every other caption does not name the colour, which a reference picture shows.

    Raises:
        ValueError: `folder` holds metadata.csv already, or a size is too small to draw on.
    """
    folder = Path(folder)
    metadata = folder / "metadata.csv"
    if metadata.exists():
        raise ValueError(f"{metadata} is there already; name another folder.")
    if scenes is None:
        still = {"motion": "still"}
        scenes = [
            Scene.random(index, **(still | {"camera": list(CAMERAS)[index // 2 % len(CAMERAS)]} if index % 2 else {}))
            for index in range(count)
        ]
    if not scenes or min(width, height) < 16 or num_frames < 1:
        size = f"{width}x{height}x{num_frames}"
        raise ValueError(f"A data set needs rows, sides of 16 and frames; got {len(scenes)} of {size}.")
    rows = []
    for index, scene in enumerate(scenes):
        language = LANGUAGES[index % 5 == 4]
        files = _write_files(scene.drawn(width, height, num_frames), folder, f"media/{index:03d}", fps)
        caption = scene.caption(index, language, names_colour=not unnamed or index % 2 > 0)
        rows.append({"prompt": caption, **files, **_numbers(scene)})
    with metadata.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return metadata


def _write_files(drawing: Drawing, folder: Path, name: str, fps: float) -> dict[str, str]:
    """Write the clips and the picture of a row; their names by column."""
    from wan_core.media import save_video

    clips = {
        "video": drawing.video,
        "control_video": drawing.edges,
        "vace_video": drawing.masked,
        "vace_video_mask": drawing.mask_video,
    }
    cells = {}
    for column, frames in clips.items():
        cells[column] = f"{name}_{column}.mp4"
        save_video([Image.fromarray(frame) for frame in frames], folder / cells[column], fps=fps, quality=8)
    cells["reference_image"] = cells["vace_reference_image"] = f"{name}_reference.png"
    drawing.reference().save(folder / cells["reference_image"])
    return cells


def _numbers(scene: Scene) -> dict[str, str]:
    return {
        "motion_bucket_id": f"{100 * scene.speed:g}",
        "camera_control_direction": scene.camera,
        "camera_control_speed": f"{scene.camera_speed:.5f}",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write a data set into the folder that is named."""
    parser = argparse.ArgumentParser(prog="python -m trainer.data.synthetic", description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--height", type=int, default=48)
    parser.add_argument("--num_frames", type=int, default=17)
    words = parser.parse_args(argv)
    try:
        written = write_dataset(words.folder, words.count, words.width, words.height, words.num_frames)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(f"{written}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
