"""The order of training: a pure function in which nothing is lost and shapes do not mix."""

from collections import Counter

import pytest

from wancore.trainer.data.choices import batches, mix_seeds, permutation

SHAPES = ["a"] * 7 + ["b"] * 4 + ["a"] * 3 + ["c"]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 20])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sample_is_there_and_shapes_do_not_mix(batch_size, world):
    ranks = [batches(SHAPES, 5, 1, batch_size, rank, world) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    for together in zip(*ranks, strict=True):
        positions = [p for batch in together for p in batch]
        assert len({SHAPES[p] for p in positions}) == 1
        assert len({len(batch) for batch in together}) == 1
        assert 0 < len(together[0]) <= batch_size
    counts = Counter(p for rank in ranks for batch in rank for p in batch)
    assert set(counts) == set(range(len(SHAPES)))
    assert max(counts.values()) <= (1 if world == 1 else world)
    assert sum(counts.values()) - len(SHAPES) <= (world - 1) * len(set(SHAPES))


def test_batches_stand_where_their_first_sample_stands_in_the_order():
    order = permutation(len(SHAPES), 5, 1)
    places = [order.index(batch[0]) for batch in batches(SHAPES, 5, 1, 3)]
    assert places == sorted(places)


def test_several_processes_take_what_one_would():
    alone = batches(["a"] * 12, 3, 0, 4)
    two = [batches(["a"] * 12, 3, 0, 2, rank, 2) for rank in range(2)]
    assert [first + second for first, second in zip(*two, strict=True)] == alone


def test_accumulated_single_samples_are_those_of_a_larger_batch():
    singles = batches(["a"] * 8, 3, 2, 1)
    assert [a + b for a, b in zip(singles[::2], singles[1::2], strict=True)] == batches(["a"] * 8, 3, 2, 2)


def test_seed_and_epoch_choose_the_order_for_good():
    orders = [tuple(permutation(20, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert permutation(20, 1, 2) == permutation(20, 1, 2)
    assert permutation(5, 0, 0) == [2, 3, 1, 4, 0]


def test_neighbouring_numbers_mix_to_unlike_seeds():
    seeds = {mix_seeds(seed, epoch, position) for seed in range(10) for epoch in range(10) for position in range(10)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert mix_seeds(1, 2) != mix_seeds(2, 1) and mix_seeds(0) != mix_seeds(0, 0)


@pytest.mark.parametrize(
    "arguments", [([], 0, 0, 1), (["a"], 0, 0, 0), (["a"], 0, 0, 1, 2, 2), (["a"], 0, 0, 1, -1, 2)]
)
def test_impossible_orders(arguments):
    with pytest.raises(ValueError, match="No batches"):
        batches(*arguments)
