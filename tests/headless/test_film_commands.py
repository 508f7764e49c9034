"""`extend` and `segments`: films of several clips with one command, on the bundled models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wan_core import catalog, load_video, save_video
from wan_core.media import probe
from wan_core.sampling.checkpoint import save_latents
from wancore.headless import film_commands
from wancore.headless.cli import BAD_USAGE, main
from wancore.headless.core_nodes import core_nodes
from wancore.headless.folders import Folders
from wancore.headless.overrides import apply_sets, apply_tiny
from wancore.headless.plan import planned_runs
from wancore.headless.schema import schemas_of
from wancore.nodes import NODE_CLASS_MAPPINGS, host


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    host.configure()


def pictures(count: int, width: int = 96, height: int = 64) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (count, height // 8, width // 8, 3), np.uint8)
    return [Image.fromarray(frame).resize((width, height)) for frame in noise]


def made(capsys) -> list[Path]:
    return [Path(line) for line in capsys.readouterr().out.splitlines()]


FAST = ("--tiny", "--device", "cpu", "--quiet", "--set", "Sampler.steps=1")


def test_a_film_goes_on_with_one_command(here, capsys):
    """The film, two clips after it at its own rate, and the chart of their joints."""
    save_video(pictures(9), here / "film.mp4", fps=12, quality=9)
    clips = ("--prompt", "a red ball", "--prompt", "a blue box", "--clip-frames", 9, "--name", "longer")
    assert main([*map(str, ("extend", here / "film.mp4", *clips)), *FAST]) == 0
    video, *_, chart = made(capsys)
    assert video == Path("output/longer_00001_.mp4")
    assert len(load_video(video)) == 9 + 2 * 4
    import av

    with av.open(str(video)) as file:
        assert file.streams.video[0].average_rate == 12
    assert chart.name == "longer_drift_00001_.png"
    assert Image.open(chart).size == (960, 720)


def test_latents_go_on_with_one_command(here, capsys):
    """They are decoded with the new clip; the chart knows where it begins."""
    path = save_latents(here, "film", torch.randn(1, 48, 3, 4, 6), {})
    assert main(["extend", str(path), "--prompt", "a red ball", "--clip-frames", "9", *FAST]) == 0
    video, *_ = made(capsys)
    assert len(load_video(video)) == 9 + 4
    assert probe(video).fps == catalog.published(catalog.TI2V_BASE).preset.fps


def test_a_list_of_pictures_becomes_a_film_with_one_command(here, capsys):
    names = []
    for number, picture in enumerate(pictures(3)):
        names.append(str(here / f"{number}.png"))
        picture.save(names[-1])
    assert main(["segments", *names, "--loop", "--clip-frames", "5", "--prompt", "a red ball", *FAST]) == 0
    assert len(load_video(made(capsys)[0])) == 1 + 3 * 4


ROWS = {row.variant: row for row in reversed(catalog.CATALOG) if row.base is None}


@pytest.mark.parametrize("variant", ROWS)
@pytest.mark.parametrize("command", ["extend", "segments"])
def test_every_model_goes_on_or_says_what_it_lacks(variant, command):
    """By the plan of the graph, which is made of the same nodes for each."""
    row, nodes = ROWS[variant], {**core_nodes(Folders()), **NODE_CLASS_MAPPINGS}
    words = {"film": "source.mp4", "clips": 2, "keep_frames": None, "pictures": ["start.png", "end.png"]}
    words |= {"model": row.model_id, "prompts": ["a ball"], "negative_prompt": None, "lora": None, "seed": 0}
    words |= {"clip_frames": None, "loop": False, "name": "film", "tiny": True}
    workflow, sets = getattr(film_commands, command)(film_commands.argparse.Namespace(**words))
    schemas = schemas_of(nodes)
    workflow = apply_sets(apply_tiny(workflow, nodes), sets, schemas)
    try:
        (job,), _ = planned_runs(workflow, nodes, schemas)
    except ValueError as error:
        assert "control" in variant or "camera" in variant or (command, variant) == ("extend", "flf2v"), error
    else:
        assert job.decodes


REFUSED = {
    "no prompt": (["extend", "film.mp4"], "Say by --prompt what the clips show"),
    "one picture": (["segments", "one.png", "--prompt", "a"], "name two or more"),
    "unknown": (["extend", "film.mp4", "--prompt", "a", "--model", "mine"], "'mine' is no model of the catalog"),
    "no film": (["extend", "film.mp4", "--tiny"], "Invalid video file: film.mp4"),
    "broken latents": (["extend", __file__[:-2] + "latent", "--tiny"], "latent"),
    "no clip": (["extend", "film.mp4", "--tiny", "--clips", "0"], "clips"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_on_is_refused(name, capsys):
    words, message = REFUSED[name]
    assert main(words) == BAD_USAGE
    assert message in capsys.readouterr().err
