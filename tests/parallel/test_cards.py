"""A group of processes that this one attends: films, decoding, cancelling, and what becomes of a process that fails."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import fork_server
from tests.nodes.running import outputs
from tests.parallel import matrix
from tests.parallel.cases import Film, full_at, inputs, loaded, written_vae
from tests.parallel.failures import RUNTIME, run
from wan_core import ModelConfig, WanVideoPipeline, catalog
from wan_core.decode import VaeHandle
from wan_core.parallel import cards as cards_module
from wan_core.parallel.cards import Cards, CardsError
from wan_core.runtime import Cancelled, OutOfMemoryError
from wan_core.sampling.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def cards() -> Iterator[Cards]:
    """A group whose processes are forked from one that has imported the library."""
    if not fork_server.CAN_FORK:
        pytest.skip("processes are forked, and this system cannot")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", fork_server.python())
        cards = Cards(("cpu", "cpu"))
        yield cards
        cards.end()


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Film:
    folder = tmp_path_factory.mktemp("film")
    return replace(matrix.stored(folder)["lora"], size=matrix.UNEVEN)


@pytest.fixture(scope="module")
def expected(film) -> torch.Tensor:
    return loaded(film).sample(inputs(film), film.settings, film.memory, RUNTIME).latents


def pids(cards: Cards) -> list[int]:
    return [process.pid for process in cards_module._groups[cards].processes.all]


def test_films_and_pictures_are_those_of_one_process(cards, film, expected, tmp_path):
    seen = []
    state = run(film, cards, replace(RUNTIME, on_progress=lambda *step: seen.append(step[:3])))
    assert state.latents.equal(expected)
    assert seen == [("Sampling", done, 6) for done in range(1, 7)]
    first = pids(cards)
    vae = written_vae(tmp_path)
    pixels = VaeHandle(vae=vae, runtime=RUNTIME).decode(state.video)
    vae.cards = cards
    assert VaeHandle(vae=vae, runtime=RUNTIME).decode(state.video).equal(pixels)
    pieces = VaeHandle(vae=vae, runtime=RUNTIME).decode_pieces(state.video)
    next(pieces)
    with pytest.raises(CardsError, match="take all of its frames"):
        run(film, cards)
    pieces.close()
    # The processes stay, and with them the models.
    assert run(film, cards).latents.equal(expected)
    assert pids(cards) == first


def test_a_cancelled_film_leaves_the_group_ready(cards, film, expected, tmp_path):
    done = 0

    def progress(phase: str, step: int, total: int, latents: Any) -> None:
        nonlocal done
        done = step

    def check() -> None:
        if done >= 2:
            raise Cancelled

    run(film, cards)
    first = pids(cards)
    with pytest.raises(Cancelled):
        run(film, cards, replace(RUNTIME, on_progress=progress, check_cancelled=check), tmp_path)
    assert run(film, cards, folder=tmp_path).latents.equal(expected)
    assert pids(cards) == first


def test_a_killed_rank_ends_the_group_and_the_next_run_goes_on(cards, film, expected, tmp_path):
    def progress(phase: str, step: int, total: int, latents: Any) -> None:
        if step == 3:
            cards_module._groups[cards].processes.all[1].kill()

    with pytest.raises(CardsError, match=r"^Rank 1 \(cpu\) was ended by SIGKILL\. "):
        run(film, cards, replace(RUNTIME, on_progress=progress), tmp_path)
    assert cards not in cards_module._groups
    steps = []
    state = run(film, cards, replace(RUNTIME, on_progress=lambda phase, step, *_: steps.append(step)), tmp_path)
    assert state.latents.equal(expected)
    assert steps[0] > 1


@pytest.mark.parametrize(
    ("rank", "error", "text"),
    [(0, OutOfMemoryError, "Out of memory in step 3 of 6"), (1, CardsError, r"Rank 1 \(cpu\) failed: .*out of memory")],
)
def test_no_memory_ends_the_group_and_the_next_run_goes_on(cards, film, expected, tmp_path, rank, error, text):
    model = replace(loaded(film), cards=cards)
    model = replace(model, source=model.source.then(full_at, rank, 3))
    with pytest.raises(error, match=text):
        model.sample(inputs(film), film.settings, film.memory, RUNTIME, checkpoint=Checkpoint(tmp_path, every=1))
    assert run(film, cards, folder=tmp_path).latents.equal(expected)


def test_cards_are_checked():
    for devices in [(), ("cuda:0",), ("cuda:0", "cuda:0")]:
        with pytest.raises(ValueError, match=r"cards needs at least two|named once"):
            Cards(devices)


def test_a_pipeline_on_several_devices_gives_the_same_frames(cards, tmp_path):
    patterns = ("diffusion_pytorch_model*.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth")
    files = [
        ModelConfig(model_id=catalog.TINY, origin_file_pattern=each, local_model_path=tmp_path) for each in patterns
    ]
    call = {"prompt": "a dog", "height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "seed": 3}
    alone, together = (
        WanVideoPipeline.from_pretrained(torch.float32, "cpu", files, local_model_path=tmp_path, **more)
        for more in ({}, {"devices": ["cpu", "cpu"]})
    )
    expected = alone(**call, output_type="tensor", progress_bar_cmd=None)
    assert together(**call, output_type="tensor", progress_bar_cmd=None).equal(expected)
    assert together.models.video.cards == cards


def test_the_node_names_cards_and_leaves_what_it_gets_alone(film, tmp_path):
    model, vae = loaded(film), written_vae(tmp_path)
    shared, decoder = outputs("WanCoreParallel", model=model, cards="cpu, cpu", vae=vae)
    assert shared.cards == decoder.cards == Cards(("cpu", "cpu"))
    assert model.cards is None and vae.cards is None
    assert outputs("WanCoreParallel", model=model, cards="cpu cpu cpu")[1] is None
    count = torch.cuda.device_count()
    for text in ("", "cpu", f"0, {count}", "first"):
        with pytest.raises(ValueError, match="cards"):
            outputs("WanCoreParallel", model=model, cards=text)
