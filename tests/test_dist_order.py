"""The order: a bijection, its inverse, its statistics, and its golden values."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist.errors import ConfigError
from dist.order import (
    Order,
    OrderState,
    SequentialOrder,
    derive_key,
    num_micro_batches,
    permute,
    permute_inverse,
    rank_span,
)

GOLDEN = Path(__file__).parent / "golden" / "order_v1.json"
SIZES = [1, 2, 3, 17, 2**10 - 1, 2**10, 2**10 + 1, 4**5 + 1, 4**8 + 1, 2**16 - 1, 10**6]


@pytest.mark.parametrize("n", SIZES)
def test_permutation_is_a_bijection_with_an_inverse(n: int) -> None:
    """A cipher that loses index N-1 when N = 4^k + 1 (as Grain's does) would show here."""
    key = derive_key(7, 0, 0, "row")
    rows = permute(np.arange(n), n, key)
    assert np.array_equal(np.sort(rows), np.arange(n))
    assert np.array_equal(permute_inverse(rows, n, key), np.arange(n))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_every_size_and_key_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    """A size whose halves do not cover it, or a key with a fixed collision, would show here."""
    key = derive_key(seed, epoch, 0, "row")
    assert len(set(permute(np.arange(n), n, key).tolist())) == n


@pytest.mark.parametrize("n", [10**9, 10**12, (1 << 62) - 1])
def test_large_orders_are_invertible_where_sampled(n: int) -> None:
    """An overflow of 64-bit arithmetic at large N would show here."""
    key = derive_key(3, 1, 0, "row")
    position = np.random.default_rng(0).integers(0, n, 50_000)
    position = np.unique(np.concatenate((position, [0, n - 1])))
    rows = permute(position, n, key)
    assert rows.min() >= 0 and rows.max() < n
    assert len(np.unique(rows)) == len(rows)
    assert np.array_equal(permute_inverse(rows, n, key), position)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n", [10**5, 10**6])
def test_neighbours_are_uncorrelated(n: int, seed: int) -> None:
    """Too few rounds (Grain's default of 4 gives r = 0.4 at 10^6) would show here."""
    rows = permute(np.arange(n), n, derive_key(seed, 0, 0, "row")).astype(float)
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 4 / np.sqrt(n)


def test_batches_spread_evenly_over_shards() -> None:
    """An order that favours shards would show as chi2/df away from 1."""
    n, shards, batch = 10**6, 64, 4096
    rows = permute(np.arange(n), n, derive_key(5, 0, 0, "row"))
    counts = np.stack(
        [
            np.bincount(rows[i : i + batch] * shards // n, minlength=shards)
            for i in range(0, n - batch, batch)
        ]
    )
    expected = batch / shards
    chi2_df = ((counts - expected) ** 2 / expected).sum() / (counts.shape[0] * (shards - 1))
    assert 0.9 < chi2_df < 1.1


def test_order_needs_no_memory_at_a_trillion_rows() -> None:
    """A table of N entries anywhere in the order would show here."""
    tracemalloc.start()
    order = Order(10**12, seed=1)
    epoch, row = order.rows(10**12 - 512, 10**12 + 512)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert epoch[0] == 0 and epoch[-1] == 1 and len(np.unique(row[:512])) == 512


def test_epochs_and_seeds_do_not_alias() -> None:
    """Keys made of seed + epoch repeat (seed 1, epoch 1) as (seed 2, epoch 0)."""
    first = Order(1000, seed=1).rows(1000, 2000)[1]
    assert not np.array_equal(first, Order(1000, seed=2).rows(0, 1000)[1])
    assert not np.array_equal(first, Order(1000, seed=1).rows(0, 1000)[1])
    assert not np.array_equal(first, Order(1000, seed=1, source=1).rows(1000, 2000)[1])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 200),
    batches=st.lists(st.integers(1, 37), min_size=1, max_size=12),
    worlds=st.lists(st.integers(1, 5), min_size=12, max_size=12),
)
def test_any_batches_on_any_ranks_give_the_one_sequence(
    n: int, batches: list[int], worlds: list[int]
) -> None:
    """A tail dropped or doubled by a rank's share, or at an epoch's end, would show here."""
    order, t, seen = Order(n, seed=9), 0, []
    for batch, world in zip(batches, worlds, strict=False):
        for r in range(world):
            lo, hi = rank_span(batch, r, world)
            seen += order.rows(t + lo, t + hi)[1].tolist()
        t += batch
    assert seen == order.rows(0, t)[1].tolist()
    for epoch in range(t // n):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_when_is_the_inverse_of_rows() -> None:
    """An audit that names another step than the one that trained on the row would show here."""
    order = Order(777, seed=4)
    epochs, rows = order.rows(700, 900)
    found = [order.when(int(r), int(e)) for e, r in zip(epochs, rows, strict=True)]
    assert found == list(range(700, 900))


def test_micro_batches_are_equal_on_all_ranks() -> None:
    """Ranks with fewer micro-batches than others hang in the next collective."""
    assert num_micro_batches(8, 3, 2) == 2
    assert num_micro_batches(1, 4, 8) == 1
    with pytest.raises(ConfigError, match="global batch 0"):
        num_micro_batches(0, 1, 1)


def test_out_of_range_is_refused() -> None:
    """A wrong position would map to a plausible row and train on it."""
    with pytest.raises(ValueError, match="not all in"):
        permute(np.array([5]), 5, derive_key(0, 0, 0, "row"))
    with pytest.raises(ValueError, match="not in"):
        SequentialOrder(4).rows(0, 5)
    with pytest.raises(ConfigError, match="empty"):
        Order(0, seed=0)


def test_state_survives_json_and_refuses_another_algorithm() -> None:
    """A state of a later algorithm, read as this one, would silently change the order."""
    state = OrderState(data_digest="d" * 64, seed=3, step=4, t=32, batch=8)
    assert OrderState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    with pytest.raises(ConfigError, match="algorithm 2"):
        OrderState.from_dict({**state.to_dict(), "algorithm": 2})
    with pytest.raises(ConfigError, match="unknown keys"):
        OrderState.from_dict({**state.to_dict(), "shuffle": True})


def golden_values() -> dict[str, object]:
    cases = []
    for n, seed, source, t0 in [
        (1, 0, 0, 0),
        (17, 1, 0, 10),
        (65537, 42, 0, 65530),
        (10**6, 7, 3, 123456),
        (10**12, 2**40, 1, 10**12 - 3),
    ]:
        epoch, row = Order(n, seed, source).rows(t0, t0 + 8)
        cases.append(
            {
                "n": n,
                "seed": seed,
                "source": source,
                "t0": t0,
                "epoch": epoch.tolist(),
                "row": row.tolist(),
            }
        )
    return {"algorithm": 1, "key": derive_key(1, 2, 3, "row").tolist(), "cases": cases}


def test_golden_order_is_kept_for_ever() -> None:
    """Any change of the algorithm would move every run that is resumed across it."""
    assert json.loads(GOLDEN.read_text()) == golden_values()
