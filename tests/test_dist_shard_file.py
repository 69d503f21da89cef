"""Shard files: equal rows give equal bytes, and anything that reads Arrow reads them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dist.batch_hashes import damaged_batches
from dist.errors import DataRefused
from dist.packing import PackedRows, Packer
from dist.shard_file import (
    PackedShard,
    PackedShardWriter,
    ShardFile,
    file_digest,
    rows_per_batch,
)

GOLDEN = Path(__file__).parent / "golden" / "packed_tokens_v1.arrow"


def rows(documents: int = 40, seq_len: int = 8) -> list[PackedRows]:
    """Deterministic without a random generator, whose streams may change between versions."""
    lengths = 1 + (np.arange(documents) * 7) % 23
    tokens = (np.arange(lengths.sum()) * 31) % 997
    packer = Packer(seq_len, np.uint16)
    inputs = np.arange(documents) % 3
    parts = [packer.add(tokens, lengths, inputs, np.arange(documents) * 100), packer.flush()]
    return [part for part in parts if part is not None]


def write(path: Path, parts: list[PackedRows], batch: int = 16) -> ShardFile:
    writer = PackedShardWriter(
        path,
        seq_len=8,
        token_dtype="uint16",
        metadata={"kind": "packed_tokens"},
        rows_per_batch=batch,
    )
    for part in parts:
        writer.write(part)
    return writer.close()


def test_golden_shard_is_kept_byte_for_byte(tmp_path: Path) -> None:
    """A pyarrow or schema change that moves bytes would give every dataset a new digest."""
    made = write(tmp_path / "shard", rows())
    assert (tmp_path / "shard").read_bytes() == GOLDEN.read_bytes()
    assert made.xxh3_128 == file_digest(GOLDEN) and made.bytes == GOLDEN.stat().st_size


def test_bytes_do_not_depend_on_how_rows_arrive(tmp_path: Path) -> None:
    """Batches cut where the writer was called would depend on Spark's Arrow batches."""
    from dist.shard_file import join_rows, slice_rows

    whole = join_rows(rows())
    single = [slice_rows(whole, i, i + 1) for i in range(len(whole))]
    assert write(tmp_path / "a", [whole]).xxh3_128 == write(tmp_path / "b", single).xxh3_128


def test_bytes_are_equal_in_another_process(tmp_path: Path) -> None:
    """Bytes that hold addresses, hash seeds or uninitialised padding would differ here."""
    code = (
        "from pathlib import Path; import sys\n"
        "from tests.test_dist_shard_file import rows, write\n"
        "print(write(Path(sys.argv[1]), rows()).xxh3_128)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "99", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")],
        cwd=root,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == file_digest(GOLDEN)


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    """A gather that mixes up batches, or pieces of a neighbour row, would show here."""
    from dist.shard_file import join_rows

    whole = join_rows(rows())
    write(tmp_path / "shard", rows(), batch=4)
    shard = PackedShard(tmp_path / "shard")
    assert (shard.num_rows, shard.seq_len, shard.dtype) == (len(whole), 8, np.uint16)
    pick = np.array([len(whole) - 1, 0, 5, 4, 4])
    assert np.array_equal(shard.gather(pick).tokens, whole.tokens[pick])
    flat, splits = shard.doc_lens(pick)
    for k, row in enumerate(pick):
        expected = whole.doc_lens[whole.row_splits[row] : whole.row_splits[row + 1]]
        assert np.array_equal(flat[splits[k] : splits[k + 1]], expected)
    assert shard.lineage(0)[0] == (0, 0, int(whole.doc_lens[0]))
    assert damaged_batches(shard.path) == []
    with pytest.raises(IndexError):
        shard.lineage(len(whole))


def test_a_plain_arrow_reader_sees_the_rows(tmp_path: Path) -> None:
    """A file that only Leyden opens would lock users in."""
    write(tmp_path / "shard", rows())
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "shard"))).read_all()
    assert table.column_names == ["tokens", "doc_lens", "doc_input", "doc_offset"]
    assert not any(field.nullable for field in table.schema)
    assert table.column("tokens").combine_chunks().values.to_numpy().dtype == np.uint16


def test_a_damaged_batch_is_named(tmp_path: Path) -> None:
    """Damage reported without its place costs the user the whole shard's lineage."""
    write(tmp_path / "shard", rows(), batch=4)
    data = bytearray((tmp_path / "shard").read_bytes())
    third = PackedShard(tmp_path / "shard")
    where = bytes(data).find(third.tokens(8, 9).tobytes())
    data[where] ^= 1
    (tmp_path / "shard").write_bytes(bytes(data))
    assert damaged_batches(tmp_path / "shard") == [2]


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    """An Arrow file of another kind, read as tokens, would train on noise."""
    (tmp_path / "text").write_text("not arrow")
    with pytest.raises(DataRefused, match="text"):
        PackedShard(tmp_path / "text")
    with pa.ipc.new_file(str(tmp_path / "other"), pa.schema([("a", pa.int8())])) as out:
        out.write_batch(pa.record_batch({"a": pa.array([1], pa.int8())}))
    with pytest.raises(DataRefused, match=r"not leyden\.packed_tokens"):
        PackedShard(tmp_path / "other")


def test_batches_are_a_power_of_two_of_rows_within_their_size() -> None:
    """A batch size off the power of two would break row -> batch by arithmetic elsewhere."""
    for seq_len, dtype in ((2048, "uint16"), (8192, "uint32"), (256, "uint16"), (10**7, "uint32")):
        count = rows_per_batch(seq_len, dtype)
        assert count & (count - 1) == 0
        size = count * (seq_len + 1) * np.dtype(dtype).itemsize
        assert size <= 4 << 20 or count == 1
        assert 2 * size > 4 << 20
