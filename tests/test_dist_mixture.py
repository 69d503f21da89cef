"""dist/mixture.py: proportions in every prefix, every row once per epoch, stages that repeat and
skip nothing, the inverse."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist.batch_layout import batch_rows
from dist.errors import ConfigError
from dist.mixed_order import MixedOrder
from dist.mixture import NEVER, Mixture, integer_weights, pattern_of, with_stage
from dist.order import Order, OrderState, rank_span
from dist.skips import SkippingOrder, Skips
from dist.windowed import WindowedOrder

GOLDEN = Path(__file__).parent / "golden" / "mixture_v1.json"
WEIGHTS = st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any)


@settings(max_examples=150, deadline=None)
@given(weights=WEIGHTS)
def test_every_prefix_keeps_the_proportions(weights: list[int]) -> None:
    """A sequence that bunches a source (all of it first, or a random draw)."""
    source = pattern_of(tuple(weights)).source
    period, k = sum(weights), np.count_nonzero(weights)
    assert len(source) == period
    bound = 1 - 1 / (2 * k - 2) if k > 1 else 0
    for s, weight in enumerate(weights):
        counts = np.cumsum(source == s)
        off = np.abs(counts - np.arange(1, period + 1) * weight / period)
        assert off.max() <= bound + 1e-9 and counts[-1] == weight


def test_a_long_period_keeps_them_too() -> None:
    """Integers that overflow, or minutes of start-up, at the largest period."""
    weights = integer_weights({"a": 0.61803398, "b": 0.314159265, "c": 0.000123456, "d": 1e-3})
    assert sum(weights) == 1 << 16
    source = pattern_of(tuple(weights)).source
    for s, weight in enumerate(weights):
        off = np.cumsum(source == s) - np.arange(1, 65537) * weight / 65536
        assert np.abs(off).max() <= 1 - 1 / 6 + 1e-9


def test_weights_are_exact_where_they_can_be() -> None:
    """0.1 as a binary fraction is no tenth; thirds need a rule for the last unit."""
    assert integer_weights({"a": 0.7, "b": 0.2, "c": 0.1}) == [7, 2, 1]
    assert integer_weights({"a": 3, "b": 0, "c": 6}) == [1, 0, 2]
    assert integer_weights({"a": 1.0}) == [1]
    thirds = integer_weights({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    assert thirds == [1, 1, 1]
    for wrong, what in (
        ({"a": -1.0, "b": 1.0}, "source a is -1.0"), ({"a": float("nan")}, "source a is nan"),
        ({"a": 0.0, "b": 0.0}, "all sources"), ({"a": 1.0, "b": 1e-7}, "source b is below"),
        ({"a": float("inf")}, "source a is inf"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=what):
            integer_weights(wrong)


def mixed(
    sizes: list[list[int]], stages: list[tuple[int, list[int]]], lanes: int, seed: int = 5
) -> MixedOrder:
    """sizes: shards of each source; stages: (unit, weights)."""
    made: list[Any] = []
    for unit, weights in stages:
        made = with_stage(made, unit, weights)
    tables = [np.concatenate(([0], np.cumsum(one))) for one in sizes]
    orders = [
        WindowedOrder(table, seed, source=s, lanes=lanes, block_rows=5)
        if lanes > 1 else Order(int(table[-1]), seed, s)
        for s, table in enumerate(tables)
    ]  # fmt: skip
    return MixedOrder(Mixture(made), orders, lanes)


# Up to three sources of a few shards; weights of three stages, the third source perhaps added
# later; lanes.
SIZES = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=3, max_size=3)
STAGES = st.tuples(
    st.lists(st.integers(0, 5), min_size=2, max_size=2).filter(any),
    st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any),
    st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any),
)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, weights=STAGES, lanes=st.sampled_from([1, 2, 4]),
       starts=st.tuples(st.integers(1, 40), st.integers(1, 40)))  # fmt: skip
def test_stages_repeat_and_skip_no_row(
    sizes: list[list[int]], weights: Any, lanes: int, starts: tuple[int, int]
) -> None:
    """A source whose counter starts anew at a reweighting (Megatron's), or that jumps: its epochs
    would repeat rows, or lack them."""
    stages = list(zip((0, starts[0], starts[0] + starts[1]), weights, strict=True))
    order = mixed(sizes, stages, lanes)
    end = 150 * lanes
    epochs, rows = order.rows(0, end)
    source = np.searchsorted(order.row_offset, rows, side="right") - 1
    for s in range(3):
        own = rows[source == s] - order.row_offset[s]
        n = order.orders[s].num_rows
        expected = order.orders[s].rows(0, len(own))
        if lanes == 1:
            assert np.array_equal(own, expected[1])
        for epoch in range(len(own) // n):
            mine = own[epochs[source == s] == epoch]
            assert sorted(mine.tolist()) == list(range(n))
        assert sorted(own.tolist()) == sorted(expected[1].tolist())
    for epoch in np.unique(epochs):
        here = np.flatnonzero(epochs == epoch)
        assert np.array_equal(order.positions(rows[here], int(epoch)), here)
    counts = order.mixture.counts_at(150)
    assert [int(np.count_nonzero(source == s)) for s in range(3)] == [c * lanes for c in counts]


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, weights=STAGES, lanes=st.sampled_from([1, 4]), batch=st.integers(1, 24),
       worlds=st.lists(st.integers(1, 5), min_size=12, max_size=12),
       stops=st.sets(st.integers(1, 11), max_size=3))  # fmt: skip
def test_interrupted_equals_uninterrupted(
    sizes: list[list[int]], weights: Any, lanes: int, batch: int, worlds: list[int], stops: set[int]
) -> None:
    """Stages rebuilt from a stored state that give other rows than those planned at the start, on
    any number of ranks and across a rollback's gap."""
    plan = [(0, weights[0]), (-(-3 * batch // lanes), weights[1])]
    whole = mixed(sizes, plan, lanes)
    assert len(sizes) == 3
    skips = Skips([(2 * batch + 1, 2 * batch + 4)])
    stored = json.dumps(whole.mixture.stages)
    seen: list[int] = []
    order = whole
    for step, world in enumerate(worlds):
        if step in stops:  # another process reads the state
            order = MixedOrder(Mixture(json.loads(stored)), whole.orders, whole.lanes)
        skipping = SkippingOrder(order, skips)
        t0, t1 = step * batch, (step + 1) * batch
        met: list[int] = []
        for rank in range(world):
            met += batch_rows(skipping, t0, t1, *rank_span(batch, rank, world))[1].tolist()
        assert sorted(met) == sorted(skipping.rows(t0, t1)[1].tolist())
        seen += skipping.rows(t0, t1)[1].tolist()
    assert seen == SkippingOrder(whole, skips).rows(0, 12 * batch)[1].tolist()


def test_when_says_never_for_a_source_that_is_switched_off() -> None:
    """An audit that names a step for a row that no step trains on."""
    order = mixed([[4], [6]], [(0, [1, 1]), (6, [1, 0])], 1)
    source, count = order.mixture.at(np.arange(40))
    assert count[source == 1].tolist() == [0, 1, 2]
    met = order.orders[1].rows(0, 6)[1].tolist()
    found = [order.when(1, row, 0) for row in met]
    assert found[:3] == np.flatnonzero(source == 1).tolist() and found[3:] == [NEVER] * 3


def test_whole_lanes_of_every_source() -> None:
    """Units that are cut by lanes: a rank would read other lanes of a source from unit to unit."""
    order = mixed([[9] * 12, [7] * 20], [(0, [2, 1]), (11, [1, 3])], 4)
    for t0 in range(0, 400, 16):
        for rank in range(2):
            t = order.layout(t0, t0 + 16)[rank * 8 : rank * 8 + 8]
            assert set((t % 4).tolist()) == {2 * rank, 2 * rank + 1}
    live = order.live_shards(64)
    assert live.max() < 32 and (live >= 12).any() and (live < 12).any()


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, weights=STAGES, lanes=st.sampled_from([1, 2, 4]), start=st.integers(1, 30))
def test_live_shards_are_those_of_every_source(
    sizes: list[list[int]], weights: Any, lanes: int, start: int
) -> None:
    """Numbers of one source's table taken for another's, or a source's place in samples taken for
    units: what is about to be read is evicted."""
    tables = [np.concatenate(([0], np.cumsum(one))) for one in sizes]
    orders = [WindowedOrder(table, 5, source=s, lanes=lanes, block_rows=2)
              for s, table in enumerate(tables)]  # fmt: skip
    plan = with_stage(with_stage([], 0, [*weights[0], 0]), start, weights[1])
    order = MixedOrder(Mixture(plan), orders, lanes)
    starts = np.concatenate(([0], np.cumsum(np.concatenate([np.diff(table) for table in tables]))))
    rows = order.rows(0, 60 * lanes)[1]
    shards = np.searchsorted(starts, rows, side="right") - 1
    most = sum(len(one) for one in sizes)
    for t, shard in enumerate(shards.tolist()):
        live = order.live_shards(t)
        assert shard in live and live.max() < most
        if t % lanes == 0:
            counts = order.mixture.counts_at(t // lanes)
            first = np.cumsum([0, *(len(one) for one in sizes)])
            expected = [first[s] + orders[s].live_shards(counts[s] * lanes) for s in range(3)]
            assert live.tolist() == np.concatenate(expected).tolist()


def test_state_is_small() -> None:
    """A list of samples or a pattern in the state: it is written with every checkpoint."""
    stages: list[Any] = []
    for unit in range(8):
        stages = with_stage(stages, unit * 10**9, [8192 + unit, *[8191] * 6, 8190])
    state = OrderState(data_digest="d" * 64, seed=1, t=10**12, batch=4096, stages=stages)
    assert len(json.dumps(state.to_dict())) <= 1024 + 64 * 8 * 8


def golden_values() -> dict[str, Any]:
    order = mixed([[5, 9], [30], [2, 2, 2]], [(0, [7, 2]), (13, [1, 1, 1]), (29, [0, 3, 5])], 4)
    single = mixed([[5, 9], [30], [2]], [(0, [3, 2]), (7, [1, 5, 1])], 1)
    return {
        "patterns": {str(w): pattern_of(w).source.tolist() for w in ((7, 2, 1), (3, 5, 2, 9))},
        "stages": order.mixture.stages,
        "rows": [order.rows(t, t + 12)[1].tolist() for t in (0, 50, 110, 5000)],
        "single": [single.rows(t, t + 12)[1].tolist() for t in (0, 1000)],
    }


def test_golden_mixture_is_kept_for_ever() -> None:
    """Any change of the pattern would move every run that is resumed across it."""
    if os.environ.get("LEYDEN_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(golden_values(), indent=1) + "\n")
    assert json.loads(GOLDEN.read_text()) == golden_values()
