"""One source's order without the rows that its derived versions lack, in closed form.

The stream is what the source's first version gives without gaps: position p = epoch * rows +
place. A removal holds rows of that version and the position from which they are left out, in this
epoch and all later ones. Samples are counted on without gaps, so nothing before the position
changes, and the samples of any later epoch are found without a list of all its positions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist.order import each_value

I64 = NDArray[np.int64]
LEFT_OUT = -1
KEPT_EPOCHS = 3
Removal = tuple[int, Sequence[int]]
"""(position of the stream, rows of the first version that are left out from there on)"""


class ThinnedOrder:
    """`stream` without removed rows; rows are numbered as in the first version."""

    def __init__(self, stream: Any, removals: Sequence[Removal]) -> None:
        """stream: Order or WindowedOrder of the first version; a row is in one removal at most."""
        self.stream, self.num_rows = stream, int(stream.num_rows)
        self.lanes: int = getattr(stream, "lanes", 1)
        self._removals = [(int(p), np.array(rows, np.int64)) for p, rows in removals]
        self.removed = np.sort(np.concatenate([np.empty(0, np.int64), *self._rows()]))
        """(k,) all rows that are left out in the end."""
        if len(np.unique(self.removed)) < len(self.removed) or len(self.removed) >= self.num_rows:
            raise ValueError(f"{len(self.removed)} rows of {self.num_rows} are left out, or twice")
        self._gone: OrderedDict[int, I64] = OrderedDict()
        # Epochs are of one length but where a removal begins: (e,) epochs from which on each has
        # as many samples as this one, and (e,) samples before it.
        first = [p // self.num_rows for p, _ in self._removals]
        self._of_removal = [
            (e, int(np.count_nonzero(self.stream.positions(rows, e) >= p)), len(rows))
            for e, (p, rows) in zip(first, self._removals, strict=True)
        ]
        self._bounds = np.unique([0, *first, *(e + 1 for e in first)]).astype(np.int64)
        self._starts = self._samples_before(self._bounds)
        self._sizes = self._samples_before(self._bounds + 1) - self._starts

    def rows(self, t0: int, t1: int) -> tuple[I64, I64]:
        """(epoch, row) of each sample t0 <= t < t1, two (t1 - t0,) arrays."""
        return self.at(np.arange(t0, t1, dtype=np.int64))

    def at(self, t: I64) -> tuple[I64, I64]:
        """(epoch, row) of samples t (k,), in any order."""
        return self.stream.at(self.to_stream(t))

    def positions(self, rows: NDArray[np.integer], epoch: int) -> I64:
        """Samples at which rows (k,) come in an epoch, (k,); LEFT_OUT where they do not."""
        return self.to_sample(self.stream.positions(rows, epoch))

    def to_stream(self, t: I64) -> I64:
        """Position of each sample, (k,) -> (k,)."""
        t = np.asarray(t, np.int64)
        number = np.searchsorted(self._starts, t, side="right") - 1
        epoch = self._bounds[number] + (t - self._starts[number]) // self._sizes[number]
        within = t - self._samples_before(epoch)
        found = np.empty_like(t)
        for e, here in each_value(epoch):
            gone = self._gone_in(e)
            passed = np.searchsorted(gone - np.arange(len(gone)), within[here], side="right")
            found[here] = e * self.num_rows + within[here] + passed
        return found

    def to_sample(self, p: I64) -> I64:
        """Sample at each position, (k,) -> (k,); LEFT_OUT where there is none."""
        epoch, place = np.divmod(np.asarray(p, np.int64), self.num_rows)
        found = np.empty_like(place)
        for e, here in each_value(epoch):
            gone = self._gone_in(e)
            before = np.searchsorted(gone, place[here])
            met = np.isin(place[here], gone)
            found[here] = np.where(met, LEFT_OUT, place[here] - before)
        return np.where(found == LEFT_OUT, LEFT_OUT, found + self._samples_before(epoch))

    def live_shards(self, t: int, lanes: Any = None) -> I64:
        """As WindowedOrder.live_shards, by number in the first version's table."""
        return self.stream.live_shards(int(self.to_stream(np.array([t]))[0]), lanes)

    @property
    def row_start(self) -> I64:
        """Of the first version's shards, (shards + 1,)."""
        return self.stream.row_start

    def _rows(self) -> list[I64]:
        return [rows for _, rows in self._removals]

    def _samples_before(self, epoch: I64) -> I64:
        """Samples before epochs (k,)."""
        left = np.zeros_like(epoch)
        for first, in_first, each in self._of_removal:
            left += np.where(epoch > first, in_first + (epoch - first - 1) * each, 0)
        return epoch * self.num_rows - left

    def _gone_in(self, epoch: int) -> I64:
        """Places of an epoch that are left out, ascending."""
        gone = self._gone.get(epoch)
        if gone is None:
            at = [np.empty(0, np.int64)]
            for position, rows in self._removals:
                if position < (epoch + 1) * self.num_rows:
                    found = self.stream.positions(rows, epoch)
                    at.append(found[found >= position])
            gone = self._gone[epoch] = np.sort(np.concatenate(at)) - epoch * self.num_rows
            if len(self._gone) > KEPT_EPOCHS:
                self._gone.popitem(last=False)
        return gone
