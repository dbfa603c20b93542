"""The order is a pure function in which every sample stands once per epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridle.data.order import SampleOrder

counts = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda found: sum(found) > 0)
sizes = st.integers(1, 12)
seeds = st.integers(0, 2**32)


def epoch_of(order: SampleOrder, epoch: int) -> list[int]:
    located = [order.locate(position) for position in range(order.begin(epoch), order.begin(epoch + 1))]
    assert {found for found, _ in located} == {epoch}
    return [sample for _, sample in located]


@given(counts, seeds, sizes, sizes, st.booleans(), st.integers(0, 3))
def test_every_sample_exactly_once_per_epoch(
    counts: list[int], seed: int, block: int, window: int, shuffle: bool, epoch: int
) -> None:
    order = SampleOrder(counts, seed, block, window, shuffle)
    assert sorted(epoch_of(order, epoch)) == list(range(sum(counts)))


@given(counts, seeds, sizes, sizes, st.lists(st.integers(0, 500), min_size=1, max_size=20))
def test_order_does_not_depend_on_what_was_asked_before(
    counts: list[int], seed: int, block: int, window: int, positions: list[int]
) -> None:
    asked = SampleOrder(counts, seed, block, window)
    for position in positions:
        assert asked.locate(position) == SampleOrder(counts, seed, block, window).locate(position)


@given(counts, seeds, sizes, sizes)
def test_without_shuffling_the_samples_keep_their_order(counts: list[int], seed: int, block: int, window: int) -> None:
    order = SampleOrder(counts, seed, block, window, shuffle=False)
    assert epoch_of(order, 1) == list(range(sum(counts)))


def test_every_epoch_and_every_seed_has_its_own_order() -> None:
    order, other = SampleOrder([100, 100], 0, 4, 8), SampleOrder([100, 100], 1, 4, 8)
    orders = [epoch_of(order, 0), epoch_of(order, 1), epoch_of(order, 2), epoch_of(other, 0)]
    assert len({tuple(found) for found in orders}) == 4


def test_a_window_reads_few_blocks_and_no_block_crosses_a_shard() -> None:
    order = SampleOrder([50, 50, 50], 3, 10, 3)
    first_window = [order.locate(i)[1] for i in range(30)]
    blocks = {sample // 10 for sample in first_window}
    assert len(blocks) == 3 and len(set(first_window)) == 30
    assert first_window != sorted(first_window)
    assert set(order.upcoming_shards(0)) >= {sample // 50 for sample in first_window}


@given(counts, seeds, sizes, sizes, st.integers(0, 500))
def test_upcoming_shards_hold_the_sample_at_hand(
    counts: list[int], seed: int, block: int, window: int, position: int
) -> None:
    order = SampleOrder(counts, seed, block, window)
    _, sample = order.locate(position)
    shard = int(np.searchsorted(np.cumsum(counts), sample, side="right"))
    assert shard in order.upcoming_shards(position)


def test_a_million_samples_stand_once_each() -> None:
    order = SampleOrder([1000] * 1000, 5, 16, 64)
    seen = np.zeros(1_000_000, dtype=bool)
    for position in range(order.begin(1)):
        seen[order.locate(position)[1]] = True
    assert seen.all()


def test_nothing_to_order_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        SampleOrder([0, 0], 0, 1, 1)
    with pytest.raises(ValueError, match="at least 1"):
        SampleOrder([3], 0, 0, 1)


def test_blocks_stand_in_another_order_in_every_epoch() -> None:
    """Without mixing: windows of one block, and the blocks' first samples."""
    order = SampleOrder([64], 0, 8, 1)
    orders = [tuple(sample // 8 for sample in epoch_of(order, epoch)[::8]) for epoch in range(4)]
    assert all(sorted(found) == list(range(8)) for found in orders)
    assert len(set(orders)) == 4
