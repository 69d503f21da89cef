"""Stage 2 of a job that writes examples: sorted rows of a bucket in, published shards out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist.commit import publish_shard
from dist.example_file import Example, ExampleShardWriter
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
        self.bucket, self._plan, self._scratch = bucket, plan, scratch
        self._storage = Storage(plan.output)
        self._writer: ExampleShardWriter | None = None
        self._k = 0
        self._facts: Counter[str] = Counter()
        self._lengths: list[int] = []

    def add(self, rows: pa.RecordBatch) -> Iterator[dict[str, Any]]:
        """Write rows of ROW_SCHEMA; yields the message of each shard that they filled."""
        columns = [rows.column(name).to_pylist() for name in ("input", "offset", "tokens")]
        for number, offset, payload in zip(*columns, strict=True):
            example = example_of(payload, number, offset)
            held = self._writer.num_tokens if self._writer is not None else 0
            if held and held + len(example.tokens) > self._plan.max_tokens:
                yield self._publish()
            self._write(example)

    def close(self) -> Iterator[dict[str, Any]]:
        """Yields the message of the last shard."""
        if self._writer is not None:
            yield self._publish()

    def _write(self, example: Example) -> None:
        if self._writer is None:
            self._writer = ExampleShardWriter(
                self._path, metadata={}, rows_per_batch=self._plan.rows_per_batch
            )
        self._writer.write(example)
        self._facts["documents"] += 1
        self._facts["tokens"] += len(example.tokens)
        self._lengths.append(len(example.tokens))
        self._facts["targets"] += example.num_targets

    @property
    def _path(self) -> Path:
        return self._scratch / f"{self.bucket}-{self._k}.arrow"

    def _publish(self) -> dict[str, Any]:
        assert self._writer is not None
        shard = self._writer.close()
        publish_shard(self._storage, self._path, shard.xxh3_128, shard.bytes)
        self._path.unlink()
        message = {
            "bucket": self.bucket,
            "k": self._k,
            "name": f"{shard.xxh3_128}.arrow",
            "digest": shard.xxh3_128,
            "rows": shard.rows,
            "bytes": shard.bytes,
            **{name: self._facts[name] for name in ("documents", "tokens", "targets")},
            "lengths": np.array(self._lengths, "<u4").tobytes(),
        }
        self._writer, self._facts, self._k = None, Counter(), self._k + 1
        self._lengths = []
        return message
