"""Stage 2 and the books, without Spark: the same rows in other batches, twins, wrong sums."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist.errors import DataRefused, LeydenError, SetupError
from dist.shard_file import PackedShard
from dist.tokenizer import TextTokenizer
from spark_jobs.bookkeeping import check_messages, check_yield
from spark_jobs.records import Chunk, Refused, Rules
from spark_jobs.session import unwrap_error
from spark_jobs.shard_writer import (
    ROW_SCHEMA,
    WriterPlan,
    counters_row,
    refused_rows,
    write_partition,
)
from spark_jobs.sources import InputFile
from spark_jobs.tokenize_tasks import Transform, frame_documents, tokenize_chunk
from tests.make_dataset import tokenizer_json

FILE = InputFile(url="a", path="a", size=1, stamp="", format="jsonl", compression="")
PLAN = Transform(
    rules=Rules("text", 1000),
    seed=0,
    validation_below=1 << 62,
    train_buckets=2,
    validation_buckets=1,
    engine="hf",
    token_dtype="uint16",
    bos_id=0,
    eos_id=1,
)


def writer_plan(output: Path, max_rows: int = 1000) -> WriterPlan:
    return WriterPlan(
        output=str(output),
        seq_len=8,
        token_dtype="uint16",
        rows_per_batch=4,
        max_rows=max_rows,
        metadata={},
        num_buckets=PLAN.num_buckets,
    )


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    """Sorted rows of all buckets, as the shuffle hands them to one task."""
    texts = [f"document {i} " * (1 + i % 7) for i in range(60)]
    chunk = Chunk(inputs=[0] * 60, offsets=list(range(0, 600, 10)), texts=texts)
    tokenizer = TextTokenizer(tokenizer_json(), "hf")
    table = pa.Table.from_batches([tokenize_chunk(chunk, [FILE], PLAN, tokenizer)])
    return table.sort_by([(name, "ascending") for name in ("bucket", "h", "key")])


def write(rows: pa.Table, plan: WriterPlan, batch_rows: int) -> list[dict]:
    batches = rows.to_batches(batch_rows)
    messages = list(write_partition(batches, plan, ["a"]))
    return [row for message in messages for row in message.to_pylist()]


def test_batches_do_not_change_shards(rows: pa.Table, tmp_path: Path) -> None:
    """Arrow batches end where Spark likes; a packer that looked at them would not repeat."""
    messages = [
        write(rows, writer_plan(tmp_path / str(size), max_rows=7), size) for size in (1, 13, 100)
    ]
    assert messages[0] == messages[1] == messages[2]
    assert {one["bucket"] for one in messages[0]} == {0, 1, 2}
    assert [one["k"] for one in messages[0] if one["bucket"] == 0][:3] == [0, 1, 2]
    assert max(one["rows"] for one in messages[0]) == 7
    assert sum(one["documents"] for one in messages[0]) == 60
    made = int(np.sum(rows.column("num_tokens").to_numpy()))
    assert sum(one["tokens"] for one in messages[0]) == made


def test_a_twin_attempt_changes_nothing(rows: pa.Table, tmp_path: Path) -> None:
    """A speculative or repeated attempt that adds files or rewrites them corrupts the winner's."""
    first = write(rows, writer_plan(tmp_path), 10)
    files = {path: path.stat().st_ino for path in tmp_path.rglob("*.arrow")}
    assert write(rows, writer_plan(tmp_path), 17) == first
    assert {path: path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()} == files
    assert {path.name for path in files} == {one["name"] for one in first}


def test_shards_hold_the_documents_in_order(rows: pa.Table, tmp_path: Path) -> None:
    """Tokens of one document under the lineage of another would make every replay wrong."""
    messages = write(rows, writer_plan(tmp_path), 9)
    for bucket in range(3):
        expected = [
            (row["offset"], np.frombuffer(row["tokens"], "<u2").tolist())
            for row in rows.to_pylist()
            if row["bucket"] == bucket
        ]
        found: dict[int, list[int]] = {}
        for one in messages:
            if one["bucket"] != bucket:
                continue
            shard = PackedShard(tmp_path / "shards" / one["name"])
            for row in range(shard.num_rows):
                tokens, start = shard.tokens(row, row + 1)[0], 0
                for _, offset, length in shard.lineage(row):
                    found.setdefault(offset, []).extend(tokens[start : start + length].tolist())
                    start += length
        assert list(found.items()) == expected


