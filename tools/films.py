"""`python -m tools.films`, from the pack's folder: the animated picture at the top of the README, drawn by the bundled
models: what a prompt gives, and what the same prompt gives with a control clip.
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pack import ROOT
from tools.family.judge import Family, drawn, pictures
from wan_core.catalog import TINY_PRESET
from wancore.trainer.data.synthetic import Frames, Scene

FILE = ROOT / "docs" / "images" / "films.gif"
PROMPTS = ("a red ball moves to the right over a green field", "a yellow triangle gets bigger over the blue sky")
CONTROL = Scene(colour="red", shape="ball", ground="field", motion="up", speed=0.9, radius=0.2)
"""What the control clip shows: another way of the shape than that of the prompt."""
SEED = 0
SCALE, BAND = 3, 36


def panel(frames: Frames, title: str) -> list[Image.Image]:
    """A film, enlarged, under a line of text."""
    height, width = (SCALE * side for side in frames.shape[1:3])
    font = ImageFont.load_default(size=13)
    made = []
    for frame in frames:
        whole = Image.new("RGB", (width, height + BAND), (29, 37, 51))
        whole.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS), (0, BAND))
        ImageDraw.Draw(whole).text((width // 2, BAND // 2), title, "white", font, anchor="mm")
        made.append(whole)
    return made


def panels(family: Family) -> list[list[Image.Image]]:
    """The films side by side."""
    found = [panel(family.film(family.pipe(), [text], seed=SEED)[0], f"“{text}”") for text in PROMPTS]
    if family.has("dit_fun_v1_1_control"):
        edges = drawn(CONTROL).edges
        given = {"control_video": pictures(edges), "seed": SEED}
        film = family.film(family.pipe("fun_v1_1_control"), PROMPTS[:1], **given)[0]
        found[1:] = [panel(edges, "a control clip"), panel(film, "the same prompt with the control clip")]
    return found


def main() -> None:
    """Write `FILE`."""
    with tempfile.TemporaryDirectory() as place:
        rows = panels(Family(Path(place)))
    wide = [Image.fromarray(np.concatenate([np.asarray(one) for one in row], 1)) for row in zip(*rows, strict=True)]
    # Few colours and no dither: a tenth of the bytes.
    joined = [one.quantize(48, dither=Image.Dither.NONE) for one in wide]
    length = round(1000 / TINY_PRESET.fps)
    durations = [*[length] * (len(joined) - 1), 600]
    joined[0].save(FILE, save_all=True, append_images=joined[1:], duration=durations, loop=0, optimize=True)


if __name__ == "__main__":
    main()
