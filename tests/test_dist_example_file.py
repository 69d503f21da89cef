"""Shard files of examples: equal rows give equal bytes, wrong masks are never written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist.batch_hashes import damaged_batches
from dist.errors import DataRefused
from dist.example_file import Example, ExampleShard, ExampleShardWriter, example_rows_per_batch
from dist.shard_file import PackedShard, ShardFile, file_digest
from tests.make_dataset import flip_byte
from tests.make_examples import random_example

GOLDEN = Path(__file__).parent / "golden" / "examples_v1.arrow"


def example(number: int) -> Example:
    """Deterministic without a random generator, whose streams may change between versions."""
    length = 2 + (number * 7) % 13
    spans = [[1, 2], [3, length]] if length > 4 else [[1, length]]
    return Example(
        tokens=((np.arange(length) * 31 + number) % 100_003).astype(np.uint32),
        spans=np.array(spans if number % 5 else [], np.int32).reshape(-1, 2),
        segments=np.array([1, length - 1], np.int32), input=number % 3, offset=number << 33,
    )  # fmt: skip


def write(path: Path, count: int = 21) -> ShardFile:
    writer = ExampleShardWriter(path, metadata={"b": "2", "a": "1"}, rows_per_batch=8)
    for number in range(count):
        writer.write(example(number))
    return writer.close()


def test_golden_shard_is_kept_byte_for_byte(tmp_path: Path) -> None:
    """A pyarrow or schema change that moves bytes would give every dataset a new digest."""
    made = write(tmp_path / "shard")
    assert (tmp_path / "shard").read_bytes() == GOLDEN.read_bytes()
    assert made.xxh3_128 == file_digest(GOLDEN) and made.bytes == GOLDEN.stat().st_size


def test_examples_come_back_as_written(tmp_path: Path) -> None:
    """Columns of a neighbour row, or of another record batch."""
    made = write(tmp_path / "shard")
    shard = ExampleShard(tmp_path / "shard")
    assert shard.num_rows == made.rows == 21
    assert shard.lengths().tolist() == [len(example(i).tokens) for i in range(21)]
    for number in (20, 0, 8, 7, 15):
        found, wanted = shard.read(number), example(number)
        for name in ("tokens", "spans", "segments"):
            assert getattr(found, name).tolist() == getattr(wanted, name).tolist()
        assert (found.input, found.offset) == (wanted.input, wanted.offset)
    with pytest.raises(IndexError, match="row 21 of 21"):
        shard.read(21)


@pytest.mark.parametrize(
    "changes",
    [
        {"spans": [[0, 2]]},  # nothing precedes token 0
        {"spans": [[1, 9]]},
        {"spans": [[2, 2]]},
        {"spans": [[1, 3], [3, 4]]},  # touch: two ways to write one mask
        {"spans": [[3, 4], [1, 2]]},
        {"segments": [3, 4]},
        {"segments": [8, 0]},
        {"tokens": [], "segments": [], "spans": []},
    ],
)
def test_masks_that_do_not_fit_are_never_written(changes: dict[str, list[int]]) -> None:
    """A span past its example would train a token of the next one in the packed row."""
    kinds = {"tokens": np.uint32, "spans": np.int32, "segments": np.int32}
    arrays = {name: np.array(value, kinds[name]) for name, value in changes.items()}
    if "spans" in arrays:
        arrays["spans"] = arrays["spans"].reshape(-1, 2)
    whole = Example(
        tokens=np.arange(8, dtype=np.uint32), spans=np.array([[1, 4]], np.int32),
        segments=np.array([2, 6], np.int32), input=0, offset=0,
    )  # fmt: skip
    whole.check()
    with pytest.raises(ValueError):
        replace(whole, **arrays).check()


@given(st.integers(0, 2**32))
def test_what_the_test_data_makes_is_valid(seed: int) -> None:
    """Loader tests over masks that no job would write prove nothing."""
    made = random_example(np.random.default_rng(seed), 300, 1)
    made.check()
    assert made.num_targets > 0


def test_damage_is_placed_and_kinds_are_told_apart(tmp_path: Path) -> None:
    """Examples read as packed rows would train on nonsense; damage must name its record batch."""
    write(tmp_path / "shard")
    assert damaged_batches(tmp_path / "shard") == []
    size = (tmp_path / "shard").stat().st_size
    shard = ExampleShard(tmp_path / "shard")
    needle = shard.example_tokens(9).tobytes()
    shard.close()
    at = (tmp_path / "shard").read_bytes().index(needle)
    assert 0 < at < size
    flip_byte(tmp_path / "shard", at)
    assert damaged_batches(tmp_path / "shard") == [1]
    with pytest.raises(DataRefused, match=r"leyden\.examples\.v1"):
        PackedShard(tmp_path / "shard")


def test_batches_are_bounded_by_the_longest_example() -> None:
    """Record batches of 8k-token examples must stay fetchable in one request."""
    assert example_rows_per_batch(8192) * 8192 * 4 == 4 << 20
    assert example_rows_per_batch(4096) == 256
