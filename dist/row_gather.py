"""Rows of many mapped shards in one copy, without the interpreter's lock.

A row lies at an address: that of its record batch, plus its number times its width. numpy copies
rows of *one* array in one call and lets other threads run meanwhile, so the memory from the first
of the wanted rows to the last is shown to it as one array whose rows overlap, one at each token.
Only what a shard's own table vouches for is read of it; numbers of rows are checked before. Row by
row in Python the same copy takes three times as long, and holds the lock for all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist.arrow_view import numpy_view
from dist.side_thread import SideThread, Work, results_in_order

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
_LARGEST_ARRAY = 1 << 62
_BYTES_ASIDE = 256 << 10
"""To hand something to a thread and wait for it takes as long as to copy some 100 KB."""


def packed_columns(batch: pa.RecordBatch) -> list[NDArray[Any]]:
    """What gather_rows reads of a record batch: tokens, offsets of doc_lens, its values."""
    lens = batch.column("doc_lens")
    arrays = (batch.column("tokens").values, lens.offsets, lens.values)
    return [numpy_view(array) for array in arrays]


class BatchPlaces:
    """Where the columns of one shard's record batches lie; each is looked up at first use.

    Whoever holds this can read its batches, also after the shard was closed.
    """

    def __init__(
        self, open_batch: Callable[[int], pa.RecordBatch], num_batches: int,
        columns: Callable[[pa.RecordBatch], list[NDArray[Any]]] = packed_columns,
    ) -> None:  # fmt: skip
        first, last = open_batch(0), open_batch(num_batches - 1)
        self.rows_per_batch = first.num_rows
        self.num_rows = first.num_rows * (num_batches - 1) + last.num_rows
        self._open_batch, self._columns = open_batch, columns
        # addresses: (columns, batches); 0: not looked up yet.
        self.addresses = np.zeros((len(columns(first)), num_batches), np.int64)
        self._held: dict[int, Any] = {}

    def find(self, number: int) -> None:
        """Look up the addresses of a batch, and keep it mapped from now on."""
        views = self._held[number] = self._columns(self._open_batch(number))
        self.addresses[:, number] = [view.__array_interface__["data"][0] for view in views]


@dataclass(frozen=True)
class GatheredRows:
    """Copies of k rows."""

    copied: NDArray[Any] | list[Work]
    """Their tokens, or parts of them that may still be under way."""
    lengths: I32
    """(pieces,) tokens of each row's pieces: parts of documents, or examples."""
    row_splits: I64
    """(k + 1,) which pieces are whose."""
    runs: I32 | None = None
    """Of examples: (runs, 2) how many tokens of a row are left out, then trained; they sum to its
    width."""
    run_splits: I64 | None = None
    """(k + 1,) which runs are whose."""

    def parts(self) -> Iterator[NDArray[Any]]:
        """The tokens in parts, (rows, width) each, as they were asked for; waits for them."""
        if isinstance(self.copied, list):
            yield from results_in_order(self.copied)
        else:
            yield self.copied

    @property
    def tokens(self) -> NDArray[Any]:
        """(k, width); waits for them."""
        parts = list(self.parts())
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def among_padding(self, at: I64, num_rows: int) -> GatheredRows:
        """The rows at places `at` (k,), ascending, of `num_rows`; the others have no document."""
        own = self.tokens
        width = own.shape[1]
        tokens = np.zeros((num_rows, width), own.dtype)
        tokens[at] = own
        row_splits = _splits(np.diff(self.row_splits), at, num_rows, 0)
        if self.runs is None or self.run_splits is None:
            return GatheredRows(tokens, self.lengths, row_splits)
        run_splits = _splits(np.diff(self.run_splits), at, num_rows, 1)
        runs = np.tile(np.array([[width, 0]], np.int32), (run_splits[-1], 1))
        is_padding = np.ones(num_rows, bool)
        is_padding[at] = False
        runs[~np.repeat(is_padding, np.diff(run_splits))] = self.runs
        return GatheredRows(tokens, self.lengths, row_splits, runs, run_splits)


def _splits(counts: I64, at: I64, num_rows: int, otherwise: int) -> I64:
    """Splits of `num_rows` lists: `counts` (k,) at places `at`, `otherwise` elsewhere."""
    lens = np.full(num_rows, otherwise, np.int64)
    lens[at] = counts
    return np.concatenate(([0], np.cumsum(lens)))


def join_rows_at(parts: Sequence[GatheredRows], places: Sequence[I64]) -> GatheredRows:
    """Rows of several parts as one: row i of a part stands at places[part][i]."""
    if len(parts) == 1:
        return parts[0]
    order = np.argsort(np.concatenate(places))
    lengths, row_splits = _taken([(one.lengths, one.row_splits) for one in parts], order)
    tokens = np.concatenate([one.tokens for one in parts])[order]
    masks = [(one.runs, one.run_splits) for one in parts if one.run_splits is not None]
    if not masks:
        return GatheredRows(tokens, lengths, row_splits)
    return GatheredRows(tokens, lengths, row_splits, *_taken(masks, order))


