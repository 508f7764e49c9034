"""The check of a data set by itself: its report, and one picture of what is in it.

`python -m trainer.check`, or `python <pack>/trainer/check.py` from any folder, takes the flags of `trainer.train`.
"""

import sys
from pathlib import Path
from runpy import run_path

if __name__ == "__main__":  # before the imports below, which need the names of the pack's packages
    run_path(str(Path(__file__).resolve().parents[1] / "pack.py"))["run_file"](__file__)

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from PIL import Image, ImageDraw, ImageFont, ImageOps

from wan_core.media import Clip, MediaError
from wan_core.models.config import DEFAULT_GEOMETRY, Geometry
from wan_core.runtime import default_device, free_bytes

from .config import TrainConfig, parse
from .data import dataset, report
from .data.clips import frames_at_rate, read
from .data.report import Row
from .model import load, trainable
from .run.estimate import Estimator
from .run.events import Events
from .run.output import with_recorded_data

REPORT, CONTACT_SHEET, EVENTS = "report.txt", "contact_sheet.png", "events.jsonl"
BAD_DATA = 2

THUMB = (176, 132)
GAP, LINE = 8, 18
SHOWN = 24
"""Rows in the picture."""
COLUMNS = 2


def contact_sheet(rows: Sequence[Row], config: TrainConfig) -> Image.Image:
    """The first rows: first and last frame of each clip as it is trained, the first frames of its inputs, and its
    caption.
    """
    shown = [(row, list(_pictures(row, config))) for row in rows[:SHOWN]]
    widest = max((len(pictures) for _, pictures in shown), default=1)
    columns = COLUMNS if widest <= 3 and len(shown) > 1 else 1
    cell = (widest * (THUMB[0] + GAP) + GAP, THUMB[1] + LINE + 2 * GAP)
    lines = -(-len(shown) // columns) or 1
    sheet = Image.new("RGB", (columns * cell[0], lines * cell[1]), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for index, (row, pictures) in enumerate(shown):
        left, top = index % columns * cell[0] + GAP, index // columns * cell[1] + GAP
        for place, picture in enumerate(pictures):
            sheet.paste(ImageOps.pad(picture, THUMB, color="#dddddd"), (left + place * (THUMB[0] + GAP), top))
        text = f"{row.sample.position + 1}: {row.sample.captions[0]}"
        while draw.textlength(text, font) > cell[0] - 2 * GAP:
            text = f"{text.removesuffix('...')[:-4]}..."
        draw.text((left, top + THUMB[1] + 2), text, fill="black", font=font)
    return sheet


def _pictures(row: Row, config: TrainConfig) -> Iterator[Image.Image]:
    places = [frames_at_rate(row.target, config.fps)[place] for place in row.places(config)]
    yield from _frames(row.target, sorted({places[0], places[-1]}), row)
    for clips in row.clips.values():
        for clip in clips:
            first = frames_at_rate(clip, config.fps)
            yield from _frames(clip, [first[min(row.places(config)[0], len(first) - 1)]], row)


def _frames(clip: Clip, places: Sequence[int], row: Row) -> Iterator[Image.Image]:
    size = (row.size.width, row.size.height) if clip.fps is not None or clip is row.target else (None, None)
    try:
        for frame in read(clip, places, *size):
            yield Image.fromarray(frame.mul(255).round().byte().numpy())
    except MediaError:
        yield Image.new("RGB", THUMB, "#b03030")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 when the data can be trained, 2 when not or when it cannot be read."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(
        prog="python -m trainer.check",
        description="Check a data set for the flags of trainer.train that follow.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, help=f"folder for {REPORT} and {CONTACT_SHEET}")
    arguments, words = parser.parse_known_args(argv)
    try:
        config = with_recorded_data(parse(words))
        models = _models(config)
        found = _check(config, arguments.out, DEFAULT_GEOMETRY if isinstance(models, str) else models.config.geometry)
        found.require(config.on_bad_sample)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return BAD_DATA
    sys.stdout.write(f"{found}\n{models if isinstance(models, str) else _memory(config, models, found.rows)}\n")
    return 0


NOT_COUNTED = "What training takes was not counted"


def _models(config: TrainConfig) -> load.FoundModels | str:
    """The models of the run, where they are on this machine; else why what training takes is not counted."""
    if not config.model_paths and not config.model_id_with_origin_paths:
        return "Name the model to see what training takes."
    try:
        return load.find(replace(config, skip_download=True))
    except ValueError as error:
        return f"{NOT_COUNTED}: {error}"


def _memory(config: TrainConfig, models: load.FoundModels, rows: Sequence[Row]) -> str:
    """What a run on `rows` takes."""
    try:
        trainables = trainable.prepare(models.sized(config), config)
        estimator = Estimator(trainables, (row.latent_shape for row in rows))
        return estimator.verdict(config, free_bytes(default_device()))[0]
    except ValueError as error:
        return f"{NOT_COUNTED}: {error}"


def _check(config: TrainConfig, folder: Path | None, geometry: Geometry) -> report.DatasetReport:
    """The report, for a model of `geometry`. With `folder`, writes it there with the contact sheet, and the progress as
    events.
    """
    data = dataset.load(config)
    if folder is None:
        return report.fit_to_geometry(report.check(data, config), data, config, geometry)
    folder.mkdir(parents=True, exist_ok=True)
    events = Events(folder / EVENTS)
    opened = report.check(data, config, lambda done, total: events.emit("checked", done=done, total=total))
    found = report.fit_to_geometry(opened, data, config, geometry)
    (folder / REPORT).write_text(f"{found}\n", encoding="utf-8")
    contact_sheet(found.rows, config).save(folder / CONTACT_SHEET)
    return found
