"""Stage 2 of a job that writes examples: sorted rows of a bucket in, published shards out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist.example_file import Example
from dist.example_shards import ExampleShards, ExamplesMade
from dist.storage import Storage


@dataclass(frozen=True, kw_only=True)
class ExamplePlan:
    """What every stage 2 task needs; small, and the same for all."""

    output: str
    """Root URL of the dataset."""
    rows_per_batch: int
    max_tokens: int
    """A shard is closed before it would hold more, unless one example does."""
    num_buckets: int


def payload_of(example: Example) -> bytes:
    """An example's arrays as bytes, for the shuffle: counts, spans, segments, tokens."""
    counts = [len(example.spans), len(example.segments)]
    head = np.concatenate((counts, example.spans.reshape(-1), example.segments)).astype("<i4")
    return head.tobytes() + example.tokens.astype("<u4").tobytes()


def example_of(payload: bytes, number: int, offset: int) -> Example:
    """The example of a payload, from record `offset` of input `number`."""
    words = np.frombuffer(payload, "<i4")
    spans = 2 + 2 * int(words[0])
    segments = spans + int(words[1])
    return Example(
        tokens=words[segments:].view("<u4").astype(np.uint32, copy=False),
        spans=words[2:spans].reshape(-1, 2).astype(np.int32, copy=False),
        segments=words[spans:segments].astype(np.int32, copy=False),
        input=number,
        offset=offset,
    )


def lengths_of(message: dict[str, Any]) -> NDArray[np.uint32]:
    """(rows,) tokens of each example of the shard that a message tells of."""
    return np.frombuffer(message["lengths"], "<u4")


class ExampleBucketWriter:
    """Writes one bucket's examples into shards; its state is the open shard."""

    def __init__(self, bucket: int, plan: ExamplePlan, scratch: Path, paths: list[str]) -> None:
        self.bucket, self._k = bucket, 0
        self._open = ExampleShards(
            Storage(plan.output), scratch / f"{bucket}.arrow", rows_per_batch=plan.rows_per_batch,
            max_tokens=plan.max_tokens,
        )  # fmt: skip

    def add(self, rows: pa.RecordBatch) -> Iterator[dict[str, Any]]:
        """Write rows of ROW_SCHEMA; yields the message of each shard that they filled."""
        columns = [rows.column(name).to_pylist() for name in ("input", "offset", "tokens")]
        for number, offset, payload in zip(*columns, strict=True):
            made = self._open.add(example_of(payload, number, offset))
            if made is not None:
                yield self._message(made)

    def close(self) -> Iterator[dict[str, Any]]:
        """Yields the message of the last shard."""
        made = self._open.close()
        if made is not None:
            yield self._message(made)

    def _message(self, made: ExamplesMade) -> dict[str, Any]:
        message = {
            "bucket": self.bucket,
            "k": self._k,
            "name": made.name,
            "digest": made.file.xxh3_128,
            "rows": made.file.rows,
            "bytes": made.file.bytes,
            "documents": made.file.rows,
            "tokens": int(made.lengths.sum(dtype=np.int64)),
            "targets": made.targets,
            "lengths": made.lengths.astype("<u4").tobytes(),
        }
        self._k += 1
        return message
