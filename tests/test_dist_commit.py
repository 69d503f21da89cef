"""Commit, open and verify: a version is visible whole or not at all, and damage is found."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dist.commit import commit_dataset, find_job, missing_files, publish_shard, target_lease
from dist.dataset import Dataset, open_dataset
from dist.errors import ConfigError, DataRefused, SetupError
from dist.manifest import Shard
from dist.storage import Storage
from dist.verify import ShardVerifier, check_presence, verify_full
from tests.make_dataset import edit_manifest, flip_byte, write_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return write_dataset(tmp_path / "data")


def shard_path(dataset: Dataset, index: int = 0) -> Path:
    return dataset.shard_path(dataset.manifest.shards[index])


def test_equal_rows_give_an_equal_identity_in_another_folder(tmp_path: Path) -> None:
    """A digest that holds the folder, the clock or a temporary name would differ here."""
    first, second = write_dataset(tmp_path / "a"), write_dataset(tmp_path / "b")
    assert first.data_digest == second.data_digest
    assert write_dataset(tmp_path / "c", seed=1).data_digest != first.data_digest


def test_references_bind_a_version(tmp_path: Path) -> None:
    """A trainer that follows LATEST during a run would change its data under way."""
    first = write_dataset(tmp_path / "data")
    second = write_dataset(tmp_path / "data", seed=1)
    url = str(tmp_path / "data")
    assert open_dataset(url).data_digest == second.data_digest
    assert open_dataset(f"{url}@{first.data_digest[:10]}").data_digest == first.data_digest
    assert open_dataset(first.reference).data_digest == first.data_digest
    with pytest.raises(ConfigError, match="no version of .* starts with 00000000"):
        open_dataset(f"{url}@00000000")
    with pytest.raises(ConfigError, match="there is no LATEST"):
        open_dataset(str(tmp_path))


def test_rows_are_found_in_their_shards(dataset: Dataset) -> None:
    """An off-by-one at a shard's border would read a neighbour's row or past the end."""
    split = dataset.split("train")
    sizes = [shard.rows for shard in split.shards]
    expected = [(s, r) for s, rows in enumerate(sizes) for r in range(rows)]
    shard, row = split.locate(np.arange(split.num_rows))
    assert list(zip(shard.tolist(), row.tolist(), strict=True)) == expected
    with pytest.raises(ConfigError, match=r"no split 'test'.*'train', 'validation'"):
        dataset.split("test")


def test_nothing_is_visible_before_the_last_step(dataset: Dataset, tmp_path: Path) -> None:
    """LATEST before the manifest, or a manifest before its shards, shows a broken version."""
    storage, written = Storage(str(tmp_path / "copy")), []
    for shard in dataset.manifest.shards:
        publish_shard(storage, dataset.shard_path(shard), shard.xxh3_128, shard.bytes)
    write = storage.write_atomic

    def watch(name: str, data: bytes) -> None:
        with pytest.raises(ConfigError):
            open_dataset(storage.url)
        assert not missing_files(storage, dataset.manifest)
        written.append(name.split("/")[0])
        write(name, data)

    storage.write_atomic = watch  # type: ignore[method-assign]
    commit_dataset(storage, dataset.manifest, {}, "0" * 64)
    assert written == ["manifests", "provenance", "jobs", "LATEST"]
    assert open_dataset(storage.url).data_digest == dataset.data_digest


def test_a_commit_without_its_shards_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    """A driver that trusts its tasks' messages would publish what a cleaner has deleted."""
    storage = Storage(str(tmp_path / "empty"))
    with pytest.raises(DataRefused, match="is missing"):
        commit_dataset(storage, dataset.manifest, {}, "0" * 64)
    assert storage.list("") == []


def test_a_job_is_found_only_while_its_files_are_there(dataset: Dataset) -> None:
    """A rerun that skips although a shard is gone leaves the user with a broken dataset."""
    assert find_job(dataset.storage, f"{0:064x}") == dataset.data_digest
    assert find_job(dataset.storage, "1" * 64) is None
    shard_path(dataset).unlink()
    assert find_job(dataset.storage, f"{0:064x}") is None


