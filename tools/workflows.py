"""`python -m tools.workflows`: write every workflow in both formats, and its pictures for the template browser."""

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from pack import NAME, ROOT
from tools import film_workflows, training_workflows, workflow_texts
from tools.film_workflows import TITLES as FILM_TITLES
from tools.graph import to_api, to_ui
from tools.templates import template
from tools.training_workflows import TITLES as TRAINING_TITLES
from tools.training_workflows import VALIDATIONS
from tools.workflow_texts import TASKS, WORKFLOWS
from wan_core.media import load_video
from wancore.headless.core_nodes import core_nodes
from wancore.headless.folders import Folders
from wancore.headless.overrides import apply_tiny
from wancore.headless.runner import run
from wancore.headless.workflow import Workflow
from wancore.nodes import NODE_CLASS_MAPPINGS, host

SIZE = (480, 320)
BAND = 44
"""Height of the line of text below the frames."""
SETTINGS = {"seed": 1}
TITLES = {**{name: TASKS[row.task].title for name, row in WORKFLOWS.items()}, **TRAINING_TITLES, **FILM_TITLES}
FOLDER = ROOT / "workflows"


def version() -> str:
    """The pack's version, from pyproject.toml."""
    return re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]


def core_classes() -> dict[str, type]:
    """The stand-ins of ComfyUI's own nodes that the workflows use."""
    return core_nodes(Folders())


def files() -> dict[Path, dict[str, Any]]:
    """Every workflow file's path, relative to this folder, and what it holds."""
    classes = {**core_classes(), **NODE_CLASS_MAPPINGS}
    built = {}
    described = [(workflow_texts, name) for name in workflow_texts.WORKFLOWS]
    described += [(training_workflows, name) for name in training_workflows.NAMES]
    described += [(film_workflows, name) for name in film_workflows.FILMS]
    for module, name in described:
        graph = module.describe(name)
        built[Path(f"{template(graph.name)}.json")] = to_ui(graph, classes, NAME, version())
        built[Path("api", f"{graph.name}.json")] = to_api(graph, classes)
    return built


def write(folder: Path) -> None:
    built = files()
    for old in folder.glob("*.json"):
        if Path(old.name) not in built:
            old.unlink()
    for path, content in built.items():
        target = folder / path
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def frames(name: str) -> list[Image.Image]:
    """The video of the shipped workflow `name`, run with the tiny models and few steps.

    A workflow that shows what was trained shows what the one that trains a LoRA makes; for a whole model, with its
    training node exchanged.
    """
    with tempfile.TemporaryDirectory() as place:
        here = Folders(Path(place, "in"), Path(place, "out"))
        nodes = {**core_nodes(here), **NODE_CLASS_MAPPINGS}

        def execute(prompt: dict[str, Any], changes: dict[str, Any]) -> Path:
            graph = apply_tiny(Workflow.from_api(prompt), nodes)
            for class_type, inputs in changes.items():
                graph = graph.with_inputs(
                    next(n.id for n in graph.nodes.values() if n.class_type == class_type), inputs
                )
            return run(graph, nodes, folders=here).files[-1]

        host.configure(device="cpu", models_dir=Path(place, "models"), output_dir=here.output)
        try:
            trained = {}
            if name in VALIDATIONS:
                execute(_training(whole=name == "validate_full"), {"WanCoreSampler": {"steps": 1}})
                trained = {
                    "WanCoreTrainedWeights": {"weights": str(next(here.output.rglob("training/*/*.safetensors")))}
                }
            return load_video(execute(_api(name), {"WanCoreSampler": SETTINGS, **trained}))
        finally:
            host.configure()


def _api(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def _training(whole: bool) -> dict[str, Any]:
    prompt = _api("train_lora_t2v")
    if whole:
        node = next(node for node in prompt.values() if node["class_type"] == "WanCoreTrainLora")
        node["class_type"] = "WanCoreTrainModel"
        del node["inputs"]["lora_rank"]
    return prompt


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
    """Run the workflow `name`, or one that is the same on bundled models, and write its picture to `path`, a JPEG of
    about 20 KB.
    """
    film = _films.get(key := _as_tiny(name)) or _films.setdefault(key, frames(name))
    picture(film, TITLES[name]).save(path, quality=70, optimize=True)


_films: dict[str, list[Image.Image]] = {}


def _as_tiny(name: str) -> str:
    """What the workflow `name` is on bundled models, without the name of its file."""
    graph = apply_tiny(Workflow.from_api(_api(name)), {**core_classes(), **NODE_CLASS_MAPPINGS})
    inputs = {node.id: (node.class_type, {**node.inputs, "filename_prefix": ""}) for node in graph.nodes.values()}
    return f"{name if name in VALIDATIONS else ''} {inputs}"


def main() -> None:
    """Write everything into this folder."""
    parser = argparse.ArgumentParser(prog="python -m tools.workflows", description="Write the shipped workflows.")
    parser.add_argument("--thumbnails", action="store_true", help="also run each of them and write its picture")
    options = parser.parse_args()
    write(FOLDER)
    if options.thumbnails:
        for name in (*workflow_texts.WORKFLOWS, *training_workflows.NAMES, *film_workflows.FILMS):
            thumbnail(name, FOLDER / f"{template(name)}.jpg")


if __name__ == "__main__":
    main()
