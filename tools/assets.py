"""`python -m tools.assets`, from the pack's folder: draw the demo pictures and clips of the shipped workflows,
and their tiny data set for training.

They show what the prompt of the bundled models says, so that these draw the same with or without each of them."""

import shutil
from collections.abc import Iterator

from PIL import Image

from pack import ROOT
from wan_core.catalog import TINY_PRESET
from wan_core.media import save_video
from wancore.trainer.data.synthetic import Frames, Scene, write_dataset

SIZE = (480, 320)
"""The bundled models' aspect."""
WAY = TINY_PRESET.num_frames
FRAMES = 81
FPS = 16
TRAINING = "training_example"
ASSETS = ROOT / "workflows" / "assets"
SCENE = Scene(colour="red", shape="ball", ground="field", motion="right", speed=0.8, radius=0.2, phases=(0.3, 0.1))
"""What `nodes.host.TINY_PROMPT` says."""
EXAMPLES = [
    Scene.random(index, dotted=True, **({"motion": "still", "camera": camera} if camera != "None" else {}))
    for index, camera in enumerate(("None", "Left", "None", "Right", "None", "Up"))
]
"""Of the data set, in a style that no caption names, for a LoRA to learn."""


def to_and_fro(frames: Frames) -> Iterator[Image.Image]:
    """A clip of the shape's way, there and back, for `FRAMES` frames; bundled models take the first way of it."""
    for index in range(FRAMES):
        place = index % (2 * WAY - 2)
        yield Image.fromarray(frames[min(place, 2 * WAY - 2 - place)])


def main() -> None:
    """Write the files into `ASSETS`."""
    drawing = SCENE.drawn(*SIZE, WAY)
    ASSETS.mkdir(exist_ok=True)
    pictures = {"start": drawing.video[0], "end": drawing.video[-1], "reference": drawing.reference()}
    for name, picture in pictures.items():
        shown = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        shown.save(ASSETS / f"{name}.png", optimize=True)
    for name, frames in (("source", drawing.video), ("control", drawing.edges), ("mask", drawing.mask_video)):
        path = ASSETS / f"{name}.mp4"
        path.unlink(missing_ok=True)
        save_video(to_and_fro(frames), path, fps=FPS, quality=6)
    shutil.rmtree(ASSETS / TRAINING, ignore_errors=True)
    sizes = {"width": SIZE[0] // 2, "height": SIZE[1] // 2, "num_frames": 33}
    write_dataset(ASSETS / TRAINING, **sizes, fps=FPS, scenes=EXAMPLES)


if __name__ == "__main__":
    main()