@pytest.mark.parametrize("damage", ["delete", "truncate", "grow"])
def test_missing_or_short_shards_are_found_at_once(dataset: Dataset, damage: str) -> None:
    """A half-copied folder must be refused before a GPU is used."""
    path = shard_path(dataset, 1)
    if damage == "delete":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-8] if damage == "truncate" else data + b"12345678")
    with pytest.raises(DataRefused, match=path.name):
        check_presence(dataset)


def test_any_flipped_byte_is_found(dataset: Dataset, tmp_path: Path) -> None:
    """Bytes outside the hash (padding, footer, metadata) could change the data unseen."""
    chance = random.Random(0)
    for _ in range(60):
        index = chance.randrange(len(dataset.manifest.shards))
        path = shard_path(dataset, index)
        clean = path.read_bytes()
        flip_byte(path, chance.randrange(len(clean)))
        with pytest.raises(DataRefused, match=path.name):
            verify_full(dataset, progress=False)
        path.write_bytes(clean)
    assert verify_full(dataset, progress=False).shards == 4


def test_swapped_shards_are_found(dataset: Dataset) -> None:
    """Two files of equal size under each other's names pass every check but the digest."""
    first, second = shard_path(dataset, 0), shard_path(dataset, 1)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    with pytest.raises(DataRefused):
        verify_full(dataset, progress=False)


def test_another_tokenizer_is_refused(dataset: Dataset) -> None:
    """Tokens decoded or extended with another vocabulary are silently wrong."""
    path = dataset.storage.local_path(f"tokenizers/{dataset.manifest.tokenizer_digest}.json")
    assert path is not None
    path.write_bytes(path.read_bytes().replace(b"reserved_3", b"reserved_X"))
    with pytest.raises(DataRefused, match="another tokenizer"):
        check_presence(dataset)


def test_an_edited_manifest_is_refused(dataset: Dataset) -> None:
    """An edit that still parses must not keep the old identity."""
    edit_manifest(dataset, tokenizer_digest="0" * 64)
    with pytest.raises(DataRefused, match="was changed"):
        open_dataset(dataset.reference)


def test_a_newer_manifest_is_refused_by_version(dataset: Dataset) -> None:
    """The message must say to update, not that the digest is wrong."""
    edit_manifest(dataset, format_version=9)
    with pytest.raises(DataRefused, match="format version 9"):
        open_dataset(dataset.storage.url)


def test_a_damaged_shard_is_refused_before_its_first_use(dataset: Dataset, tmp_path: Path) -> None:
    """With verification ahead of use, a wrong byte must still never reach the model."""
    split = dataset.split("train")
    flip_byte(shard_path(dataset, 1), 900)
    verifier = ShardVerifier(dataset, split, tmp_path / "stamps")
    verifier.start(range(3))
    verifier.require(0)
    verifier.require(2)
    with pytest.raises(DataRefused, match=split.shards[1].name):
        verifier.require(1)
    verifier.close()


def test_a_file_that_changes_while_it_is_hashed_gets_no_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is still being written over: trusted from then on for what it no longer is."""
    from dist import verify

    dataset = write_dataset(tmp_path / "data")
    split = dataset.split("train")
    path, hashed = dataset.shard_path(split.shards[0]), verify.wrong_bytes

    def then_written(path: Path, shard: Shard) -> str:
        said = hashed(path, shard)
        flip_byte(path, 1000)
        return said

    monkeypatch.setattr(verify, "wrong_bytes", then_written)
    ShardVerifier(dataset, split, tmp_path / "stamps").require(0)
    monkeypatch.setattr(verify, "wrong_bytes", hashed)
    with pytest.raises(DataRefused, match=path.name):
        ShardVerifier(dataset, split, tmp_path / "stamps").require(0)


def test_a_stamp_spares_the_hash_but_not_for_a_changed_file(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stamp by name alone would trust a file that was replaced since."""
    import dist.verify

    split, stamps = dataset.split("train"), tmp_path / "stamps"
    ShardVerifier(dataset, split, stamps).require(0)
    hashed: list[Path] = []
    real = dist.verify.file_digest
    monkeypatch.setattr(dist.verify, "file_digest", lambda p: (hashed.append(p), real(p))[1])
    ShardVerifier(dataset, split, stamps).require(0)
    assert hashed == []
    path = shard_path(dataset)
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataRefused):
        ShardVerifier(dataset, split, stamps).require(0)


