"""Shard files of kind `examples`: sequences of any length, and which of their tokens are trained.

    tokens        LargeList<uint32>
    loss_spans    List<struct<start int32, stop int32>>   half-open ranges of tokens that are
                                                          trained as targets; never token 0, which
                                                          nothing precedes
    segment_lens  List<int32>   tokens of the example's turns or documents; they sum to all
    doc_input     int32         which input file (index into the provenance's inputs)
    doc_offset    int64         where in it the example stands
Columns are non-null; batches, footer and determinism are those of dist/shard_file.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist.arrow_view import numpy_view
from dist.errors import DataRefused
from dist.example_gather import example_columns
from dist.row_gather import BatchPlaces
from dist.shard_file import ShardFile, open_shard_file, rows_per_batch, write_batches

FORMAT = "leyden.examples.v1"
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row."""

    tokens: NDArray[np.uint32]
    """(tokens,)"""
    spans: I32
    """(spans, 2) start and stop of the trained tokens, ascending and apart."""
    segments: I32
    """(segments,) lengths that sum to the number of tokens."""
    input: int
    offset: int

    def check(self) -> None:
        """ValueError for spans or segments that do not fit the tokens."""
        if not len(self.tokens):
            raise ValueError("an example without a token")
        edges = self.spans.reshape(-1)
        if len(edges) and (edges[0] < 1 or edges[-1] > len(self.tokens)):
            raise ValueError(f"spans {self.spans.tolist()} of {len(self.tokens)} tokens")
        # Strictly: spans that touch are one span, and an empty one is none.
        if np.any(np.diff(edges) <= 0):
            raise ValueError(f"spans {self.spans.tolist()} are not ascending and apart")
        if int(self.segments.sum()) != len(self.tokens) or np.any(self.segments < 1):
            raise ValueError(
                f"segments {self.segments.tolist()} do not sum to {len(self.tokens)} tokens"
            )

    @property
    def num_targets(self) -> int:
        """Trained tokens."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


def example_rows_per_batch(max_length: int) -> int:
    """Rows of a record batch: 4 MiB of tokens if all were of the greatest length."""
    return rows_per_batch(max_length - 1, "uint32")


def example_schema(metadata: dict[str, str]) -> pa.Schema:
    """Schema of examples; metadata keys are sorted, for equal bytes."""

    def item(kind: pa.DataType) -> pa.Field:
        return pa.field("item", kind, nullable=False)

    span = pa.struct([pa.field(name, pa.int32(), nullable=False) for name in ("start", "stop")])
    kinds = {
        "tokens": pa.large_list(item(pa.uint32())),
        "loss_spans": pa.list_(item(span)),
        "segment_lens": pa.list_(item(pa.int32())),
        "doc_input": pa.int32(),
        "doc_offset": pa.int64(),
    }
    fields = [pa.field(name, kind, nullable=False) for name, kind in kinds.items()]
    facts = {**metadata, "format": FORMAT}
    return pa.schema(fields, metadata={key: facts[key] for key in sorted(facts)})


def example_batch(examples: list[Example], schema: pa.Schema) -> pa.RecordBatch:
    """The one function that turns examples into Arrow arrays."""

    def splits(counts: list[int], dtype: type) -> pa.Array:
        return pa.array(np.concatenate(([0], np.cumsum(counts))).astype(dtype))

    token_kind, span_kind = schema.field("tokens").type, schema.field("loss_spans").type
    segment_kind = schema.field("segment_lens").type
    edges = np.concatenate([one.spans for one in examples]).astype(np.int32)
    spans = pa.StructArray.from_arrays(
        [pa.array(np.ascontiguousarray(edges[:, side])) for side in (0, 1)],
        fields=[span_kind.value_type.field(side) for side in (0, 1)],
    )
    tokens = pa.array(np.concatenate([one.tokens for one in examples]), pa.uint32())
    segments = pa.array(np.concatenate([one.segments for one in examples]), pa.int32())
    columns = [
        pa.LargeListArray.from_arrays(
            splits([len(one.tokens) for one in examples], np.int64), tokens, type=token_kind
        ),
        pa.ListArray.from_arrays(
            splits([len(one.spans) for one in examples], np.int32), spans, type=span_kind
        ),
        pa.ListArray.from_arrays(
            splits([len(one.segments) for one in examples], np.int32), segments, type=segment_kind
        ),
        pa.array([one.input for one in examples], pa.int32()),
        pa.array([one.offset for one in examples], pa.int64()),
    ]
    return pa.record_batch(columns, schema=schema)


class ExampleShardWriter:
    """Writes one shard file; memory holds its rows until close(), as the footer needs hashes."""

    def __init__(
        self, path: Path | str, *, metadata: dict[str, str], rows_per_batch: int
    ) -> None:  # fmt: skip
        if rows_per_batch < 1 or rows_per_batch & (rows_per_batch - 1):
            raise ValueError(f"rows_per_batch is {rows_per_batch}, not a power of two")
        self._path, self._rows_per_batch = Path(path), rows_per_batch
        self._schema = example_schema(metadata)
        self._pending: list[Example] = []
        self._batches: list[pa.RecordBatch] = []
        self.num_rows = self.num_tokens = 0

    def write(self, example: Example) -> None:
        """Append a row; ValueError if its spans or segments are wrong."""
        example.check()
        self._pending.append(example)
        self.num_rows += 1
        self.num_tokens += len(example.tokens)
        if len(self._pending) == self._rows_per_batch:
            self._cut()

    def close(self) -> ShardFile:
        """Write the file and return its size and digest."""
        if self._pending:
            self._cut()
        if not self._batches:
            raise ValueError(f"shard {self._path} would hold no row")
        made = write_batches(self._path, self._schema, self._batches)
        self._batches = []
        return made

    def _cut(self) -> None:
        self._batches.append(example_batch(self._pending, self._schema))
        self._pending = []


class ExampleShard:
    """A shard mapped into memory; an example's columns are numpy views of the page cache."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        _, self._reader, self.metadata = open_shard_file(self.path, FORMAT)  # it keeps the map
        batches = [self._reader.get_batch(i) for i in range(self._reader.num_record_batches)]
        if not batches:
            raise DataRefused(f"shard {path} holds no record batch")
        self._batches = batches
        self._rows_per_batch = batches[0].num_rows
        self.num_rows = sum(batch.num_rows for batch in batches)
        self._views: dict[int, _Views] = {}
        self.places = BatchPlaces(self._reader.get_batch, len(batches), example_columns)
        """For gather_examples; whoever holds it can read the shard, also after close()."""

    def lengths(self) -> I64:
        """Tokens of every example, (num_rows,); only the offsets are read."""
        parts = [np.diff(numpy_view(batch.column("tokens").offsets)) for batch in self._batches]
        return np.concatenate(parts).astype(np.int64)

    def example_tokens(self, row: int) -> NDArray[np.uint32]:
        """(tokens,) of an example, a view."""
        views, local = self._at(row)
        return views.tokens[views.token_splits[local] : views.token_splits[local + 1]]

    def spans(self, row: int) -> I32:
        """(spans, 2) trained ranges of an example."""
        views, local = self._at(row)
        here = slice(views.span_splits[local], views.span_splits[local + 1])
        return np.stack((views.span_start[here], views.span_stop[here]), axis=1)

    def segments(self, row: int) -> I32:
        """(segments,) lengths of an example's turns or documents."""
        batch, local = divmod(row, self._rows_per_batch)
        column = self._batches[batch].column("segment_lens")
        offsets = numpy_view(column.offsets)
        return numpy_view(column.values)[offsets[local] : offsets[local + 1]]

    def origin(self, row: int) -> tuple[int, int]:
        """(input index, offset) of an example."""
        views, local = self._at(row)
        return int(views.input[local]), int(views.offset[local])

    def read(self, row: int) -> Example:
        """A whole example; its arrays are views."""
        number, offset = self.origin(row)
        return Example(
            tokens=self.example_tokens(row), spans=self.spans(row), segments=self.segments(row),
            input=number, offset=offset,
        )  # fmt: skip

    def close(self) -> None:
        """Let go of the map; it stays for views handed out, until they are gone."""
        self._batches, self._views = [], {}

    def _at(self, row: int) -> tuple[_Views, int]:
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows} in {self.path}")
        batch, local = divmod(row, self._rows_per_batch)
        views = self._views.get(batch)
        if views is None:
            views = self._views[batch] = _views_of(self._batches[batch])
        return views, local


@dataclass(frozen=True)
class _Views:
    """Zero-copy numpy views of a record batch."""

    tokens: NDArray[np.uint32]
    token_splits: I64
    span_splits: I32
    span_start: I32
    span_stop: I32
    input: I32
    offset: I64


def _views_of(batch: Any) -> _Views:
    tokens, spans = batch.column("tokens"), batch.column("loss_spans")
    edges = spans.values
    return _Views(
        tokens=numpy_view(tokens.values),
        token_splits=numpy_view(tokens.offsets),
        span_splits=numpy_view(spans.offsets),
        span_start=numpy_view(edges.field("start")),
        span_stop=numpy_view(edges.field("stop")),
        input=numpy_view(batch.column("doc_input")),
        offset=numpy_view(batch.column("doc_offset")),
    )
