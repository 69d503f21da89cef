"""Which examples share a row: best-fit decreasing, in closed classes, once and for all.

The index is a function of the lengths and the row's width alone: no seed, no rank, no clock. So
the rows of the index can take the place of rows everywhere (order, resume, who-saw), on any
number of ranks. Items of one length and rows with equal room are handled together, so 10^7
lengths take seconds; the rows are those of the plain algorithm (Johnson 1973: at most 11/9 of the
fewest possible and one).
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PackIndex:
    """Rows of examples. Row i holds examples row_splits[i] to row_splits[i + 1], ascending."""

    examples: I32
    """(n,) every example once."""
    row_splits: I64
    """(rows + 1,)"""

    @property
    def num_rows(self) -> int:
        return len(self.row_splits) - 1

    def examples_of(self, row: int) -> I32:
        """(k,) examples of a row."""
        return self.examples[self.row_splits[row] : self.row_splits[row + 1]]

    def rows_of(self, examples: NDArray[np.integer]) -> I64:
        """(k,) row of each of the given examples (k,)."""
        row = np.empty(len(self.examples), np.int64)
        row[self.examples] = np.repeat(np.arange(self.num_rows), np.diff(self.row_splits))
        return row[examples]

    def without(self, examples: NDArray[np.integer]) -> tuple[PackIndex, I64]:
        """(the index of a shard that lacks these examples, rows that are gone, ascending).

        The rows that stay hold what they held. ValueError if one would lose some of it only.
        """
        gone = np.zeros(len(self.examples), bool)
        gone[examples] = True
        sizes = np.diff(self.row_splits)
        row = np.repeat(np.arange(self.num_rows), sizes)
        lost = np.bincount(row[gone[self.examples]], minlength=self.num_rows)
        torn = np.flatnonzero((lost > 0) & (lost < sizes))
        if len(torn):
            raise ValueError(f"row {torn[0]} would lose {lost[torn[0]]} of {sizes[torn[0]]}")
        number = np.cumsum(~gone) - 1
        kept = PackIndex(
            examples=number[self.examples[~gone[self.examples]]].astype(np.int32),
            row_splits=np.concatenate(([0], np.cumsum(sizes[lost == 0]))).astype(np.int64),
        )
        return kept, np.flatnonzero(lost)


def one_a_row(num_examples: int) -> PackIndex:
    """The index of padded rows: each example alone."""
    return PackIndex(
        examples=np.arange(num_examples, dtype=np.int32),
        row_splits=np.arange(num_examples + 1, dtype=np.int64),
    )


def pack_best_fit(lengths: NDArray[np.integer], width: int) -> PackIndex:
    """Rows of at most `width` tokens from examples of `lengths` (n,), each in [1, width].

    Rows are numbered by their first example, so that the first rows are no special sort of rows.
    Raises ValueError for a length that does not fit.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= width:
        raise ValueError(f"lengths {lengths.min()} to {lengths.max()} in rows of {width}")
    # Narrow numbers are sorted by radix.
    key = (width - lengths).astype(np.uint16 if width < 1 << 16 else np.uint32)
    longest_first = np.argsort(key, kind="stable")
    packing = _Rows(width)
    start = 0
    counts = np.bincount(lengths, minlength=1)
    # bins: (n,) in the order of longest_first.
    bins = np.empty(len(lengths), np.int32)
    for length in np.flatnonzero(counts)[::-1].tolist():
        stop = start + int(counts[length])
        packing.place(length, bins[start:stop])
        start = stop
    bin_of = np.empty(len(lengths), np.int32)
    bin_of[longest_first] = bins
    # Of equal indices the last written stays: each bin's smallest example.
    first = np.empty(packing.num_rows, np.int64)
    first[bin_of[::-1]] = np.arange(len(lengths))[::-1]
    row_of_bin = np.empty(packing.num_rows, np.int32)
    row_of_bin[np.argsort(first)] = np.arange(packing.num_rows)
    rows = row_of_bin[bin_of]
    splits = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=packing.num_rows))))
    return PackIndex(
        examples=np.argsort(rows, kind="stable").astype(np.int32),
        row_splits=splits.astype(np.int64),
    )


class _Rows:
    """Open rows by the room that they have left."""

    def __init__(self, width: int) -> None:
        self._width = width
        self.num_rows = 0
        self._rows: dict[int, list[I32]] = {}
        self._rooms: list[int] = []
        """Keys of _rows in ascending order."""

    def place(self, length: int, out: I32) -> None:
        """Put len(out) items of `length` where they fit best; `out` receives their rows."""
        done = 0
        while done < len(out):
            at = bisect.bisect_left(self._rooms, length)
            if at == len(self._rooms):
                self._open(-(-(len(out) - done) // (self._width // length)))
                continue
            # Until it holds no more, a row of the least room that serves stays the best fit.
            room = self._rooms[at]
            each = room // length
            rows = self._take(room, -(-(len(out) - done) // each))
            items = min(len(rows) * each, len(out) - done)
            out[done : done + items] = np.repeat(rows, each)[:items]
            done += items
            in_last = items - (len(rows) - 1) * each
            self._put(room - each * length, rows[:-1])
            self._put(room - in_last * length, rows[-1:])

    def _open(self, count: int) -> None:
        self._put(self._width, np.arange(self.num_rows, self.num_rows + count, dtype=np.int32))
        self.num_rows += count

    def _take(self, room: int, count: int) -> I32:
        """At most `count` rows with this room; they are closed until put back."""
        chunks = self._rows[room]
        rows = chunks.pop()
        if len(rows) > count:
            chunks.append(rows[count:])
            rows = rows[:count]
        if not chunks:
            del self._rows[room]
            self._rooms.remove(room)
        return rows

    def _put(self, room: int, rows: I32) -> None:
        if len(rows) == 0 or room == 0:
            return
        if room not in self._rows:
            self._rows[room] = []
            bisect.insort(self._rooms, room)
        self._rows[room].append(rows)
