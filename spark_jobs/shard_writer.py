"""Stage 2 of a tokens job: sorted rows of a bucket in, published shards out.

Rows arrive as Arrow batches of ROW_SCHEMA, sorted by (bucket, h, key). Each bucket becomes one or
more shards; the message row of a shard is all that the driver hears of it. The last bucket number
holds no documents but what the tasks counted and refused; it becomes one quarantine file and one
message with the summed counters, so these are as exactly-once as the shards are.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dist.commit import publish_quarantine, publish_shard
from dist.packing import PackedRows, Packer, num_targets
from dist.shard_file import PackedShardWriter, slice_rows
from dist.storage import Storage
from spark_jobs.records import REASONS, Refused

ROW_SCHEMA = pa.schema(
    [
        ("bucket", pa.int32()),
        ("h", pa.int64()),
        ("key", pa.binary()),
        ("input", pa.int32()),
        ("offset", pa.int64()),
        ("num_tokens", pa.int32()),
        ("tokens", pa.binary()),
    ]
)
ROW_DDL = "bucket int, h long, key binary, input int, offset long, num_tokens int, tokens binary"
MESSAGE_SCHEMA = pa.schema(
    [("bucket", pa.int32()), ("k", pa.int32()), ("name", pa.string()), ("digest", pa.string())]
    + [(name, pa.int64()) for name in ("rows", "bytes", "documents", "tokens", "targets")]
    + [("counters", pa.string()), ("lengths", pa.binary())]
)
MESSAGE_DDL = (
    "bucket int, k int, name string, digest string, rows long, bytes long, documents long, "
    "tokens long, targets long, counters string, lengths binary"
)
# In the last bucket num_tokens says what the row is: counters, or -1 - index of the reason.
COUNTERS_ROW = 0
# Row groups of a fixed size keep the file's bytes free of Spark's batch borders.
_QUARANTINE_ROWS = 1024
_QUARANTINE_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("offset", pa.int64()),
        ("reason", pa.string()),
        ("raw", pa.binary()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class WriterPlan:
    """What every stage 2 task needs; small, and the same for all."""

    output: str
    """Root URL of the dataset."""
    seq_len: int
    token_dtype: str
    rows_per_batch: int
    max_rows: int
    """Rows of a shard at most."""
    metadata: dict[str, str]
    """Goes into every shard's schema."""
    num_buckets: int
    """Buckets of documents; number `num_buckets` itself holds counters and refused records."""


class Plan(Protocol):
    """What a plan of any kind of shards has."""

    @property
    def output(self) -> str: ...

    @property
    def num_buckets(self) -> int: ...


def write_partition(
    batches: Iterable[pa.RecordBatch], plan: Plan, paths: list[str], bucket_writer: Any = None
) -> Iterator[pa.RecordBatch]:
    """Write all buckets of a partition; yields one message row a shard. paths: of the inputs.

    bucket_writer: what writes a bucket's rows as shards; by default BucketWriter.
    """
    local_dirs = os.environ.get("SPARK_LOCAL_DIRS", "").split(",")[0]
    scratch_base = local_dirs if os.path.isdir(local_dirs) else None
    with tempfile.TemporaryDirectory(prefix="leyden-shards-", dir=scratch_base) as scratch:
        writer: Any = None
        for bucket, rows in _runs_of_buckets(batches):
            if writer is None or writer.bucket != bucket:
                if writer is not None:
                    yield from map(_message, writer.close())
                kind: Any = CountersSink
                if bucket < plan.num_buckets:
                    kind = bucket_writer or BucketWriter
                writer = kind(bucket, plan, Path(scratch), paths)
            for message in writer.add(rows):
                yield _message(message)
        if writer is not None:
            yield from map(_message, writer.close())


def _runs_of_buckets(
    batches: Iterable[pa.RecordBatch],
) -> Iterator[tuple[int, pa.RecordBatch]]:
    for batch in batches:
        buckets = batch.column("bucket").to_numpy()
        starts = np.flatnonzero(np.diff(buckets, prepend=-1))
        stops = np.append(starts[1:], len(buckets))
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            yield int(buckets[start]), batch.slice(start, stop - start)


def _message(facts: dict[str, Any]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([facts], schema=MESSAGE_SCHEMA)


def flat_tokens(batch: pa.RecordBatch, dtype: str) -> NDArray[np.unsignedinteger]:
    """All tokens of a batch one after the other, a view of its binary column's buffer."""
    column = batch.column("tokens")
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    raw = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]] if data is not None else b""
    return np.frombuffer(raw, np.dtype(dtype).newbyteorder("<"))


