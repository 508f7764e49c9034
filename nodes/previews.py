"""Previews as files, for runs that nobody watches in an editor."""

from pathlib import Path

from PIL import Image

MILLISECONDS_PER_FRAME = 250
"""A latent frame is four frames of a video at 16 per second."""


def write(pictures: list[Image.Image], folder: Path, step: int) -> None:
    """Write what the latent frames of a video show after `step` steps into `folder`, as two PNG files.

    `step_0010.png` is the frame in the middle, `step_0010_strip.png` an animation of all latent frames. A file of an
    earlier run is replaced; each appears all at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _save(pictures[len(pictures) // 2 :][:1], folder / f"step_{step:04}.png")
    _save(pictures, folder / f"step_{step:04}_strip.png")


def _save(pictures: list[Image.Image], path: Path) -> None:
    draft = path.with_name(f".{path.name}.part")
    try:
        first, *rest = pictures
        animated = {"save_all": True, "append_images": rest, "duration": MILLISECONDS_PER_FRAME} if rest else {}
        first.save(draft, format="PNG", **animated)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
