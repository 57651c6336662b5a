"""EpochOrder: a bijection, a pure function of the position, fair over epochs."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.sampler import EpochOrder, permute


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**32 - 1))
def test_permute_is_a_bijection(n, seed, epoch):
    assert sorted(permute(np.arange(n), n, seed=seed, key=0, epoch=epoch)) == list(range(n))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 2**48 - 1), data=st.data())
def test_permute_of_large_domains(n, data):
    values = np.asarray(data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=200)), dtype=np.int64)
    result = permute(values, n, seed=5, key=2, epoch=9)
    assert len(set(result.tolist())) == len(values)
    assert ((result >= 0) & (result < n)).all()


def test_permutations_are_uniform():
    seen = Counter(tuple(permute(np.arange(4), 4, seed=seed, key=0, epoch=0).tolist()) for seed in range(4800))
    assert len(seen) == 24
    assert sum((count - 200) ** 2 / 200 for count in seen.values()) < 60  # chi-square, 23 degrees: p = 4e-5
    pairs = permute(np.arange(100_000), 100_000, seed=1, key=0, epoch=0)
    assert abs(np.corrcoef(pairs[:-1], pairs[1:])[0, 1]) < 0.02


def test_plain_epoch_shows_each_record_once_in_another_order():
    order = EpochOrder([300, 0, 201], seed=3)
    assert order.epoch_size == 501
    epochs = [order.slots(epoch, 0, 501) for epoch in range(3)]
    for slots, records in epochs:
        assert slots.dtype == records.dtype == np.int64
        assert sorted(slots) == list(range(501))
        assert (slots == records).all()
    assert not (epochs[0][0] == epochs[1][0]).all()
    assert not (EpochOrder([501], seed=4).slots(0, 0, 501)[0] == epochs[0][0]).all()


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 80), min_size=1, max_size=4),
    weighted=st.booleans(),
    epoch_size=st.integers(0, 300),
    cuts=st.lists(st.floats(0, 1), max_size=4),
)
def test_any_split_of_the_positions_gives_the_same(sizes, weighted, epoch_size, cuts):
    weights = [1.0 + i for i in range(len(sizes))] if weighted and (epoch_size or sum(sizes)) > 20 else []
    order = EpochOrder(sizes, weights, epoch_size, seed=1)
    whole = np.stack(order.slots(2, 0, order.epoch_size))
    edges = sorted({0, order.epoch_size, *(int(cut * order.epoch_size) for cut in cuts)})
    parts = [np.stack(EpochOrder(sizes, weights, epoch_size, seed=1).slots(2, a, b - a)) for a, b in pairwise(edges)]
    assert (np.concatenate(parts, axis=1) == whole).all()
    assert sorted(whole[0]) == list(range(order.epoch_size))
    assert ((whole[1] >= 0) & (whole[1] < sum(sizes))).all()


def ranks(order: EpochOrder, epoch: int, world: int, local: int) -> list[int]:
    return [
        int(slot)
        for step in range(order.epoch_size // (world * local))
        for rank in range(world)
        for slot in order.slots(epoch, (step * world + rank) * local, local)[0]
    ]


def test_ranks_together_are_the_epoch():
    order = EpochOrder([96], seed=0)
    assert ranks(order, 1, 1, 8) == ranks(order, 1, 4, 2)
    assert sorted(ranks(order, 1, 4, 2)) == list(range(96))


def test_weights_are_honoured_and_nothing_repeats_before_its_root_is_exhausted():
    sizes, weights = [100, 37, 1000], [1, 1, 2]
    order = EpochOrder(sizes, weights, 120, seed=7)
    assert order.shares == [30, 30, 60]
    counts = np.zeros(sum(sizes), dtype=int)
    for epoch in range(8):
        slots, records = order.slots(epoch, 0, 120)
        assert len(set(slots.tolist())) == 120
        counts += np.bincount(records, minlength=sum(sizes))
        for root in np.split(counts, np.cumsum(sizes)[:-1]):
            assert root.max() - root.min() <= 1
    assert [root.sum() for root in np.split(counts, np.cumsum(sizes)[:-1])] == [240, 240, 480]


def test_roots_of_one_size_have_orders_of_their_own():
    order = EpochOrder([1000, 1000], [1, 1], 400, seed=5)
    records = order.slots(0, 0, 400)[1]
    first, second = set(records[records < 1000].tolist()), set((records[records >= 1000] - 1000).tolist())
    assert len(first) == len(second) == 200 and len(first & second) < 100


@pytest.mark.parametrize("epoch_size", [7, 50, 64, 130, 200])
def test_every_record_is_covered_over_epochs(epoch_size):
    order = EpochOrder([40, 24], epoch_size=epoch_size, seed=2)
    counts = np.zeros(64, dtype=int)
    for epoch in range(20):
        counts += np.bincount(order.slots(epoch, 0, epoch_size)[1], minlength=64)
        assert counts.max() - counts.min() <= 1
    assert counts.sum() == 20 * epoch_size


def test_shares_by_largest_remainder():
    assert EpochOrder([5, 5, 5], [1, 1, 1], 10).shares == [4, 3, 3]
    assert EpochOrder([5, 5], [0.1, 0.7], 8).shares == [1, 7]


def test_replacements_stay_in_the_pool_and_depend_on_the_slot():
    order = EpochOrder([10, 1000], [1, 1], 40, seed=1)
    found = order.replacements(3, np.asarray([5, 25, 26]), 50)
    assert found.shape == (3, 50)
    assert set(found[0]) == set(range(10))
    assert found[1:].min() >= 10 and found[1:].max() < 1010
    assert not (found[1] == found[2]).all()
    assert (order.replacements(3, np.asarray([26]), 20) == found[2:, :20]).all()
    assert not (order.replacements(4, np.asarray([26]), 20) == found[2:, :20]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([5, 5], [1.0]), "2 positive numbers"),
        (([5, 5], [1.0, 0.0]), "2 positive numbers"),
        (([5, 5], [1.0, float("nan")]), "2 positive numbers"),
        (([5, 5], [1.0, 1e6], 10), "at least one of the 10 images"),
        (([5], [], -1), "0 or more, got -1"),
    ],
)
def test_wrong_configuration(arguments, message):
    with pytest.raises(ConfigError, match=message):
        EpochOrder(*arguments)


def test_positions_outside_of_the_epoch():
    with pytest.raises(ValueError, match="got 5 to 10 of epoch 0"):
        EpochOrder([10]).slots(0, 5, 6)
