"""An order with parts of its stream left out: rows that a rollback must not meet again.

The stream is what the order gives without gaps: position p = epoch * rows + place in the epoch.
Samples t are counted on without gaps too: sample t is the t-th position that is not left out.
Leaving out a range changes nothing before it, so it may be added to a run that goes back to any
sample at or before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dist.batch_layout import lane_by_lane
from dist.errors import DataRefused
from dist.run_dir import RunDir

I64 = NDArray[np.int64]
SKIPPED = "guard/skipped.jsonl"


class Stream(Protocol):
    """Order or SequentialOrder of dist.order."""

    num_rows: int

    def rows(self, t0: int, t1: int) -> tuple[I64, I64]: ...


def merge_ranges(ranges: Iterable[Iterable[int]]) -> list[list[int]]:
    """Disjoint, sorted, non-empty ranges [p0, p1) that cover what these cover."""
    merged: list[list[int]] = []
    for p0, p1 in sorted((int(a), int(b)) for a, b in ranges):
        if p0 >= p1:
            continue
        if merged and p0 <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], p1)
        else:
            merged.append([p0, p1])
    return merged


class Skips:
    """Positions left out, and the samples that remain."""

    def __init__(self, ranges: Iterable[Iterable[int]] = ()) -> None:
        self.ranges = merge_ranges(ranges)
        bounds = np.array(self.ranges, np.int64).reshape(-1, 2)
        self._start, self._end = bounds[:, 0], bounds[:, 1]
        # left_out: (ranges + 1,) positions left out before each range.
        self._left_out = np.concatenate(([0], np.cumsum(self._end - self._start)))

    def to_stream(self, t: I64) -> I64:
        """Position of each sample, (k,) -> (k,)."""
        t = np.asarray(t, np.int64)
        passed = np.searchsorted(self._start - self._left_out[:-1], t, side="right")
        return t + self._left_out[passed]

    def to_sample(self, p: I64) -> I64:
        """Sample at each position, (k,) -> (k,); -1 where it is left out."""
        p = np.asarray(p, np.int64)
        before = np.searchsorted(self._start, p, side="right")
        ends = np.concatenate(([np.iinfo(np.int64).min], self._end))
        return np.where(p < ends[before], -1, p - self._left_out[before])

    def left_out_before(self, p: int) -> int:
        """How many positions below p are left out."""
        return sum(max(0, min(p1, p) - p0) for p0, p1 in self.ranges)


class SkippingOrder:
    """`order` without `skips`; the samples before the first of them are the order's own."""

    def __init__(self, order: Any, skips: Skips) -> None:
        self.num_rows, self._order, self.skips = order.num_rows, order, skips
        self.stream = order
        """The order without gaps."""
        self.lanes: int = getattr(order, "lanes", 1)

    def rows(self, t0: int, t1: int) -> tuple[I64, I64]:
        """(epoch, row) of each sample t0 <= t < t1, two (t1 - t0,) arrays."""
        if not self.skips.ranges or t1 <= t0:
            return self._order.rows(t0, t1)
        p = self.skips.to_stream(np.arange(t0, t1, dtype=np.int64))
        # A skip tears the samples into stretches of the stream.
        parts = [
            self._order.rows(int(one[0]), int(one[-1]) + 1)
            for one in np.split(p, np.flatnonzero(np.diff(p) > 1) + 1)
        ]
        return np.concatenate([e for e, _ in parts]), np.concatenate([r for _, r in parts])

    def at(self, t: I64) -> tuple[I64, I64]:
        """(epoch, row) of samples t (k,), in any order."""
        return self._order.at(self.skips.to_stream(t))

    def layout(self, t0: int, t1: int) -> I64:
        """See WindowedOrder: lanes are those of the stream, so a gap moves no lane to a rank."""
        t = np.arange(t0, t1, dtype=np.int64)
        p = self.skips.to_stream(t)
        if hasattr(self.stream, "lane_places"):  # of a mixture: each source has its own stream
            p = self.stream.lane_places(p)
        return lane_by_lane(t, p, self.lanes)

    def live_shards(self, t: int, lanes: Any = None) -> I64:
        """As WindowedOrder.live_shards; the global order has none, as all its shards are live."""
        return self._order.live_shards(int(self.skips.to_stream(np.array([t]))[0]), lanes)


def read_skipped(run: RunDir) -> list[list[int]]:
    """Ranges of the stream that rollbacks of a run left out; [] if none did."""
    lines = run.read_lines(SKIPPED)
    try:
        return merge_ranges(line["stream"] for line in lines)
    except (KeyError, TypeError, ValueError):
        raise DataRefused(
            f"{run.path / SKIPPED} holds a line without `stream: [p0, p1]`; it was edited"
        ) from None


def count_rollbacks(run: RunDir) -> int:
    """How often a run went back."""
    return len(run.read_lines(SKIPPED))
