"""The order of chosen samples: a pure function, each once an epoch or as often as its weight says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridle.data.chosen import ChosenOrder

COUNTS = [5, 0, 7, 8]


@given(
    chosen=st.lists(st.integers(0, 19), min_size=1, max_size=20, unique=True),
    seed=st.integers(0, 9),
    origin=st.integers(0, 50),
)
def test_each_chosen_sample_comes_once_an_epoch_whoever_asks_and_in_whatever_order(
    chosen: list[int], seed: int, origin: int
) -> None:
    order = ChosenOrder(COUNTS, chosen, seed, origin=origin)
    for epoch in (3, 0, 1):
        positions = range(order.begin(epoch), order.begin(epoch + 1))
        found = [order.locate(position) for position in positions]
        assert {number for number, _ in found} == {epoch}
        assert sorted(sample for _, sample in found) == sorted(chosen)
        assert found == [ChosenOrder(COUNTS, chosen, seed, origin=origin).locate(position) for position in positions]
    with pytest.raises(ValueError, match="before"):
        order.locate(origin - 1)


def test_epochs_and_seeds_differ_and_unshuffled_is_as_given() -> None:
    def epochs(seed: int, shuffle: bool = True) -> list[list[int]]:
        order = ChosenOrder(COUNTS, range(20), seed, shuffle=shuffle)
        return [[order.locate(20 * epoch + i)[1] for i in range(20)] for epoch in range(2)]

    first, second = epochs(0)
    assert first != second and first != epochs(1)[0] and first != list(range(20))
    assert epochs(0, shuffle=False) == [list(range(20))] * 2


def test_weighted_samples_come_in_proportion_and_those_without_weight_never() -> None:
    weights = np.array([1.0, 3.0, 0.0, 6.0])
    order = ChosenOrder([4], range(4), 0, weights=weights)
    counts = Counter(order.locate(position)[1] for position in range(40_000))
    assert counts[2] == 0
    assert [counts[i] / 40_000 for i in range(4)] == pytest.approx([0.1, 0.3, 0.0, 0.6], abs=0.015)


def test_upcoming_shards_are_those_that_come() -> None:
    order = ChosenOrder(COUNTS, range(20), 0)
    first = order.locate(0)[1]
    assert order.upcoming_shards(0)[0] == (0 if first < 5 else 2 if first < 12 else 3)
    assert sorted(order.upcoming_shards(0)) == [0, 2, 3]
