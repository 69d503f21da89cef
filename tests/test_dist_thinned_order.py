"""dist/thinned_order.py: one source without removed rows, against lists of all positions."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist.order import Order
from dist.stages import DerivedOrder
from dist.thinned_order import LEFT_OUT, ThinnedOrder
from dist.windowed import WindowedOrder

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=5).filter(lambda one: sum(one) > 3)
EPOCHS = 6


def stream_of(sizes: list[int], lanes: int) -> Any:
    table = np.concatenate(([0], np.cumsum(sizes)))
    if lanes > 1:
        return WindowedOrder(table, 3, source=1, lanes=lanes, block_rows=4)
    return Order(int(table[-1]), 3, 1)


def drawn_removals(data: st.DataObject, num_rows: int) -> list[tuple[int, list[int]]]:
    """Up to three removals of other rows each, at any positions, in any order of them."""
    rows = data.draw(st.permutations(range(num_rows)))[: data.draw(st.integers(1, num_rows - 1))]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), min_size=2, max_size=2)))
    parts = [part for part in np.split(np.array(rows), cuts) if len(part)]
    positions = st.integers(0, 4 * num_rows)
    return [(data.draw(positions), sorted(part.tolist())) for part in parts]


def plain(stream: Any, removals: list[tuple[int, list[int]]]) -> list[tuple[int, int, int]]:
    """(position, epoch, row) of what is left, by going through all positions."""
    epochs, rows = stream.rows(0, EPOCHS * stream.num_rows)
    since = {row: p for p, of in removals for row in of}
    met = enumerate(zip(epochs.tolist(), rows.tolist(), strict=True))
    return [(p, e, row) for p, (e, row) in met if p < since.get(row, p + 1)]


@settings(max_examples=150, deadline=None)
@given(sizes=SIZES, lanes=st.sampled_from([1, 2, 4]), data=st.data())
def test_it_is_the_stream_without_the_removed_rows(
    sizes: list[int], lanes: int, data: st.DataObject
) -> None:
    """Samples that jump or repeat where a removal begins in the middle of an epoch, or where a
    second one does; an inverse that finds a row where it does not come."""
    stream = stream_of(sizes, lanes)
    removals = drawn_removals(data, stream.num_rows)
    order, expected = ThinnedOrder(stream, removals), plain(stream, removals)
    t = np.array(data.draw(st.permutations(range(len(expected)))), np.int64)
    position, epoch, row = (np.array(one, np.int64) for one in zip(*expected, strict=True))
    assert np.array_equal(order.to_stream(t), position[t])
    got = order.at(t)
    assert np.array_equal(got[0], epoch[t]) and np.array_equal(got[1], row[t])
    every = np.arange(EPOCHS * stream.num_rows)
    samples = np.full(len(every), LEFT_OUT)
    samples[position] = np.arange(len(position))
    assert np.array_equal(order.to_sample(every), samples)
    for e in range(EPOCHS):
        at = order.positions(np.arange(stream.num_rows), e)
        assert np.array_equal(at, samples[stream.positions(np.arange(stream.num_rows), e)])


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, lanes=st.sampled_from([1, 2, 4]), data=st.data())
def test_derived_numbers_are_those_of_the_table_without_them(
    sizes: list[int], lanes: int, data: st.DataObject
) -> None:
    """Another row of the derived files than the run's, or a shard's number that is the first
    version's."""
    stream = stream_of(sizes, lanes)
    removals = drawn_removals(data, stream.num_rows)
    order = ThinnedOrder(stream, removals)
    derived = DerivedOrder(order, order.removed.tolist())
    first = sum(p < 5 * stream.num_rows for p, _, _ in plain(stream, removals))
    kept = np.setdiff1d(np.arange(stream.num_rows), order.removed)
    t = np.arange(first, first + 2 * len(kept))
    assert np.array_equal(kept[derived.at(t)[1]], order.at(t)[1])
    table = np.concatenate(([0], np.cumsum(sizes)))
    if lanes > 1:
        left = [np.count_nonzero((kept >= a) & (kept < b)) for a, b in pairwise(table)]
        assert np.array_equal(np.diff(derived.row_start), [n for n in left if n])


def test_a_source_goes_on_for_ever_without_a_list() -> None:
    """Positions of every epoch in memory: a run of many epochs could not start."""
    order = ThinnedOrder(Order(1000, 1), [(2500, [3, 5]), (7100, list(range(10, 30)))])
    t = 10**15 + np.arange(5000)
    epoch, row = order.at(t)
    assert len(set(row[epoch == epoch[0] + 1].tolist())) == 978
    assert np.array_equal(order.to_sample(order.to_stream(t)), t)
    for wrong in ([(0, list(range(1000)))], [(0, [4]), (9, [4])]):
        with pytest.raises(ValueError, match="left out, or twice"):
            ThinnedOrder(Order(1000, 1), wrong)
