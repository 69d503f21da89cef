"""Rows of examples from many mapped shards at once, by the addresses of dist/row_gather.py."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist.arrow_view import numpy_view
from dist.errors import DataRefused
from dist.pack_index import PackIndex
from dist.packing import PAD_TOKEN
from dist.row_gather import BatchPlaces, GatheredRows, copy_at, copy_runs, find_places

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


def example_columns(batch: pa.RecordBatch) -> list[NDArray[Any]]:
    """What gather_examples reads of a record batch: token_splits, tokens, span_splits, starts and
    stops of spans."""
    tokens, spans = batch.column("tokens"), batch.column("loss_spans")
    edges = [spans.values.field(name) for name in ("start", "stop")]
    arrays = (tokens.offsets, tokens.values, spans.offsets, *edges)
    return [numpy_view(array) for array in arrays]


class PackedExamples(Protocol):
    """A shard of examples with the rows that they make: ExampleRows."""

    @property
    def index(self) -> PackIndex: ...

    @property
    def places(self) -> BatchPlaces: ...


def gather_examples(
    shards: Sequence[PackedExamples], which: I64, rows: I64, width: int
) -> GatheredRows:
    """Rows `rows[i]` of `shards[which[i]]`, (k,) both; DataRefused for examples that do not fit."""
    if not len(rows):
        nothing = np.zeros(1, np.int64)
        no_tokens, no_lengths = np.empty((0, width), np.uint32), np.empty(0, np.int32)
        return GatheredRows(no_tokens, no_lengths, nothing, np.empty((0, 2), np.int32), nothing)
    of_rows = [
        shards[s].index.examples_of(row)
        for s, row in zip(which.tolist(), rows.tolist(), strict=True)
    ]
    counts = np.array([len(one) for one in of_rows], np.int64)
    row_splits = np.concatenate(([0], np.cumsum(counts)))
    examples = np.concatenate([np.empty(0, np.int64), *of_rows])
    # places: (5, examples) addresses as in example_columns; local: number in the record batch.
    owners = np.repeat(which, counts)
    places, local = find_places([shard.places for shard in shards], owners, examples)
    bounds = copy_at(places[0] + 8 * local, 2, np.dtype(np.int64))
    lengths = bounds[:, 1] - bounds[:, 0]
    ends = np.concatenate(([0], np.cumsum(lengths)))
    used = np.diff(ends[row_splits])
    if len(lengths) and (lengths.min() < 1 or used.max() > width):
        raise DataRefused(
            f"a row of {width} tokens would get {used.max()}, the shortest example has "
            f"{lengths.min()}: a shard or the table of lengths is damaged (leyden data verify)"
        )
    row_of = np.repeat(np.arange(len(rows)), counts)
    starts = ends[:-1] - ends[row_splits[:-1]][row_of]  # of each example in its row
    tokens = np.full((len(rows), width), PAD_TOKEN, np.uint32)
    into = tokens.ctypes.data + 4 * (row_of * width + starts)
    sources = places[1] + 4 * bounds[:, 0]
    for to, source, length in zip(
        into.tolist(), sources.tolist(), (4 * lengths).tolist(), strict=True
    ):
        ctypes.memmove(to, source, length)
    runs, run_splits = _runs(places[2:], local, starts, row_of, len(rows), width)
    return GatheredRows(tokens, lengths.astype(np.int32), row_splits, runs, run_splits)


def _runs(
    places: I64, local: I64, starts: I64, row_of: I64, num_rows: int, width: int
) -> tuple[I32, I64]:
    """(runs, 2) and run_splits of rows. places: (3, examples) of span_splits, starts, stops."""
    bounds = copy_at(places[0] + 4 * local, 2, np.dtype(np.int32)).astype(np.int64)
    counts = bounds[:, 1] - bounds[:, 0]
    # spans: (2, spans) first and last edge of each, counted from the row's beginning.
    splits = np.concatenate(([0], np.cumsum(counts)))
    spans = [
        copy_runs(address + 4 * bounds[:, 0], splits, np.dtype(np.int32))
        + np.repeat(starts, counts)
        for address in places[1:]
    ]
    # A row's last run ends it: what is left out after the last span, then nothing.
    row_of_span = np.repeat(row_of, counts)
    run_splits = np.concatenate(([0], np.cumsum(np.bincount(row_of_span, minlength=num_rows) + 1)))
    edges = np.full((2, run_splits[-1]), width, np.int64)
    edges[:, np.arange(len(row_of_span)) + row_of_span] = spans
    before = np.concatenate(([0], edges[1, :-1]))
    before[run_splits[:-1]] = 0
    runs = np.stack((edges[0] - before, edges[1] - edges[0]), axis=1)
    return runs.astype(np.int32), run_splits