def _taken(parts: Sequence[tuple[Any, I64]], order: I64) -> tuple[Any, I64]:
    """Lists of all parts, (values, splits) each, one after the other, in another order."""
    values = np.concatenate([values for values, _ in parts])
    counts = np.concatenate([np.diff(splits) for _, splits in parts])
    starts = np.cumsum(counts) - counts
    splits = np.concatenate(([0], np.cumsum(counts[order])))
    at = np.repeat(starts[order] - splits[:-1], counts[order]) + np.arange(splits[-1])
    return values[at], splits


class _Memory:
    """Memory from an address on, for numpy.asarray()."""

    def __init__(
        self, address: int, shape: tuple[int, ...], stride: int, dtype: np.dtype[Any]
    ) -> None:
        self.__array_interface__ = {
            "version": 3, "data": (address, True), "shape": shape,
            "strides": (stride,) * len(shape), "typestr": dtype.str,
        }  # fmt: skip


def find_places(shards: Sequence[BatchPlaces], which: I64, rows: I64) -> tuple[I64, I64]:
    """Addresses of the columns of each row's record batch, (columns, k), and its number in that
    batch, (k,). IndexError for a row that its shard does not have."""
    num_rows = np.array([shard.num_rows for shard in shards])[which]
    if (rows < 0).any() or (rows >= num_rows).any():
        raise IndexError(f"rows {rows.min()}..{rows.max()} of shards of {num_rows.max()} rows")
    per_batch = np.array([shard.rows_per_batch for shard in shards])
    # One divisor, or many: an eighth of the time.
    rows_each = per_batch[0] if (per_batch == per_batch[0]).all() else per_batch[which]
    batch = rows // rows_each
    first = np.cumsum([0, *(shard.addresses.shape[1] for shard in shards[:-1])])
    at = first[which] + batch
    places = np.concatenate([shard.addresses for shard in shards], axis=1).take(at, axis=1)
    if not places[0].all():
        for missing in np.unique(at[places[0] == 0]).tolist():
            owner = int(np.searchsorted(first, missing, side="right")) - 1
            shards[owner].find(missing - int(first[owner]))
        places = np.concatenate([shard.addresses for shard in shards], axis=1).take(at, axis=1)
    return places, rows - batch * rows_each


def gather_rows(
    shards: Sequence[BatchPlaces], which: I64, rows: I64, width: int, dtype: np.dtype[Any],
    side: SideThread | None = None, part_rows: int = 0,
) -> GatheredRows:  # fmt: skip
    """Copies of packed rows: row i is row `rows[i]` of `shards[which[i]]`; which, rows: (k,).

    side: copies the tokens, if they are many, in parts of so many rows.
    """
    if not len(rows):
        none = np.empty(0, np.int32)
        return GatheredRows(np.empty((0, width), dtype), none, np.zeros(1, np.int64))
    places, local = find_places(shards, which, rows)
    row_bytes = width * dtype.itemsize
    starts = places[0] + local * row_bytes

    def copy(part: slice, held: Sequence[BatchPlaces]) -> NDArray[Any]:
        return copy_at(starts[part], width, dtype)

    tokens: NDArray[Any] | list[Work]
    if side is None or len(rows) * row_bytes < _BYTES_ASIDE:
        tokens = copy(slice(None), shards)
    else:  # whoever copies holds the shards: else they could be unmapped meanwhile
        step = part_rows or len(rows)
        parts = [slice(first, first + step) for first in range(0, len(rows), step)]
        tokens = [side.start(partial(copy, part, shards)) for part in parts]
    # bounds: (k, 2) where a row's pieces begin and end in its batch's values.
    bounds = copy_at(places[1] + local * 4, 2, np.dtype(np.int32)).astype(np.int64)
    counts = bounds[:, 1] - bounds[:, 0]
    splits = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(counts, out=splits[1:])
    lengths = copy_runs(places[2] + 4 * bounds[:, 0], splits, np.dtype(np.int32))
    return GatheredRows(tokens, lengths, splits)


def copy_at(addresses: I64, width: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Copies of the `width` elements that lie at each address (k,): (k, width)."""
    if not len(addresses):
        return np.empty((0, width), dtype)
    base, size = int(addresses.min()), dtype.itemsize
    count = (int(addresses.max()) - base) // size + 1
    if count * width * size >= _LARGEST_ARRAY:  # numpy refuses such a shape
        each = [_Memory(one, (1, width), size, dtype) for one in addresses.tolist()]
        return np.concatenate([np.asarray(one) for one in each])
    return np.asarray(_Memory(base, (count, width), size, dtype))[(addresses - base) // size]


def copy_runs(addresses: I64, splits: I64, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Copies of the splits[i + 1] - splits[i] elements from addresses[i] (k,) on, in one array."""
    if not splits[-1]:
        return np.empty(0, dtype)
    base, size = int(addresses.min()), dtype.itemsize
    # first: where each begins in the memory from `base` on, in elements.
    first, counts = (addresses - base) // size, np.diff(splits)
    end = int((first + counts).max())
    if end * size >= _LARGEST_ARRAY:
        pairs = zip(addresses.tolist(), counts.tolist(), strict=True)
        return np.concatenate([np.asarray(_Memory(at, (n,), size, dtype)) for at, n in pairs])
    index = np.repeat(first - splits[:-1], counts)
    index += np.arange(splits[-1])
    return np.asarray(_Memory(base, (end,), size, dtype)).take(index)
