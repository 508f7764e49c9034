"""`python -m trainer.data.synthetic FOLDER`, from the pack's folder: a tiny data set for training every kind of model.

Coloured shapes move over coloured grounds; each row has a caption and all inputs that the table of `inputs` knows."""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

COLOURS = {"red": "#d23a2f", "blue": "#2f5fd2", "green": "#2fa84f", "yellow": "#e3c12b", "white": "#f2f2f2"}
GROUNDS = {"dark": "#20242c", "sand": "#cdb892", "grey": "#7d848f"}
SHAPES = ("ball", "box")
MOVES = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
CAMERAS = {"right": "Right", "left": "Left", "down": "Down", "up": "Up"}

COLUMNS = (
    "prompt",
    "video",
    "control_video",
    "reference_image",
    "vace_video",
    "vace_video_mask",
    "vace_reference_image",
    "motion_bucket_id",
    "camera_control_direction",
    "camera_control_speed",
)


def write_dataset(
    folder: str | Path, count: int = 4, width: int = 64, height: int = 48, num_frames: int = 17, fps: float = 16
) -> Path:
    """Write `count` rows into `folder`: metadata.csv and a folder of clips and pictures. Returns the metadata file.

    Raises:
        ValueError: `folder` holds metadata.csv already, or a size is too small to draw on.
    """
    from wan_core.media import save_video

    folder = Path(folder)
    metadata = folder / "metadata.csv"
    if metadata.exists():
        raise ValueError(f"{metadata} is there already; name another folder.")
    if count < 1 or min(width, height) < 16 or num_frames < 1:
        raise ValueError(
            f"A data set needs rows, sides of 16 and frames; got {count} of {width}x{height}x{num_frames}."
        )
    rows = []
    for index in range(count):
        scene = Scene(index, width, height, num_frames)
        name = f"media/{index:03d}"
        clips = {"video": scene.frame, "control_video": scene.edges, "vace_video": scene.masked}
        clips["vace_video_mask"] = scene.mask
        row = {"prompt": scene.caption, **scene.numbers}
        for column, draw in clips.items():
            row[column] = f"{name}_{column}.mp4"
            save_video([draw(i) for i in range(num_frames)], folder / row[column], fps=fps, quality=8)
        row["reference_image"] = row["vace_reference_image"] = f"{name}_reference.png"
        scene.reference().save(folder / row["reference_image"])
        rows.append(row)
    with metadata.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return metadata


class Scene:
    """One clip: a shape of one colour that moves over a ground, faster from row to row."""

    def __init__(self, index: int, width: int, height: int, num_frames: int) -> None:
        self.width, self.height, self.num_frames = width, height, num_frames
        self.colour, self.shape = [*COLOURS][index % len(COLOURS)], SHAPES[index % len(SHAPES)]
        self.ground, self.move = [*GROUNDS][index % len(GROUNDS)], [*MOVES][index % len(MOVES)]
        self.speed = (0.4, 0.7, 1.0)[index % 3]

    @property
    def caption(self) -> str:
        pace = "slowly" if self.speed < 0.5 else "fast" if self.speed == 1 else "steadily"
        return f"a {self.colour} {self.shape} moves {pace} {self.move} over a {self.ground} ground"

    @property
    def numbers(self) -> dict[str, str]:
        return {
            "motion_bucket_id": f"{100 * self.speed:g}",
            "camera_control_direction": CAMERAS[self.move],
            "camera_control_speed": f"{self.speed / 54:.5f}",
        }

    def box(self, frame: int) -> tuple[float, float, float, float]:
        """Where the shape is."""
        place = self.speed * (frame / max(1, self.num_frames - 1) - 0.5)
        side = min(self.width, self.height) / 4
        x = self.width * (0.5 + 0.6 * place * MOVES[self.move][0])
        y = self.height * (0.5 + 0.6 * place * MOVES[self.move][1])
        return x - side, y - side, x + side, y + side

    def frame(self, index: int) -> Image.Image:
        picture = Image.new("RGB", (self.width, self.height), GROUNDS[self.ground])
        self._draw(picture, self.box(index), COLOURS[self.colour])
        return picture

    def mask(self, index: int) -> Image.Image:
        """White where the shape is."""
        picture = Image.new("RGB", (self.width, self.height))
        self._draw(picture, self.box(index), "white")
        return picture

    def masked(self, index: int) -> Image.Image:
        """The frame with grey where the shape is."""
        grey = Image.new("RGB", (self.width, self.height), (127, 127, 127))
        return Image.composite(grey, self.frame(index), self.mask(index).convert("L"))

    def edges(self, index: int) -> Image.Image:
        """The shape's outline, white on black."""
        return self.mask(index).filter(ImageFilter.FIND_EDGES)

    def reference(self) -> Image.Image:
        """The shape on white, in a square."""
        picture = Image.new("RGB", (self.height, self.height), "white")
        margin = self.height // 5
        self._draw(picture, (margin, margin, self.height - margin, self.height - margin), COLOURS[self.colour])
        return picture

    def _draw(self, picture: Image.Image, box: tuple[float, float, float, float], colour: str) -> None:
        draw = ImageDraw.Draw(picture)
        (draw.ellipse if self.shape == "ball" else draw.rectangle)(box, fill=colour)


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
