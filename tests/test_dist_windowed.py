"""dist/windowed.py: a bijection, its inverse, how few shards are live, how well rows are mixed,
and what nodes fetch."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dist.batch_layout import batch_places, batch_rows, batch_samples, shards_ahead
from dist.errors import ConfigError
from dist.order import OrderState, rank_span
from dist.skips import SkippingOrder, Skips
from dist.stages import DerivedOrder, Stages
from dist.windowed import OrderMode, WindowedOrder, auto_lanes, auto_window, block_rows_of

GOLDEN = Path(__file__).parent / "golden" / "order_windowed_v1.json"
SHARDS = st.lists(st.integers(1, 9), min_size=1, max_size=40)
LANES = st.sampled_from([1, 2, 4, 8, 64])


def order_of(sizes: list[int], lanes: int, window: int, seed: int = 3) -> WindowedOrder:
    row_start = np.concatenate(([0], np.cumsum(sizes)))
    block_rows = block_rows_of(row_start, lanes, window)
    return WindowedOrder(row_start, seed, lanes=lanes, block_rows=block_rows)


def shards_of(order: WindowedOrder, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(order.row_start, rows, side="right") - 1


@settings(max_examples=80, deadline=None)
@given(sizes=SHARDS, lanes=LANES, window=st.integers(1, 4), seed=st.integers(0, 2**63))
def test_every_epoch_is_a_bijection_with_an_inverse(
    sizes: list[int], lanes: int, window: int, seed: int
) -> None:
    """A short last block or lane, or fewer rows than lanes, that loses or doubles a row."""
    order = order_of(sizes, lanes, window, seed)
    n = order.num_rows
    epochs, rows = order.rows(0, 2 * n)
    for epoch in (0, 1):
        mine = rows[epochs == epoch]
        assert np.array_equal(np.sort(mine), np.arange(n))
        assert np.array_equal(order.positions(mine, epoch), epoch * n + np.arange(n))
    assert order.when(int(rows[-1]), 1) == 2 * n - 1


@settings(max_examples=80, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=120), lanes=LANES,
       window=st.integers(1, 5), seed=st.integers(0, 100))  # fmt: skip
def test_few_shards_are_live_at_every_index(
    sizes: list[int], lanes: int, window: int, seed: int
) -> None:
    """A block one row too large, or a shard that the live set lacks: its next read is a fetch."""
    order = order_of(sizes, lanes, window, seed)
    n = order.num_rows
    shards = shards_of(order, order.rows(0, n)[1])
    for lane in range(min(lanes, n)):
        mine = shards[lane::lanes]
        used = {int(s): np.flatnonzero(mine == s) for s in np.unique(mine)}
        for index in range(len(mine)):
            live = {s for s, at in used.items() if at[0] <= index <= at[-1]}
            told = order.live_shards(lane + index * lanes, [lane])
            assert len(live) <= len(told) <= 2 * window
            assert live <= set(told.tolist())


def test_rows_are_mixed_within_their_window() -> None:
    """Blocks that share their keys, too few rounds, or a second pass that does not stagger."""
    order = order_of([1000] * 200, 4, 8)
    n, size = order.num_rows, order.block_rows
    assert size == 7500
    rows = order.rows(0, n)[1]
    line = np.empty(n, np.int64)  # of each position, its place in the epoch's line of shards
    table, start = order._table(0)
    place = np.argsort(table)[shards_of(order, rows)]
    line = start[place] + rows % 1000
    for lane in range(4):
        at = line[lane::4] - lane * n // 4
        moved = np.abs(at - np.arange(len(at)))
        assert moved.max() < 1.5 * size and moved.max() > 1.2 * size
        # From uniform in a block to uniform in two: (1 + 1/12) / 2 blocks on average.
        assert 0.52 < moved[2 * size : -2 * size].mean() / size < 0.56
        inner = (at[2 * size : -2 * size] % size).astype(float)  # the last block is a short one
        assert abs(np.corrcoef(inner[:-1], inner[1:])[0, 1]) < 4 / np.sqrt(len(inner))
    spans = [np.bincount(line[i : i + 512] % size * 50 // size, minlength=50)
             for i in range(4 * 2 * size, n - 4 * 3 * size, 512)]  # fmt: skip
    expected = 512 / 50
    chi2_df = ((np.stack(spans) - expected) ** 2 / expected).sum() / (len(spans) * 49)
    assert 0.88 < chi2_df < 1.1


def test_epochs_lanes_and_sources_do_not_alias() -> None:
    """Two lanes, two epochs or two sources in one and the same permutation."""
    row_start = np.arange(65) * 64
    first = WindowedOrder(row_start, 1, lanes=4, block_rows=96)
    other = WindowedOrder(row_start, 1, source=1, lanes=4, block_rows=96)
    n = first.num_rows
    rows = first.rows(0, 2 * n)[1]
    assert not np.array_equal(rows[:n], rows[n:])
    assert not np.array_equal(rows[:n], other.rows(0, n)[1])
    step = np.diff(first._table(0)[1][:2])
    assert step == 64  # the lanes' cuts lie on shards, so equal permutations would show
    patterns = {tuple((rows[lane:n:4] % 64)[:96].tolist()) for lane in range(4)}
    assert len(patterns) == 4


@settings(max_examples=60, deadline=None)
@given(sizes=SHARDS, lanes=LANES, batch=st.integers(1, 80), world=st.integers(1, 9),
       t0=st.integers(0, 500), ranges=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 9)),
       max_size=3))  # fmt: skip
def test_ranks_share_out_the_same_samples(
    sizes: list[int], lanes: int, batch: int, world: int, t0: int, ranges: list[tuple[int, int]]
) -> None:
    """A layout that loses a sample of the step, or an audit that sees another rank than trained."""
    order = SkippingOrder(order_of(sizes, lanes, 2), Skips([(a, a + k) for a, k in ranges]))
    t1 = t0 + batch
    samples = batch_samples(order, t0, t1)
    assert np.array_equal(np.sort(samples), np.arange(t0, t1))
    assert np.array_equal(samples[batch_places(order, t0, t1)], np.arange(t0, t1))
    epochs, rows = (np.concatenate(part) for part in zip(*[
        batch_rows(order, t0, t1, *rank_span(batch, rank, world)) for rank in range(world)
    ], strict=True))  # fmt: skip
    expected = order.rows(t0, t1)
    assert np.array_equal(epochs, expected[0][samples - t0])
    assert np.array_equal(rows, expected[1][samples - t0])


def test_a_rank_takes_whole_lanes_over_an_epochs_end() -> None:
    """A batch in which an epoch ends, or samples after a rollback, that shift ranks by a lane."""
    order = order_of([7] * 29, 8, 2)  # 203 rows: 3 more than whole rounds of the lanes
    skipping = SkippingOrder(order, Skips([(100, 113)]))
    for t0 in range(0, 640, 32):
        stream = Skips([(100, 113)]).to_stream(batch_samples(skipping, t0, t0 + 32))
        torn = t0 <= 100 < t0 + 32
        for rank in range(4):
            lanes = set((stream[8 * rank : 8 * rank + 8] % 8).tolist())
            assert torn or lanes == {2 * rank, 2 * rank + 1}


def test_removed_rows_are_left_out_of_the_windowed_order_too() -> None:
    """A switch to a derived dataset that looks for the removed rows in the global order."""
    order = order_of([6, 4, 9, 5, 8], 4, 1)
    n, removed = order.num_rows, [3, 17, 30]
    stages = Stages(lines=[{"removed": removed, "position": 10}])
    skips = Skips(stages.skipped([], n, order.seed, 3 * n, order))
    derived = DerivedOrder(SkippingOrder(order, skips), removed)
    before = order.rows(0, 10)[1].tolist()
    met = [row for row in removed if row in before]
    kept = [row for row in range(n) if row not in removed]
    start = 10
    rows = [kept[row] for row in derived.rows(start, 3 * n - 9 + len(met))[1].tolist()]
    left = [row for row in order.rows(10, 3 * n)[1].tolist() if row not in removed]
    assert rows == left
    assert derived.lanes == 4 and len(derived.layout(12, 20)) == 8


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=20), lanes=st.sampled_from([1, 2, 4]),
       gone=st.sets(st.integers(0, 60), max_size=12), at=st.integers(0, 20),
       whole=st.integers(0, 19))  # fmt: skip
def test_live_shards_of_a_derived_dataset_are_its_own(
    sizes: list[int], lanes: int, gone: set[int], at: int, whole: int
) -> None:
    """Numbers of the first dataset's shards: others are evicted, or an index past the end. One of
    the shards loses all of its rows, so that later ones move up."""
    order = order_of(sizes, lanes, 1)
    n, table = order.num_rows, order.row_start
    whole, at = whole % len(sizes), at % n  # what is removed is known for four epochs
    removed = {row for row in gone if row < n} | set(range(table[whole], table[whole + 1]))
    if len(removed) == n:
        return
    stages = Stages(lines=[{"removed": sorted(removed), "position": at}])
    skips = Skips(stages.skipped([], n, order.seed, 4 * n, order))
    derived = DerivedOrder(SkippingOrder(order, skips), stages.removed)
    left = np.diff(table) - np.diff(np.searchsorted(sorted(removed), table))
    starts = np.concatenate(([0], np.cumsum(left[left > 0])))
    samples = skips.to_sample(np.arange(at, 4 * n))
    t0 = int(samples[samples >= 0][0])
    rows = derived.rows(t0, t0 + 2 * (n - len(removed)))[1]
    shards = np.searchsorted(starts, rows, side="right") - 1
    for t, shard in enumerate(shards.tolist(), start=t0):
        live = derived.live_shards(t)
        assert shard in live and np.array_equal(live, np.unique(live))
        assert len(live) <= 2 * lanes and live.max() < len(starts) - 1


def fetched(order: WindowedOrder, batch: int, nodes: int, steps: int) -> int:
    """Shards that all nodes fetch, each keeping what is live and no more."""
    kept: list[set[int]] = [set() for _ in range(nodes)]
    count, lanes = 0, order.lanes
    for t0 in range(0, steps * batch, batch):
        for node in range(nodes):
            share = (node, node + 1, nodes)
            needed = set(shards_ahead(order, order.row_start, [(t0, t0 + batch)], share))
            count += len(needed - kept[node])
            mine = range(node * lanes // nodes, -(-(node + 1) * lanes // nodes))
            kept[node] = (kept[node] | needed) & set(order.live_shards(t0 + batch, mine).tolist())
    return count


@pytest.mark.parametrize("nodes", [8, 32])
def test_nodes_fetch_the_data_once(nodes: int) -> None:
    """Without lanes every node needs every shard: its share of the rows lies in all of them."""
    shards = 2000  # lanes are cut inside shards
    order = order_of([32] * shards, 64, 4)
    steps = order.num_rows // 512
    assert fetched(order, 512, nodes, steps) <= 1.1 * shards
    if nodes == 8:
        alone = order_of([32] * shards, 1, 256)
        assert fetched(alone, 512, nodes, steps) >= 0.9 * nodes * shards


def test_a_batch_that_lanes_do_not_divide_still_trains_on_every_row() -> None:
    """B = 50 on 8 lanes and 3 ranks: the shares are of unequal lanes, and none is lost."""
    order = order_of([5, 1, 9, 3, 3, 7, 2], 8, 1)
    seen: list[int] = []
    for t0 in range(0, 300, 50):
        for rank in range(3):
            seen += batch_rows(order, t0, t0 + 50, *rank_span(50, rank, 3))[1].tolist()
    assert sorted(seen[:30] + seen[30:]) == sorted(list(range(30)) * 10)


@pytest.mark.parametrize("shards", [10_000, 10**6])
def test_many_shards_cost_little(shards: int) -> None:
    """A Python loop over shards, or a table made anew for every step."""
    row_start = np.arange(shards + 1) * 1000
    block_rows = block_rows_of(row_start, 64, 2)
    order = WindowedOrder(row_start, 1, lanes=64, block_rows=block_rows)
    _, rows = order.rows(12_345, 12_345 + 4096)
    table = order._table(0)
    assert order._table(0) is table and len(np.unique(rows)) == 4096
    assert len(np.unique(shards_of(order, rows))) <= 64 * 4
    assert sum(part.nbytes for part in table) <= 16 * (shards + 1)


def test_auto_takes_lanes_that_divide_the_batch() -> None:
    """Lanes that the batch does not hold equally tear a rank's share."""
    assert [auto_lanes(b) for b in (1, 6, 32, 96, 512, 1000)] == [1, 2, 32, 32, 64, 8]
    assert all(auto_window(c) * 2 * c == 256 for c in (1, 2, 64))
    with pytest.raises(ConfigError, match=r"data\.lanes is 3"):
        order_of([4], 3, 1)


