"""What the tasks of tokenize_text do: read and tokenize (stage 1), pack and write (stage 2)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist.errors import LeydenError, SetupError, describe
from dist.tokenizer import TextTokenizer
from spark_jobs.records import Chunk, Rules, read_chunks
from spark_jobs.shard_writer import (
    ROW_SCHEMA,
    WriterPlan,
    counters_row,
    refused_rows,
    write_partition,
)
from spark_jobs.sources import InputFile, Split, key_hashes, record_keys, scale_hashes

_SPLIT_SALT = b"validation"
_SIGN_BIT = np.uint64(1 << 63)


@dataclass(frozen=True, kw_only=True)
class Transform:
    """What every stage 1 task needs besides the tokenizer and the list of files."""

    rules: Rules
    seed: int
    validation_below: int
    """A document is validation if the second hash of its key is below this (of 2^64)."""
    train_buckets: int
    validation_buckets: int
    engine: str
    token_dtype: str
    bos_id: int | None
    eos_id: int | None

    @property
    def num_buckets(self) -> int:
        return self.train_buckets + self.validation_buckets

    def split_of(self, bucket: int) -> str:
        return "train" if bucket < self.train_buckets else "validation"


def num_buckets(fraction: float, total_bytes: int, shard_bytes: float) -> int:
    """Buckets of a split: a function of inputs and config, never of cores."""
    return max(1, math.ceil(fraction * total_bytes / shard_bytes)) if fraction > 0 else 0


def bucket_of(keys: list[bytes], h: NDArray[np.uint64], plan: Transform) -> NDArray[np.int64]:
    """Bucket of every document, (n,): train buckets first, then those of validation."""
    buckets = scale_hashes(h, plan.train_buckets)
    if plan.validation_buckets:
        second = key_hashes((_SPLIT_SALT + key for key in keys), plan.seed)
        held_out = second < np.uint64(plan.validation_below)
        other = plan.train_buckets + scale_hashes(h, plan.validation_buckets)
        buckets = np.where(held_out, other, buckets)
    return buckets


@lru_cache(maxsize=1)
def _tokenizer(tokenizer_json: bytes, engine: str) -> TextTokenizer:
    """One tokenizer a worker process, whatever the number of its tasks."""
    return TextTokenizer(tokenizer_json, engine)


def tokenize_splits(
    splits: list[Split], files: list[InputFile], plan: Transform, tokenizer: TextTokenizer
) -> Iterator[pa.RecordBatch]:
    """Read and tokenize splits; yields documents, then refused records and the counters."""
    counters: Counter[str] = Counter()
    for chunk in read_chunks(files, splits, plan.rules):
        counters["documents_in"] += len(chunk.texts) + len(chunk.refused)
        if chunk.refused:
            counters.update(f"quarantined.{one.reason}" for one in chunk.refused)
            yield refused_rows(chunk.refused, plan.num_buckets)
        if chunk.texts:
            batch = tokenize_chunk(chunk, files, plan, tokenizer)
            counters["filtered"] += len(chunk.texts) - batch.num_rows
            counters["documents_out"] += batch.num_rows
            counters["text_bytes"] += chunk.text_bytes
            counters["tokens"] += int(np.sum(batch.column("num_tokens").to_numpy(), dtype=np.int64))
            yield batch
    yield counters_row(counters, plan.num_buckets)


def tokenize_chunk(
    chunk: Chunk, files: list[InputFile], plan: Transform, tokenizer: TextTokenizer
) -> pa.RecordBatch:
    """Documents of a chunk as rows of ROW_SCHEMA; those without a single token are left out."""
    flat, lengths = tokenizer.encode_batch(chunk.texts)
    flat, lengths = frame_documents(flat, lengths, plan)
    rows = placed_rows(chunk, files, plan, lengths, _binary_column(flat, lengths))
    # Possible without bos and eos, where a normalizer takes everything away.
    return rows if lengths.all() else rows.filter(pa.array(lengths > 0))


def placed_rows(
    chunk: Chunk, files: list[InputFile], plan: Transform, num_tokens: NDArray[Any], payload: Any
) -> pa.RecordBatch:
    """Documents of a chunk as rows of ROW_SCHEMA: each with its key and so its place.

    num_tokens: (documents,); payload: an Arrow array of bytes, what stage 2 needs of each.
    """
    keys: list[bytes] = []
    start = 0
    for stop in range(1, len(chunk.inputs) + 1):
        if stop == len(chunk.inputs) or chunk.inputs[stop] != chunk.inputs[start]:
            keys += record_keys(files[chunk.inputs[start]].path, chunk.offsets[start:stop])
            start = stop
    h = key_hashes(keys, plan.seed)
    return pa.record_batch(
        [
            pa.array(bucket_of(keys, h, plan).astype(np.int32)),
            # Spark sorts longs as signed; with the top bit flipped that is the unsigned order.
            pa.array((h ^ _SIGN_BIT).view(np.int64)),
            pa.array(keys, pa.binary()),
            pa.array(np.array(chunk.inputs, np.int32)),
            pa.array(np.array(chunk.offsets, np.int64)),
            pa.array(num_tokens.astype(np.int32)),
            payload,
        ],
        schema=ROW_SCHEMA,
    )


def frame_documents(
    flat: NDArray[np.uint32], lengths: NDArray[np.int64], plan: Transform
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
    """Put bos and eos around each document, in the stored dtype. flat: (sum(lengths),)."""
    before, after = int(plan.bos_id is not None), int(plan.eos_id is not None)
    framed = lengths + before + after
    ends = np.cumsum(framed)
    out = np.empty(int(ends[-1]), plan.token_dtype)
    inner = np.ones(len(out), bool)
    if plan.bos_id is not None:
        out[ends - framed] = plan.bos_id
        inner[ends - framed] = False
    if plan.eos_id is not None:
        out[ends - 1] = plan.eos_id
        inner[ends - 1] = False
    out[inner] = flat
    return out, framed


def _binary_column(flat: NDArray[np.unsignedinteger], lengths: NDArray[np.int64]) -> pa.Array:
    """Each document's tokens as little-endian bytes, without copying them."""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths * flat.itemsize, out=offsets[1:])
    little = flat.astype(flat.dtype.newbyteorder("<"), copy=False)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(little)]
    return pa.BinaryArray.from_buffers(pa.binary(), len(lengths), buffers)


def stage_1(tasks: Any, files: Any, tokenizer_json: Any, plan: Transform) -> Callable[..., Any]:
    """The function of stage 1's tasks; tasks, files and tokenizer_json are broadcast values."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        tokenizer = _tokenizer(tokenizer_json.value, plan.engine)
        for batch in batches:
            for number in batch.column(0).to_pylist():
                yield from tokenize_splits(tasks.value[number], files.value, plan, tokenizer)

    return speak_plainly(run)


def stage_2(plan: WriterPlan, paths: Any) -> Callable[..., Any]:
    """The function of stage 2's tasks; paths (of the inputs) is a broadcast value."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return write_partition(batches, plan, paths.value)

    return speak_plainly(run)


def speak_plainly(run: Callable[..., Any]) -> Callable[..., Any]:
    """Turn expected failures of a task into LeydenErrors, which the driver shows as they are."""

    def checked(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        try:
            yield from run(batches)
        except LeydenError:
            raise
        except OSError as error:
            said = describe(error)
            raise SetupError(said[0] if said else str(error)) from error

    return checked
