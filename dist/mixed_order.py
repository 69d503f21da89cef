"""The training order of several sources: which row of which of them each sample is, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist.batch_layout import lane_by_lane
from dist.mixture import NEVER, Mixture

I64 = NDArray[np.int64]


class MixedOrder:
    """The training order of several sources, over the rows of their tables laid end to end."""

    def __init__(self, mixture: Mixture, orders: Sequence[Any], lanes: int = 1) -> None:
        """orders: of each source (Order, WindowedOrder; ThinnedOrder or DerivedOrder of them where
        rows were removed); lanes: C, 1 in the global order."""
        self.mixture, self.orders, self.lanes = mixture, list(orders), lanes
        sizes = [order.num_rows for order in orders]
        self.row_offset = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
        """(sources + 1,) first row of each source."""
        self.num_rows = int(self.row_offset[-1])
        self._is_thinned = any(hasattr(order, "to_stream") for order in orders)

    def rows(self, t0: int, t1: int) -> tuple[I64, I64]:
        """(epoch of its source, row) of each sample t0 <= t < t1, two (t1 - t0,) arrays."""
        if not 0 <= t0 <= t1:
            raise ValueError(f"samples [{t0}, {t1}) do not exist")
        return self.at(np.arange(t0, t1, dtype=np.int64))

    def at(self, t: I64) -> tuple[I64, I64]:
        """(epoch of its source, row) of samples t (k,), in any order."""
        unit, lane = np.divmod(t, np.int64(self.lanes))
        source, count = self.mixture.at(unit)
        epoch, row = np.empty_like(source), np.empty_like(source)
        for s in np.unique(source):
            here = source == s
            own = count[here] * self.lanes + lane[here]
            epoch[here], row[here] = self.orders[s].at(own)
            row[here] += self.row_offset[s]
        return epoch, row

    def layout(self, t0: int, t1: int) -> I64:
        """As WindowedOrder.layout."""
        t = np.arange(t0, t1, dtype=np.int64)
        return lane_by_lane(t, self.lane_places(t), self.lanes)

    def own_places(self, t: I64) -> tuple[I64, I64]:
        """(source, position of that source's own stream) of samples t (k,), two (k,) arrays.

        Neither stages nor removals change which row such a position has.
        """
        unit, lane = np.divmod(np.asarray(t, np.int64), np.int64(self.lanes))
        source, count = self.mixture.at(unit)
        own = count * self.lanes + lane
        for s in np.unique(source):
            if hasattr(self.orders[s], "to_stream"):
                own[source == s] = self.orders[s].to_stream(own[source == s])
        return source, own

    def from_own(self, source: I64, own: I64) -> I64:
        """The inverse of own_places: samples (k,), NEVER where there is none."""
        found = np.full(len(source), NEVER, np.int64)
        for s in np.unique(source):
            here = source == s
            order = self.orders[s]
            at = order.to_sample(own[here]) if hasattr(order, "to_sample") else own[here]
            found[here] = self._samples_of(int(s), at)
        return found

    def own_position(self, source: int, sample: int) -> int:
        """Position of a source's own stream of one of its samples."""
        order = self.orders[source]
        if not hasattr(order, "to_stream"):
            return sample
        return int(order.to_stream(np.array([sample]))[0])

    def epochs_of(self, source: int, samples: int) -> int:
        """Epochs that a source's first `samples` samples touch."""
        last = self.own_position(source, samples - 1) if samples else -1
        return last // self.stream_rows(source) + 1

    def stream_rows(self, source: int) -> int:
        """Rows of a source's first version: the length of its epochs in its own stream."""
        order = self.orders[source]
        return int(getattr(order, "stream", order).num_rows)

    def lane_places(self, t: I64) -> I64:
        """What, modulo `lanes`, is the lane that each sample (k,) is read from.

        A source's lanes are those of its stream, so a removed row moves no lane to another rank.
        """
        return self.own_places(t)[1] if self._is_thinned else np.asarray(t, np.int64)

    def own_counts(self, t: int) -> list[int]:
        """Samples of each source among the samples before t."""
        unit, lane = divmod(t, self.lanes)
        counts = [count * self.lanes for count in self.mixture.counts_at(unit)]
        if lane:
            counts[int(self.mixture.at(np.array([unit]))[0][0])] += lane
        return counts

    def when(self, source: int, row: int, epoch: int) -> int:
        """The sample at which a source's row comes in one of its epochs; NEVER if it does not."""
        rows = np.array([self.row_offset[source] + row])
        return int(self.positions(rows, epoch)[0])

    def positions(self, rows: NDArray[np.integer], epoch: int) -> I64:
        """Samples at which rows (k,) come in that epoch of their sources, (k,); or NEVER."""
        rows = np.asarray(rows, np.int64)
        source = np.searchsorted(self.row_offset, rows, side="right") - 1
        found = np.full(len(rows), NEVER, np.int64)
        for s in np.unique(source):
            here = source == s
            own = self.orders[s].positions(rows[here] - self.row_offset[s], epoch)
            found[here] = self._samples_of(int(s), own)
        return found

    def _samples_of(self, source: int, own: I64) -> I64:
        """When the samples `own` (k,) of a source come, (k,); NEVER also for those of NEVER."""
        count, lane = np.divmod(own, np.int64(self.lanes))
        unit = self.mixture.units_of(source, count)
        return np.where((unit == NEVER) | (own == NEVER), NEVER, unit * self.lanes + lane)

    def live_shards(self, t: int, lanes: Any = None) -> I64:
        """As WindowedOrder.live_shards, by number in the sources' tables laid end to end."""
        counts = self.mixture.counts_at(t // self.lanes)
        live, offset = [np.empty(0, np.int64)], 0
        for order, count in zip(self.orders, counts, strict=True):
            live.append(offset + order.live_shards(count * self.lanes, lanes))
            offset += len(order.row_start) - 1
        return np.concatenate(live)
