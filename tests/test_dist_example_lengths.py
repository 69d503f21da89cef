"""The table of lengths: the rows that the shards would give, without reading a shard."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist.audit import replay
from dist.cache import CacheConfig
from dist.commit import commit_dataset, missing_files, publish_lengths
from dist.dataset import Dataset, mix, open_dataset
from dist.errors import DataRefused
from dist.example_file import ExampleShard
from dist.example_lengths import lengths_file, parse_lengths
from dist.examples import ExampleDataset, as_rows
from dist.run_dir import RunDir
from dist.start import DataConfig
from dist.verify import check_presence, verify_full
from tests.http_server import serve
from tests.make_dataset import flip_byte
from tests.make_examples import MAX_LENGTH, write_examples
from tests.rank_processes import train

SHARDS = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_examples(tmp_path_factory.mktemp("data"), num_train_shards=SHARDS)


def table_path(dataset: Dataset) -> Path:
    path = dataset.storage.local_path(f"lengths/{dataset.manifest.lengths_digest}.arrow")
    assert path is not None
    return path


def with_table(dataset: Dataset, data: bytes) -> Dataset:
    """A version of the same shards that names another table."""
    digest = publish_lengths(dataset.storage, data)
    manifest = dataclasses.replace(dataset.manifest, lengths_digest=digest)
    made = commit_dataset(dataset.storage, manifest, {}, "ab" * 32)
    return open_dataset(f"{dataset.storage.url}@{made}")


def from_shards(dataset: Dataset) -> Dataset:
    """The dataset as it was before there were tables."""
    manifest = dataclasses.replace(dataset.manifest, lengths_digest=None)
    return dataclasses.replace(dataset, manifest=manifest)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 1 << 30), shards=st.integers(1, 4), num_examples=st.integers(1, 30),
    longest=st.integers(2, 60), packing=st.sampled_from(["packed", "padded"]),
    more=st.integers(0, 90),
)  # fmt: skip
def test_rows_of_the_table_are_those_of_the_shards(
    tmp_path_factory: pytest.TempPathFactory, seed: int, shards: int, num_examples: int,
    longest: int, packing: str, more: int,
) -> None:  # fmt: skip
    """Lengths in another order than the shards', of another split, or cut to fewer bits: examples
    are then put into rows where they do not fit, or a resumed run meets other rows."""
    root = tmp_path_factory.mktemp("any")
    dataset = write_examples(
        root, seed=seed, num_train_shards=shards, num_examples=num_examples, longest=longest
    )
    assert dataset.manifest.lengths_digest is not None
    told, read = (
        as_rows(one, packing, longest - 1 + more) for one in (dataset, from_shards(dataset))
    )
    for name in ("train", "validation"):
        one: Any = told.split(name)
        other: Any = read.split(name)
        assert one.row_start.tolist() == other.row_start.tolist()
        assert one.num_tokens == other.num_tokens
        for mine, theirs, lengths, real in zip(
            one.packs, other.packs, one.lengths, other.lengths, strict=True
        ):
            assert mine.examples.tolist() == theirs.examples.tolist()
            assert mine.row_splits.tolist() == theirs.row_splits.tolist()
            assert lengths.tolist() == real.tolist()


def test_a_remote_start_fetches_the_shards_of_its_rows_alone(
    dataset: Dataset, tmp_path: Path
) -> None:
    """A start that fetches the whole dataset to learn its lengths: hours before the first step."""
    url = dataset.storage.url
    with serve(url) as server:
        data = DataConfig(url=server.url, cache_dir=str(tmp_path / "cache"), seq_len=48)
        changes = {"data": data, "strategy": "ddp", "global_batch": 4, "max_steps": 1}
        assert train(server.url, tmp_path / "run", 2, changes) == [0, 0]
        rows = [one.row for one in replay(RunDir(tmp_path / "run"), 0, data=url, text=False).rows]
        made = as_rows(dataset, "packed", 48)
        needed = {made.split("train").shards[n].name for n in made.split("train").locate(rows)[0]}
        needed |= {shard.name for shard in dataset.manifest.shards_of("validation")}
        fetched = {Path(one.path).name for one in server.gets if one.path.startswith("/shards/")}
        assert fetched == needed and len(needed) <= 5 < SHARDS
        assert server.gets_of(f"{dataset.manifest.lengths_digest}.arrow")
        sizes = {shard.name: shard.bytes for shard in dataset.manifest.shards}
        small = [one for one in server.gets if not one.path.startswith("/shards/")]
        assert server.sent_bytes == sum(sizes[name] for name in needed) + sum(
            one.end - one.start for one in small
        )
    old = write_examples(tmp_path / "old", num_train_shards=SHARDS, with_lengths=False)
    assert old.manifest.lengths_digest is None
    with serve(old.storage.url) as server:
        remote = open_dataset(server.url, CacheConfig(folder=str(tmp_path / "other")))
        split = as_rows(remote, "packed", 48).split("train")
        assert len(server.gets_of(".arrow")) == SHARDS, "without a table every shard is read"
        assert split.num_rows == made.split("train").num_rows


def test_the_table_is_read_once_for_all_splits(dataset: Dataset, tmp_path: Path) -> None:
    """Megabytes of lengths that are fetched anew for each split."""
    with serve(dataset.storage.url) as server:
        remote = open_dataset(server.url, CacheConfig(folder=str(tmp_path / "cache")))
        made = as_rows(remote, "packed", 48)
        assert made.split("train").num_rows > made.split("validation").num_rows > 0
        assert made.split("train").num_rows
        assert len(server.gets_of(".arrow")) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_table_is_named(tmp_path: Path, damage: str) -> None:
    """Rows packed by wrong lengths: examples cut in silence, and other rows than the run's."""
    dataset = write_examples(tmp_path / "data")
    path = table_path(dataset)
    if damage == "flip":
        flip_byte(path, path.stat().st_size // 2)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        path.unlink()
        assert missing_files(dataset.storage, dataset.manifest) == [
            f"lengths/{path.name} is missing"
        ]
    for read in (
        lambda: as_rows(dataset).split("train"),
        lambda: check_presence(dataset),
        lambda: verify_full(dataset, progress=False),
    ):
        with pytest.raises(DataRefused, match=f"lengths/{path.name}.*prep job again"):
            read()


def test_a_table_of_other_examples_is_refused(tmp_path: Path) -> None:
    """A writer whose table does not follow its shards: the digest is right, the lengths are not."""
    dataset = write_examples(tmp_path / "data")
    table = dataset.read_lengths()
    assert table is not None
    lengths = np.concatenate([one for split in ("train", "validation") for one in table[split]])
    wrong = lengths.copy()
    wrong[[3, 4]] = wrong[[4, 3]]
    assert wrong[3] != wrong[4]
    split = as_rows(with_table(dataset, lengths_file([wrong], MAX_LENGTH)), "packed", 48).split(
        "train"
    )
    shard = split.shards[0]
    with pytest.raises(DataRefused, match=f"examples of .*{shard.name} have other lengths"):
        split.open_shard(0, dataset.shard_path(shard))
    split.open_shard(1, dataset.shard_path(split.shards[1])).close()
    other = with_table(dataset, lengths_file([lengths[:-1]], MAX_LENGTH))
    with pytest.raises(DataRefused, match="lengths of 119 examples, the manifest has 120"):
        as_rows(other).split("train")
    wrong[0] = wrong[0] % MAX_LENGTH + 1
    other = with_table(dataset, lengths_file([wrong], MAX_LENGTH))
    with pytest.raises(DataRefused, match="of train tell of"):
        as_rows(other).split("train")
    foreign = with_table(dataset, dataset.shard_path(shard).read_bytes())
    with pytest.raises(DataRefused, match=r"is 'leyden\.examples\.v1', not leyden"):
        as_rows(foreign).split("train")


def test_equal_lengths_give_equal_bytes_for_ever(dataset: Dataset) -> None:
    """A digest that follows a library's version, or how the shards are cut, renames datasets."""
    small = lengths_file([np.array([3, 1]), np.array([65_535])], 65_535)
    assert small == lengths_file([np.array([3, 1, 65_535], np.int32)], 65_535)
    assert hashlib.sha256(small).hexdigest() == GOLDEN_16
    large = lengths_file([np.array([3, 70_000])], 70_000)
    assert hashlib.sha256(large).hexdigest() == GOLDEN_32
    shard = dataclasses.replace(dataset.manifest.shards[0], rows=2)
    assert [one.tolist() for one in parse_lengths(large, [shard], "x")] == [[3, 70_000]]
    for wrong in ([0], [17]):
        with pytest.raises(ValueError, match="max_length 16"):
            lengths_file([np.array(wrong)], 16)


def test_mixed_examples_have_a_table_each(dataset: Dataset, tmp_path: Path) -> None:
    """The first source's table taken for all of them."""
    second = write_examples(tmp_path / "second", seed=5)
    mixed = as_rows(mix(["a", "b"], [dataset, second]), "packed", 48)
    assert mixed.manifest.lengths_digest is None
    split = mixed.split("train")
    for number in (0, SHARDS, SHARDS + 1):
        opened = split.open_shard(number, mixed.shard_path(split.shards[number]))
        assert opened.num_rows == split.row_start[number + 1] - split.row_start[number]
        opened.close()
    parts = [part.split("train") for part in mixed.sources]
    assert split.num_rows == sum(part.num_rows for part in parts)


def test_a_local_start_opens_no_shard(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of opened files on a network file system before the first step."""
    opened: list[Path] = []
    monkeypatch.setattr(ExampleShard, "__init__", lambda self, path: opened.append(path))
    made = as_rows(dataset)
    assert isinstance(made, ExampleDataset) and made.split("train").num_rows
    assert "0.00%" not in made.describe("validation") and not opened


GOLDEN_16 = "673c34680abb17deab8a42bb9814a5e731dfbc0e3133faaffb5dc0b387ad9d2a"
GOLDEN_32 = "898516bab404e181a13721a1c23a250a236f378cfabf157ccc56093c4e8b033b"
