"""A film of several ranks is that of one, bit for bit; `python -m tests.parallel.matrix` has more films and ranks."""

from collections import Counter
from dataclasses import replace

import pytest

from tests.parallel import matrix
from tests.parallel.cases import Film, film, inputs, modules
from tests.parallel.matrix import RUN
from wan_core.cache_settings import EasyCacheSettings
from wan_core.parallel.layout import Layout, shares, spans
from wan_core.planning.run import exchange_of, plan_run
from wan_core.settings import MemorySettings


@pytest.mark.parametrize(("ranks", "heads", "tokens", "batch"), [(2, 40, 37, 1), (3, 12, 10, 2), (4, 2, 13, 1)])
def test_attention_is_the_same_over_any_split(pool, ranks, heads, tokens, batch):
    assert pool.run(ranks, "attention", heads, tokens, batch) == 0.0


STRUCTURES = {"t2v": 2, "fun_v1_1_control": 3, "fun_a14b_camera": 2, "fun_5b_control": 3}
FEATURES = {
    "guidance for a while": 4, "nag": 2, "a skipping branch": 2, "windows": 4, "a chain": 2, "easycache in windows": 4,
    "first block, batched": 3, "two videos": 4, "experts of other guidance": 2, "uneven tokens": 4,
}  # fmt: skip
STORED = {"streamed fp8 with lora": 2, "streamed experts": 2}


@pytest.mark.parametrize(("name", "ranks"), STRUCTURES.items())
def test_every_structure(pool, name, ranks):
    [(_, found)] = matrix.differences(pool, matrix.structures()[name], (ranks,))
    assert found == 0.0


@pytest.mark.parametrize(("name", "ranks"), FEATURES.items())
def test_every_feature(pool, name, ranks):
    [(_, found)] = matrix.differences(pool, matrix.features()[name], (ranks,))
    assert found == 0.0


@pytest.mark.parametrize(("name", "ranks"), STORED.items())
def test_lora_fp8_and_streamed_weights(pool, tmp_path, name, ranks):
    [(_, found)] = matrix.differences(pool, matrix.stored(tmp_path)[name], (ranks,))
    assert found == 0.0


@pytest.mark.parametrize("cache", [None, EasyCacheSettings(threshold=0.3, start_step=2)], ids=["plain", "easycache"])
def test_a_stopped_film_goes_on_with_any_number_of_ranks(pool, tmp_path, cache):
    whole = Film("t2v", replace(matrix.LONG, cache=cache, solver="unipc"), matrix.ODD, matrix.SMALL)
    expected = film(None, whole)[0].latents
    saved = replace(whole, folder=tmp_path, saves=True)
    pool.run(4, "film", replace(saved, stop_after=2))
    pool.run(2, "film", replace(saved, stop_after=3))
    film(None, replace(saved, stop_after=4))
    state, _, calls = pool.run(4, "film", saved)
    assert state.latents.equal(expected)
    assert calls["latents"] == matrix.LONG.steps - 3  # the step that a film is stopped in is not saved


def test_a_step_has_the_same_exchanges_whatever_it_shows(pool):
    each = Film("t2v", matrix.RUN, matrix.ODD, matrix.SMALL)
    counts = [Counter(pool.run(4, "film", replace(each, settings=run))[2]) for run in (RUN, matrix.LONG)]
    layers, steps = matrix.SMALL.num_layers, matrix.LONG.steps - matrix.RUN.steps
    more = counts[1] - counts[0]
    # A word and the latents; in each block there and back; the tokens of a row, and a velocity of each row.
    assert more == {"control": steps, "latents": steps, "heads": 2 * layers * steps, "velocity": 3 * steps}


@pytest.mark.parametrize(
    ("name", "film", "ranks"),
    [
        ("guided", Film("t2v", matrix.LONG, matrix.UNEVEN, matrix.SMALL), 4),
        ("no guidance, VACE", Film("vace", matrix.guided(scale=1.0), matrix.ODD, matrix.SMALL_VACE), 3),
        ("two videos with a reference", Film("fun_v1_1_control", matrix.RUN, batch=2), 3),
    ],
)
def test_bytes_sent_are_those_of_the_formula(pool, name, film, ranks):
    _, sent, _ = pool.run(ranks, "film", film)
    cond, size = inputs(film).cond, film.size
    window = (cond.prefix_frames(size.frames) + size.frames, size.height, size.width)
    exchange = exchange_of(film.structure, window, film.dtype, film.batch, len(cond.vace or ()))
    branches = film.settings.guidance.branches
    expected = exchange.sent(Layout.of(ranks, guided=branches > 1), branches)
    assert sent == {kind: size * film.settings.steps for kind, size in expected.items()}


def test_a_plan_shows_what_ranks_share():
    film = Film("t2v", matrix.RUN, matrix.ODD)
    dit, given = modules(film).first, inputs(film)
    plans = [plan_run(dit, given.cond, given.size, RUN, MemorySettings(), lambda _: None, ranks=n) for n in (1, 2, 4)]
    assert [str(plan.layout) for plan in plans] == ["cfg 1 x seq 1", "cfg 2 x seq 1", "cfg 2 x seq 2"]
    assert [plan.sent > 0 for plan in plans] == [False, True, True]
    assert plans[0].flops == 2 * plans[1].flops == 4 * plans[2].flops
    assert plans[0].activations >= plans[1].activations > plans[2].activations


def test_layouts_give_guidance_its_ranks_first():
    for ranks, guided, expected in [
        (1, True, Layout(1, 1)), (2, True, Layout(2, 1)), (8, True, Layout(2, 4)), (3, True, Layout(1, 3)),
        (8, False, Layout(1, 8)),
    ]:  # fmt: skip
        assert Layout.of(ranks, guided=guided) == expected
    with pytest.raises(ValueError, match="3 rows of 1"):
        Layout(3, 1)


def test_shares_are_whole_and_as_equal_as_can_be():
    for count in range(20):
        for ranks in range(1, 9):
            sizes = shares(count, ranks)
            assert sum(sizes) == count and max(sizes) - min(sizes) <= 1 and len(sizes) == ranks
            assert [n for place in spans(sizes) for n in range(count)[place]] == list(range(count))