class BucketWriter:
    """Packs one bucket into shards; its state is the packer's open row and the open shard."""

    def __init__(self, bucket: int, plan: WriterPlan, scratch: Path, paths: list[str]) -> None:
        self.bucket, self._plan, self._scratch = bucket, plan, scratch
        self._packer = Packer(plan.seq_len, np.dtype(plan.token_dtype))
        self._storage = Storage(plan.output)
        self._writer: PackedShardWriter | None = None
        self._k = 0
        self._facts: Counter[str] = Counter()
        # (input, offset) of the last piece written; a document that goes on is not counted again.
        self._last = (-1, -1)

    def add(self, rows: pa.RecordBatch) -> Iterator[dict[str, Any]]:
        """Pack documents; yields the message of each shard that they filled."""
        packed = self._packer.add(
            flat_tokens(rows, self._plan.token_dtype),
            rows.column("num_tokens").to_numpy(),
            rows.column("input").to_numpy(),
            rows.column("offset").to_numpy(),
        )
        yield from self._write(packed)

    def close(self) -> Iterator[dict[str, Any]]:
        """Pad and write the last row; yields the message of the last shard."""
        yield from self._write(self._packer.flush())
        if self._writer is not None:
            yield self._publish()

    def _write(self, packed: PackedRows | None) -> Iterator[dict[str, Any]]:
        start = 0
        while packed is not None and start < len(packed):
            writer = self._writer or self._open()
            stop = min(len(packed), start + self._plan.max_rows - writer.num_rows)
            rows = slice_rows(packed, start, stop)
            writer.write(rows)
            self._facts["documents"] += self._count_documents(rows)
            self._facts["tokens"] += int(rows.doc_lens.sum(dtype=np.int64))
            self._facts["targets"] += int(num_targets(rows.doc_lens, rows.row_splits).sum())
            start = stop
            if writer.num_rows == self._plan.max_rows:
                yield self._publish()

    def _count_documents(self, rows: PackedRows) -> int:
        """Documents that begin in these rows."""
        inputs, offsets = rows.doc_input, rows.doc_offset
        fresh = (np.diff(inputs, prepend=self._last[0]) != 0) | (
            np.diff(offsets, prepend=self._last[1]) != 0
        )
        self._last = (int(inputs[-1]), int(offsets[-1]))
        return int(fresh.sum())

    def _open(self) -> PackedShardWriter:
        plan = self._plan
        self._writer = PackedShardWriter(
            self._scratch / f"{self.bucket}-{self._k}.arrow",
            seq_len=plan.seq_len,
            token_dtype=plan.token_dtype,
            metadata=plan.metadata,
            rows_per_batch=plan.rows_per_batch,
        )
        return self._writer

    def _publish(self) -> dict[str, Any]:
        assert self._writer is not None
        shard = self._writer.close()
        path = self._scratch / f"{self.bucket}-{self._k}.arrow"
        publish_shard(self._storage, path, shard.xxh3_128, shard.bytes)
        path.unlink()
        message = {
            "bucket": self.bucket,
            "k": self._k,
            "name": f"{shard.xxh3_128}.arrow",
            "digest": shard.xxh3_128,
            "rows": shard.rows,
            "bytes": shard.bytes,
            **{name: self._facts[name] for name in ("documents", "tokens", "targets")},
        }
        self._writer, self._facts, self._k = None, Counter(), self._k + 1
        return message


class CountersSink:
    """Sums the tasks' counters and writes their refused records to one quarantine file."""

    def __init__(self, bucket: int, plan: Plan, scratch: Path, paths: list[str]) -> None:
        self.bucket, self._plan, self._paths = bucket, plan, paths
        self._path = scratch / "quarantine.parquet"
        self._counters: Counter[str] = Counter()
        self._num_refused = 0
        self._pending: list[tuple[str, int, str, bytes]] = []
        self._parquet: pq.ParquetWriter | None = None

    def add(self, rows: pa.RecordBatch) -> Iterator[dict[str, Any]]:
        """Take counter rows and refused records; never yields."""
        columns = [rows.column(name).to_pylist() for name in ("input", "offset", "num_tokens")]
        raws = rows.column("tokens").to_pylist()
        for number, offset, code, raw in zip(*columns, raws, strict=True):
            if code == COUNTERS_ROW:
                self._counters.update(json.loads(raw))
            else:
                self._pending.append((self._paths[number], offset, REASONS[-1 - code], raw))
        while len(self._pending) >= _QUARANTINE_ROWS:
            self._write(_QUARANTINE_ROWS)
        yield from ()

    def close(self) -> Iterator[dict[str, Any]]:
        """Publish the quarantine file, if any record was refused; yields the one message."""
        name = digest = ""
        if self._pending:
            self._write(len(self._pending))
        if self._parquet is not None:
            self._parquet.close()
            name = publish_quarantine(Storage(self._plan.output), self._path)
            digest = name.rpartition("/")[2].partition(".")[0]
        yield {
            "bucket": self.bucket,
            "k": 0,
            "name": name,
            "digest": digest,
            "rows": self._num_refused,
            "bytes": self._path.stat().st_size if name else 0,
            **{"documents": 0, "tokens": 0, "targets": 0},
            "counters": json.dumps(self._counters),
        }

    def _write(self, count: int) -> None:
        if self._parquet is None:
            self._parquet = pq.ParquetWriter(self._path, _QUARANTINE_SCHEMA, compression="zstd")
        columns = [list(column) for column in zip(*self._pending[:count], strict=True)]
        self._parquet.write_table(pa.table(columns, schema=_QUARANTINE_SCHEMA))
        del self._pending[:count]
        self._num_refused += count


def refused_rows(refused: list[Refused], bucket: int) -> pa.RecordBatch:
    """Refused records as rows for the CountersSink, in the order of input and offset."""
    return pa.record_batch(
        [
            pa.array(np.full(len(refused), bucket, np.int32)),
            pa.array([one.input for one in refused], pa.int64()),
            # Big-endian bytes sort as the numbers do.
            pa.array([one.offset.to_bytes(8, "big") for one in refused], pa.binary()),
            pa.array([one.input for one in refused], pa.int32()),
            pa.array([one.offset for one in refused], pa.int64()),
            pa.array([-1 - REASONS.index(one.reason) for one in refused], pa.int32()),
            pa.array([one.raw for one in refused], pa.binary()),
        ],
        schema=ROW_SCHEMA,
    )


def counters_row(counters: Counter[str], bucket: int) -> pa.RecordBatch:
    """A task's counters as one row for the CountersSink."""
    row = [[bucket], [-1], [b""], [-1], [-1], [COUNTERS_ROW], [json.dumps(counters).encode()]]
    return pa.record_batch(
        [pa.array(v, t) for v, t in zip(row, ROW_SCHEMA.types, strict=True)], schema=ROW_SCHEMA
    )