def test_a_second_driver_is_refused_and_a_dead_one_is_not(tmp_path: Path) -> None:
    """Two drivers on one target, or a target blocked for ever by a killed one."""
    code = (
        "import sys, time; from dist.commit import target_lease; from dist.storage import Storage\n"
        "with target_lease(Storage(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    root = Path(__file__).parent.parent
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline().strip() == "held"
    with pytest.raises(SetupError, match=f"in use by process {other.pid} on host"):
        target_lease(Storage(str(tmp_path))).__enter__()
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    with target_lease(Storage(str(tmp_path))) as lease:
        lease.check()
    assert not (tmp_path / "lease.json").exists()


def test_a_lease_of_another_host_expires(tmp_path: Path) -> None:
    """A node that vanished must not block the target longer than a minute."""
    with target_lease(Storage(str(tmp_path))):
        record = json.loads((tmp_path / "lease.json").read_text())
    record.update(host="gone", heartbeat=time.time() - 30)
    (tmp_path / "lease.json").write_text(json.dumps(record))
    with pytest.raises(SetupError, match="on host gone"):
        target_lease(Storage(str(tmp_path))).__enter__()
    record.update(heartbeat=time.time() - 61)
    (tmp_path / "lease.json").write_text(json.dumps(record))
    with target_lease(Storage(str(tmp_path))) as lease:
        stolen = {**record, "token": "another", "heartbeat": time.time()}
        (tmp_path / "lease.json").write_text(json.dumps(stolen))
        with pytest.raises(SetupError, match="taken over"):
            lease.check()


def test_a_dataset_can_live_on_s3(
    dataset: Dataset,
    s3_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A commit that needs a rename or a listing would not work on an object store."""
    storage = Storage("s3://leyden/dataset")
    for shard in dataset.manifest.shards:
        publish_shard(storage, dataset.shard_path(shard), shard.xxh3_128, shard.bytes)
    storage.write_atomic(
        f"tokenizers/{dataset.manifest.tokenizer_digest}.json", dataset.read_tokenizer()
    )
    with target_lease(storage) as lease:
        commit_dataset(storage, dataset.manifest, {}, "0" * 64, lease)
    remote = open_dataset("s3://leyden/dataset")
    assert remote.data_digest == dataset.data_digest
    check_presence(remote)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = remote.manifest.shards[0]
    assert remote.shard_path(first).read_bytes() == dataset.shard_path(first).read_bytes()
    storage.delete(f"shards/{dataset.manifest.shards[0].name}")
    with pytest.raises(DataRefused, match="is missing"):
        check_presence(remote)


def test_many_shards_in_a_store_are_found_by_listing(
    dataset: Dataset, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,000 requests one by one stand between a run and its first batch; a listing that is
    trusted blindly hides a shard that is missing or short."""
    storage = Storage("s3://leyden/many")
    for shard in dataset.manifest.shards:
        publish_shard(storage, dataset.shard_path(shard), shard.xxh3_128, shard.bytes)
    monkeypatch.setattr("dist.commit.LISTED_ABOVE", 1)
    asked = []
    size = Storage.size
    monkeypatch.setattr(Storage, "size", lambda self, name: asked.append(name) or size(self, name))
    assert missing_files(storage, dataset.manifest) == [] and asked == []
    first, second = dataset.manifest.shards[:2]
    storage.delete(f"shards/{first.name}")
    storage.write_atomic(f"shards/{second.name}", b"short")
    assert missing_files(storage, dataset.manifest) == [
        f"shards/{first.name} is missing",
        f"shards/{second.name} has 5 bytes instead of {second.bytes}",
    ]


def test_a_copied_folder_is_the_same_dataset(dataset: Dataset, tmp_path: Path) -> None:
    """Absolute paths anywhere in the dataset would break it when it moves."""
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    shutil.rmtree(tmp_path / "data")
    moved = open_dataset(str(tmp_path / "moved"))
    assert moved.data_digest == dataset.data_digest
    verify_full(moved, progress=False)
    assert moved.read_provenance() is not None
