"""How a batch lies before it is cut for the ranks: by sample, or lane by lane.

An order of lanes (`lanes` above 1; dist/windowed.py) says by `layout(t0, t1)` in which order ranks
take a batch's samples, so that a rank reads few shards. The samples of a step are the same.
Whoever asks which rank has a row - loader, audit, replay, bundle - asks here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]


def lane_by_lane(t: I64, p: I64, lanes: int) -> I64:
    """Samples t (k,), which stand at positions p (k,) of the stream, lane by lane."""
    return t[np.argsort(p % lanes, kind="stable")]


def batch_samples(order: Any, t0: int, t1: int) -> I64:
    """The samples of a batch [t0, t1) in the order in which rank_span cuts it."""
    if getattr(order, "lanes", 1) > 1:
        return order.layout(t0, t1)
    return np.arange(t0, t1, dtype=np.int64)


def batch_rows(order: Any, t0: int, t1: int, lo: int, hi: int) -> tuple[I64, I64]:
    """(epoch, row) at places [lo, hi) of the batch [t0, t1), two (hi - lo,) arrays."""
    if getattr(order, "lanes", 1) > 1:
        return order.at(order.layout(t0, t1)[lo:hi])
    return order.rows(t0 + lo, t0 + hi)


def batch_places(order: Any, t0: int, t1: int) -> I64:
    """The place of each sample t0 <= t < t1 in its batch: the inverse of batch_samples."""
    places = np.empty(t1 - t0, np.int64)
    places[batch_samples(order, t0, t1) - t0] = np.arange(t1 - t0)
    return places


def shards_ahead(
    order: Any, row_start: I64, batches: Sequence[tuple[int, int]], share: tuple[int, int, int]
) -> list[int]:
    """Shards that some ranks need for these batches [t0, t1), in order of first use.

    share: (first rank, one past the last, ranks in all), such as the ranks of a node.
    """
    first, end, world = share
    rows = [np.empty(0, np.int64)]
    for t0, t1 in batches:
        lo, hi = first * (t1 - t0) // world, end * (t1 - t0) // world
        rows.append(batch_rows(order, t0, t1, lo, hi)[1])
    found = np.searchsorted(row_start, np.concatenate(rows), side="right") - 1
    shards, at = np.unique(found, return_index=True)
    return [int(shard) for shard in shards[np.argsort(at)]]