def test_state_of_the_windowed_order_survives_json() -> None:
    """A block size that is worked out anew, by other code, would be another order."""
    mode = OrderMode(mode="windowed", lanes=8, window=16, block_rows=123)
    state = OrderState(data_digest="d" * 64, seed=3, batch=8, **mode.to_dict())
    again = OrderState.from_dict(json.loads(json.dumps(state.to_dict())))
    assert again == state and OrderMode.of(again) == mode
    old = OrderState(data_digest="d" * 64, seed=3, batch=8).to_dict()
    assert "block_rows" not in old  # states of the global order are what they were


def golden_values() -> dict[str, object]:
    cases = []
    for sizes, lanes, window, t0 in [
        ([1], 1, 1, 0),
        ([7, 3, 5, 9, 2, 2, 8], 4, 1, 33),
        ([1000] * 50, 8, 2, 49_996),
        ([5, 700, 31] * 400, 64, 4, 123_456),
    ]:
        order = order_of(sizes, lanes, window, seed=42)
        epoch, row = order.rows(t0, t0 + 8)
        cases.append({
            "shards": len(sizes), "lanes": lanes, "window": window,
            "block_rows": order.block_rows, "t0": t0, "epoch": epoch.tolist(), "row": row.tolist(),
            "layout": batch_samples(order, t0, t0 + 8).tolist(),
        })  # fmt: skip
    return {"algorithm": 1, "cases": cases}


def test_golden_order_is_kept_for_ever() -> None:
    """Any change of the algorithm would move every run that is resumed across it."""
    if os.environ.get("LEYDEN_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(golden_values(), indent=1) + "\n")
    assert json.loads(GOLDEN.read_text()) == golden_values()
