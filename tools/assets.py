"""`python -m tools.assets`, from the pack's folder: draw the demo pictures and clips of the shipped workflows,
and their tiny data set for training.

A red ball rolls over hills. Small and simple on purpose: each workflow runs as it is, and its reader puts in something
better."""

import shutil

from PIL import Image, ImageDraw, ImageFilter

from pack import ROOT
from wan_core.media import save_video
from wancore.trainer.data.synthetic import write_dataset

SIZE = (416, 240)
FRAMES = 33
FPS = 16
TRAINING = "training_example"
ASSETS = ROOT / "workflows" / "assets"


def landscape() -> Image.Image:
    """Hills under a sky that is lighter towards the horizon."""
    width, height = SIZE
    picture = Image.new("RGB", SIZE)
    draw = ImageDraw.Draw(picture)
    for y in range(height):
        shade = y / height
        draw.line((0, y, width, y), fill=(int(90 + 110 * shade), int(150 + 80 * shade), 235))
    for left, top, right, colour in ((-80, 120, 260, (96, 158, 84)), (120, 140, 520, (74, 134, 70))):
        draw.ellipse((left, top, right, top + 260), fill=colour)
    draw.rectangle((0, 190, width, height), fill=(58, 112, 58))
    return picture


def ball_box(frame: int) -> tuple[int, int, int, int]:
    """Where the ball is: from the left to the right, with a bounce."""
    place = frame / (FRAMES - 1)
    x, y = 50 + place * 316, 170 - 60 * abs(1 - 2 * ((2 * place) % 1)) * (1 - place)
    return int(x - 28), int(y - 28), int(x + 28), int(y + 28)


def scene(frame: int) -> Image.Image:
    """One frame of the source clip."""
    picture = landscape()
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = ball_box(frame)
    draw.ellipse((left, top, right, bottom), fill=(206, 46, 40))
    draw.ellipse((left + 12, top + 8, left + 26, top + 20), fill=(244, 150, 140))
    return picture


def edges(frame: int) -> Image.Image:
    """One frame of the control clip: the outlines of the scene, white on black."""
    outlines = scene(frame).convert("L").filter(ImageFilter.FIND_EDGES).point(lambda v: 255 if v > 24 else 0)
    return outlines.crop((1, 1, SIZE[0] - 1, SIZE[1] - 1)).resize(SIZE).convert("RGB")


def mask(frame: int) -> Image.Image:
    """One frame of the mask clip: white where the ball is."""
    picture = Image.new("RGB", SIZE)
    left, top, right, bottom = ball_box(frame)
    ImageDraw.Draw(picture).ellipse((left - 14, top - 14, right + 14, bottom + 14), fill="white")
    return picture


def reference() -> Image.Image:
    """A golden sphere on white."""
    picture = Image.new("RGB", (200, 200), "white")
    draw = ImageDraw.Draw(picture)
    for i in range(70, 0, -1):
        shade = 1 - i / 70
        draw.ellipse((100 - i, 100 - i, 100 + i, 100 + i), fill=(int(150 + 105 * shade), int(110 + 110 * shade), 40))
    return picture


def main() -> None:
    ASSETS.mkdir(exist_ok=True)
    for name, picture in (("start", scene(0)), ("end", scene(FRAMES - 1)), ("reference", reference())):
        picture.save(ASSETS / f"{name}.png", optimize=True)
    for name, draw in (("source", scene), ("control", edges), ("mask", mask)):
        path = ASSETS / f"{name}.mp4"
        path.unlink(missing_ok=True)
        save_video([draw(i) for i in range(FRAMES)], path, fps=FPS, quality=6)
    shutil.rmtree(ASSETS / TRAINING, ignore_errors=True)
    write_dataset(ASSETS / TRAINING, count=4, width=SIZE[0] // 2, height=SIZE[1] // 2, num_frames=FRAMES, fps=FPS)


if __name__ == "__main__":
    main()
