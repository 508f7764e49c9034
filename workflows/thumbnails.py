"""A workflow's picture in ComfyUI's template browser: three moments of its own run on the bundled tiny models."""

import importlib
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pack import NAME, load_pack

from .descriptions import WORKFLOWS

SIZE = (480, 320)
BAND = 44
"""Height of the line of text below the frames."""
SETTINGS = {"steps": 8, "cfg": 2.0, "seed": 1}
ROOT = Path(__file__).resolve().parent


def frames(name: str) -> list[Image.Image]:
    """The video of the shipped workflow `name`, run with the tiny models and few steps."""
    pack = load_pack()
    parts = ("core_nodes", "folders", "runner", "tiny", "workflow")
    core_nodes, folders, runner, tiny, workflow = (importlib.import_module(f"{NAME}.headless.{p}") for p in parts)
    host, media = (importlib.import_module(f"{NAME}.{part}") for part in ("nodes.host", "wan_core.media"))
    with tempfile.TemporaryDirectory() as place:
        here = folders.Folders(Path(place, "in"), Path(place, "out"))
        nodes = {**core_nodes.core_nodes(here), **pack.NODE_CLASS_MAPPINGS}
        graph = tiny.apply_tiny(workflow.Workflow.load(ROOT / "api" / f"{name}.json"), nodes)
        sampler = next(node for node in graph.nodes.values() if node.class_type == "WanCoreSampler")
        host.configure(device="cpu", models_dir=Path(place, "models"))
        try:
            result = runner.run(graph.with_inputs(sampler.id, SETTINGS), nodes, folders=here)
        finally:
            host.configure()
        return media.load_video(result.files[-1])


def picture(video: list[Image.Image], title: str) -> Image.Image:
    """The first, the middle and the last frame, overlapping, on a dark ground, above `title`."""
    width, height = SIZE[0], SIZE[1] - BAND
    ground = Image.new("RGB", SIZE, (29, 37, 51))
    side = (width * 5 // 8, height * 5 // 8)
    places = [(0, 0), ((width - side[0]) // 2, (height - side[1]) // 2), (width - side[0], height - side[1])]
    for frame, place in zip((video[0], video[len(video) // 2], video[-1]), places, strict=True):
        ground.paste(frame.resize(side, Image.Resampling.LANCZOS), place)
    font = ImageFont.load_default(size=22)
    ImageDraw.Draw(ground).text((width // 2, height + BAND // 2), title, "white", font, anchor="mm")
    return ground


def thumbnail(name: str, path: Path) -> None:
    """Run the workflow `name` and write its picture to `path`, a JPEG of about 20 KB."""
    picture(frames(name), WORKFLOWS[name][1].title).save(path, quality=70, optimize=True)
