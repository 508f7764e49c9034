"""`python -m tools.films`, from the pack's folder: the animated picture at the top of the README, drawn by the bundled
models: what a prompt gives, and what another gives in the masked part of a clip.
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
PROMPTS = ("a red ball moves to the right over a green field", "a yellow box gets bigger over the blue sky")
CLIP = Scene(colour="white", shape="box", ground="sky", motion="grows", speed=0.6, radius=0.23)
"""The clip in which VACE draws the second prompt."""
SEED = 6
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
    film = family.film(family.pipe(), PROMPTS[:1], seed=SEED)[0]
    clip = drawn(CLIP)
    given = {"vace_video": pictures(clip.masked), "vace_video_mask": pictures(clip.mask_video)}
    edited = family.film(family.pipe("vace"), PROMPTS[1:], seed=SEED, **given)[0]
    shown = {f"“{PROMPTS[0]}”": film, "a clip with a mask": clip.masked, f"“{PROMPTS[1]}”": edited}
    return [panel(frames, title) for title, frames in shown.items()]


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