def test_framing() -> None:
    """A bos written over a token, or none around an empty document, would show here."""
    flat, lengths = frame_documents(np.array([5, 6, 7], np.uint32), np.array([2, 0, 1]), PLAN)
    assert flat.tolist() == [0, 5, 6, 1, 0, 1, 0, 7, 1] and lengths.tolist() == [4, 2, 3]
    assert flat.dtype == np.uint16


def quarantine(tmp_path: Path, batch_rows: int) -> dict:
    refused = [Refused(0, i * 1000, "empty", b"x" * i) for i in range(3000)]
    counters = [counters_row(Counter({"documents_in": 2, "quarantined.empty": 1}), 3)] * 2
    table = pa.Table.from_batches([*counters, refused_rows(refused, 3)], ROW_SCHEMA)
    batches = table.sort_by([("h", "ascending"), ("key", "ascending")]).to_batches(batch_rows)
    (message,) = [
        row
        for one in write_partition(batches, writer_plan(tmp_path), ["a"])
        for row in one.to_pylist()
    ]
    return message


def test_quarantine_file(tmp_path: Path) -> None:
    """Counters lost in the last bucket, or records out of order, would hide what was refused."""
    message = quarantine(tmp_path, 100)
    assert json.loads(message["counters"]) == {"documents_in": 4, "quarantined.empty": 2}
    found = pq.read_table(tmp_path / message["name"]).to_pylist()
    assert [row["offset"] for row in found] == [i * 1000 for i in range(3000)]
    assert found[3] == {"source": "a", "offset": 3000, "reason": "empty", "raw": b"xxx"}
    assert quarantine(tmp_path / "again", 7)["digest"] == message["digest"]


def messages(**counters: int) -> list[dict]:
    shard = {"bucket": 1, "k": 0, "documents": 3, "tokens": 50, "rows": 2}
    books = {
        "documents_in": 4,
        "documents_out": 3,
        "tokens": 50,
        "quarantined.empty": 1,
        **counters,
    }
    last = {"bucket": 3, "k": 0, "rows": 1, "bytes": 9, "name": "q", "counters": json.dumps(books)}
    return [shard, last]


def test_the_books_are_balanced() -> None:
    """A task answered twice, or not at all, must not become a dataset."""
    counters, found, shards = check_messages(messages(), PLAN)
    assert counters["quarantined"] == 1 and found == {"name": "q", "rows": 1, "bytes": 9}
    assert len(shards) == 1
    for wrong in ({"documents_in": 5}, {"documents_out": 4}, {"tokens": 49}):
        with pytest.raises(LeydenError, match="do not balance"):
            check_messages(messages(**wrong), PLAN)
    with pytest.raises(LeydenError, match="answered twice"):
        check_messages([messages()[0], *messages()], PLAN)
    with pytest.raises(LeydenError, match="for the counters"):
        check_messages(messages()[:1], PLAN)


def test_too_many_bad_records_are_refused() -> None:
    """A job that drops a third of its input and says nothing is how data gets lost."""
    books = {"documents_in": 100, "documents_out": 80, "tokens": 9, "quarantined": 20}
    books |= {"quarantined.empty": 5, "quarantined.not_json": 15}
    check_yield("text", 0.2, books, {"name": "q"}, "s3://b")
    with pytest.raises(DataRefused, match=r"20 of 100 .*15 not_json, 5 empty.* s3://b/q"):
        check_yield("text", 0.19, books, {"name": "q"}, "s3://b")
    none = {"documents_in": 2, "tokens": 0, "quarantined": 2, "quarantined.field_missing": 2}
    with pytest.raises(DataRefused, match="in the field 'text'"):
        check_yield("text", 1.0, none, {"name": "q"}, "s3://b")


def test_a_worker_s_error_is_unwrapped() -> None:
    """Spark wraps it in 60 lines of two tracebacks."""
    spark = (
        "An exception was thrown from the Python worker. Please see the stack trace below.\n"
        'Traceback (most recent call last):\n  File "x.py", line 1, in run\n'
        "dist.errors.SetupError: no space left (/scratch); free some\n\n\tat org.apache.spark.X\n"
    )
    error = unwrap_error(RuntimeError(spark))
    assert type(error) is SetupError and str(error) == "no space left (/scratch); free some"
    other = unwrap_error(RuntimeError("Traceback\n  File\nKeyError: 'x'\n\n\tat org.y\nDriver\n"))
    assert isinstance(other, LeydenError) and "KeyError: 'x'" in str(other)
    Path(str(other).rpartition(" is in ")[2].rstrip(")")).unlink()
