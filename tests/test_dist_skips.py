"""dist/skips.py: what a rollback leaves out is left out, and nothing else moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist.batch_layout import batch_rows
from dist.errors import DataRefused
from dist.order import Order
from dist.run_dir import RunDir
from dist.skips import SKIPPED, SkippingOrder, Skips, merge_ranges, read_skipped
from dist.windowed import WindowedOrder

RANGES = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda one: [one[0], one[0] + one[1]]),
    max_size=6,
)


@given(RANGES)
def test_samples_are_the_positions_that_are_left(ranges: list[list[int]]) -> None:
    """An off-by-one at the edge of a range trains on a bad row, or loses a good one."""
    skips = Skips(ranges)
    covered = {p for p0, p1 in ranges for p in range(p0, p1)}
    left = [p for p in range(100) if p not in covered]
    assert skips.to_stream(np.arange(len(left))).tolist() == left
    expected = [left.index(p) if p in left else -1 for p in range(100)]
    assert skips.to_sample(np.arange(100)).tolist() == expected
    assert skips.left_out_before(30) == len([p for p in covered if p < 30])
    assert merge_ranges(skips.ranges) == skips.ranges


@given(RANGES, st.integers(0, 40), st.integers(0, 30))
def test_rows_are_those_of_the_order_without_the_ranges(
    ranges: list[list[int]], t0: int, length: int
) -> None:
    """A stretch between two ranges that is read from its start gives other rows; epochs of 23
    rows, so that ranges and epochs cross."""
    order = Order(23, seed=3)
    epochs, rows = order.rows(0, 200)
    left = Skips(ranges).to_stream(np.arange(t0, t0 + length))
    found = SkippingOrder(order, Skips(ranges)).rows(t0, t0 + length)
    assert found[0].tolist() == epochs[left].tolist()
    assert found[1].tolist() == rows[left].tolist()


def test_a_range_changes_nothing_before_it() -> None:
    """A run that goes back must repeat its good steps exactly until the bad one."""
    before, after = Skips([[8, 10]]), Skips([[8, 10], [40, 48]])
    t = np.arange(38)
    assert (before.to_stream(t) == after.to_stream(t)).all()
    assert after.to_stream(np.array([38])).tolist() == [48]


def test_a_rollback_moves_no_lane_to_another_rank() -> None:
    """After a skip of 5 positions the rank of a lane reads the next one's shards: every node then
    fetches what another has, to the end of the run."""
    lanes, batch = 4, 16
    row_start = np.arange(0, 601, 10)
    order = WindowedOrder(row_start, 3, lanes=lanes, block_rows=25)
    skipping = SkippingOrder(order, Skips([[37, 42], [200, 203]]))
    assert skipping.lanes == lanes
    for t0 in (0, 16, 32, 48, 160, 192, 208, 400):
        p = skipping.skips.to_stream(np.arange(t0, t0 + batch))
        whole = int(p[-1] - p[0]) == batch - 1  # no skip within: each rank has its lane alone
        taken = []
        for rank in range(lanes):
            lo, hi = rank * batch // lanes, (rank + 1) * batch // lanes
            epoch, rows = batch_rows(skipping, t0, t0 + batch, lo, hi)
            assert not epoch.any()
            at = order.positions(rows, 0)
            taken.append(at)
            if whole:
                assert set((at % lanes).tolist()) == {rank}
            live = skipping.live_shards(t0, [rank])
            assert live.tolist() == order.live_shards(int(p[0]), [rank]).tolist()
        assert sorted(np.concatenate(taken).tolist()) == p.tolist()
        by_lane = (np.concatenate(taken) % lanes).tolist()
        assert by_lane == sorted(by_lane)


def test_ranges_are_read_from_the_run(tmp_path: Path) -> None:
    """Ranges lost between a rollback and its first checkpoint bring the bad rows back."""
    run = RunDir(tmp_path)
    assert read_skipped(run) == []
    (tmp_path / "guard").mkdir()
    run.append(SKIPPED, {"stream": [8, 16], "step": 1})
    run.append(SKIPPED, {"stream": [16, 20], "step": 4})
    assert read_skipped(run) == [[8, 20]]
    run.append(SKIPPED, {"step": 4})
    with pytest.raises(DataRefused, match="edited"):
        read_skipped(run)
