"""gc deletes garbage, and nothing that any version, running job or other user needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist.commit import (
    commit_dataset,
    publish_lengths,
    publish_quarantine,
    publish_shard,
    publish_tokenizer,
    target_lease,
)
from dist.data_gc import collect, lease_note, parse_age
from dist.dataset import Dataset, open_dataset
from dist.errors import ConfigError, DataRefused, SetupError
from dist.storage import Storage
from dist.verify import verify_full
from tests.make_dataset import tokenizer_json, write_dataset
from tests.make_examples import write_examples

DAY_S = 86_400.0
ROOT = Path(__file__).resolve().parent.parent


def later(days: float) -> float:
    return time.time() + days * DAY_S


def add_garbage(storage: Storage, count: int = 3) -> set[str]:
    """Files that no version refers to, of every kind."""
    names = {f"shards/{number:032x}.arrow" for number in range(count)}
    names |= {f"quarantine/{7:032x}.parquet", f"tokenizers/{7:064x}.json"}
    names |= {f"lengths/{7:064x}.arrow"}
    names |= {f"shards/.{7:032x}.arrow.12345678.tmp", ".LATEST.77.12345678.tmp"}
    names |= {f"manifests/.{7:064x}.json.1.12345678.tmp"}
    for name in names:
        storage.write_atomic(name, b"garbage")
    return names


def check_versions(root: Path) -> int:
    """Read every byte of every version; returns how many there are."""
    stems = [path.stem for path in (root / "manifests").glob("[0-9a-f]*.json")]
    for digest in stems:
        verify_full(open_dataset(f"{root}@{digest}"), progress=False)
    return len(stems)


def test_garbage_goes_and_versions_stay(tmp_path: Path) -> None:
    """A shard of an older version deleted, because LATEST does not name it."""
    write_dataset(tmp_path / "data")
    dataset = write_dataset(tmp_path / "data", seed=1)
    garbage = add_garbage(dataset.storage)
    (tmp_path / "data" / "shards" / "notes.txt").write_text("mine")
    dry = collect(dataset.storage, 7 * DAY_S, dry_run=True, now=later(8))
    assert set(dry.garbage) == garbage
    assert all((tmp_path / "data" / name).exists() for name in garbage)
    found = collect(dataset.storage, 7 * DAY_S, now=later(8))
    assert set(found.garbage) == garbage and found.versions == 2
    assert found.foreign == ["shards/notes.txt"]
    assert not any((tmp_path / "data" / name).exists() for name in garbage)
    assert check_versions(tmp_path / "data") == 2
    assert not (tmp_path / "data" / "lease.json").exists()


def test_a_write_in_progress_stays(tmp_path: Path) -> None:
    """--older-than 0s that deletes the file which a job, whose lease was lost, is writing now."""
    dataset = write_dataset(tmp_path / "data")
    torn = f"shards/.{7:032x}.arrow.12345678.tmp"
    dataset.storage.write_atomic(torn, b"half")
    assert set(collect(dataset.storage, 0, now=time.time() + 1800).young) == {torn}
    assert set(collect(dataset.storage, 0, now=time.time() + 3700).garbage) == {torn}


def test_gc_stops_when_its_lease_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gc that was stopped for an hour and goes on deleting under the next job's lease."""
    dataset = write_dataset(tmp_path / "data")
    garbage = add_garbage(dataset.storage)
    delete = Storage.delete

    def then_lost(self: Storage, name: str) -> None:
        delete(self, name)
        self.write_atomic("lease.json", b'{"token": "of another", "pid": 1, "host": "far"}')

    monkeypatch.setattr(Storage, "delete", then_lost)
    with pytest.raises(SetupError, match="taken over by another process"):
        collect(dataset.storage, 0, now=later(30))
    left = [name for name in garbage if (tmp_path / "data" / name).exists()]
    assert len(left) == len(garbage) - 1


def test_lengths_of_a_version_stay(tmp_path: Path) -> None:
    """The table of lengths deleted under a dataset: no run of it could start. And one that a job
    finds in place, while it has still to commit, taken for old."""
    dataset = write_examples(tmp_path / "data")
    write_examples(tmp_path / "data", num_examples=9)
    table = tmp_path / "data" / "lengths" / f"{dataset.manifest.lengths_digest}.arrow"
    assert not collect(dataset.storage, 0, now=later(30)).garbage
    assert check_versions(tmp_path / "data") == 2
    (tmp_path / "data" / "manifests" / f"{dataset.data_digest}.json").unlink()
    found_in_place = table.stat()
    time.sleep(0.02)  # the clock of the file system ticks
    publish_lengths(dataset.storage, table.read_bytes())
    assert table.stat().st_ctime_ns > found_in_place.st_ctime_ns
    assert table.stat().st_ino == found_in_place.st_ino, "written anew"
    found = collect(dataset.storage, DAY_S, now=later(2))
    assert f"lengths/{table.name}" in found.garbage and not table.exists()


def test_what_is_young_stays(tmp_path: Path) -> None:
    """A shard that a task on another machine published a minute ago."""
    dataset = write_dataset(tmp_path / "data")
    garbage = add_garbage(dataset.storage)
    found = collect(dataset.storage, 7 * DAY_S, now=later(6.9))
    assert not found.garbage and set(found.young) == garbage
    # mtime alone would make a link to an old file old.
    os.utime(tmp_path / "data" / "shards" / f"{0:032x}.arrow", (0, 0))
    assert not collect(dataset.storage, 7 * DAY_S).garbage


def test_refused_rows_of_a_version_stay(tmp_path: Path) -> None:
    """The rows that a job refused, which its provenance names."""
    dataset = write_dataset(tmp_path / "data")
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"rows")
    name = publish_quarantine(dataset.storage, path)
    record = {"inputs": [], "quarantine": {"name": name, "rows": 1, "bytes": 4}}
    commit_dataset(dataset.storage, dataset.manifest, record, "2" * 64)
    assert not collect(dataset.storage, 0, now=later(8)).garbage
    assert (tmp_path / "data" / name).exists()


def test_nothing_is_deleted_while_a_job_writes(tmp_path: Path) -> None:
    """Shards of a running job, older than the age as the job takes weeks."""
    dataset = write_dataset(tmp_path / "data")
    garbage = add_garbage(dataset.storage)
    with target_lease(dataset.storage):
        with pytest.raises(SetupError, match=rf"is in use by process {os.getpid()} on host"):
            collect(dataset.storage, 0, now=later(30))
        assert f"process {os.getpid()}" in lease_note(dataset.storage)
        assert set(collect(dataset.storage, 0, dry_run=True, now=later(30)).garbage) == garbage
    assert lease_note(dataset.storage) == ""
    assert all((tmp_path / "data" / name).exists() for name in garbage)


def test_a_shard_that_a_job_found_in_place_is_young_again(tmp_path: Path) -> None:
    """A job that lost its lease commits over a shard that it had found and gc then deleted."""
    dataset = write_dataset(tmp_path / "other")
    storage = Storage(str(tmp_path / "data"))
    shard = dataset.manifest.shards[0]
    source = dataset.shard_path(shard)
    os.utime(source, (1, 1))  # an old file, published here as a link
    for _ in range(2):
        publish_shard(storage, source, shard.xxh3_128, shard.bytes)
        changed = storage.changed(f"shards/{shard.name}")
        assert changed is not None and time.time() - changed < 60
    time.sleep(0.05)
    before = storage.changed(f"shards/{shard.name}")
    stat = (tmp_path / "data" / "shards" / shard.name).stat()
    publish_shard(storage, source, shard.xxh3_128, shard.bytes)
    after = storage.changed(f"shards/{shard.name}")
    assert before is not None and after is not None and after > before
    # Its mtime stays, or trainers would hash the shard again.
    assert (tmp_path / "data" / "shards" / shard.name).stat().st_mtime_ns == stat.st_mtime_ns


def test_a_tokenizer_that_a_job_found_in_place_is_young_again(tmp_path: Path) -> None:
    """The same for the tokenizer, which no manifest names until the job commits."""
    storage = Storage(str(tmp_path / "data"))
    name = f"tokenizers/{publish_tokenizer(storage, tokenizer_json())}.json"
    before = storage.changed(name)
    time.sleep(0.05)
    publish_tokenizer(storage, tokenizer_json())
    after = storage.changed(name)
    assert before is not None and after is not None and after > before


def test_a_job_that_lost_its_lease_to_gc_does_not_commit(tmp_path: Path) -> None:
    """A stalled job that wakes up after gc and publishes a manifest over deleted shards."""
    dataset = write_dataset(tmp_path / "other")
    storage = Storage(str(tmp_path / "data"))
    write_dataset(tmp_path / "data", seed=1)
    with target_lease(storage) as lease:
        for shard in dataset.manifest.shards:
            publish_shard(storage, dataset.shard_path(shard), shard.xxh3_128, shard.bytes)
        # As if its host had stood still for longer than a lease lives.
        record = storage.read("lease.json")
        storage.write_atomic("lease.json", record.replace(b'"heartbeat": 1', b'"heartbeat": 0'))
        assert len(collect(storage, 0, now=later(8)).garbage) >= 4
        with pytest.raises(SetupError, match="was taken over"):
            commit_dataset(storage, dataset.manifest, {}, "3" * 64, lease)
    assert check_versions(tmp_path / "data") == 1


def test_jobs_and_gc_at_the_same_time(tmp_path: Path) -> None:
    """A shard deleted between a job's finding it and its commit."""
    jobs = [write_dataset(tmp_path / f"job-{seed}", seed=seed, documents=6) for seed in range(6)]
    root = tmp_path / "data"
    copy_to(jobs[0], Storage(str(root)))
    failed: list[BaseException] = []

    def commit_all() -> None:
        storage = Storage(str(root))
        for number, job in enumerate(jobs[1:]):
            while True:
                try:
                    with target_lease(storage) as lease:
                        for shard in job.manifest.shards:
                            path = job.shard_path(shard)
                            publish_shard(storage, path, shard.xxh3_128, shard.bytes)
                        publish_tokenizer(storage, job.read_tokenizer())
                        commit_dataset(storage, job.manifest, {}, f"{number:064x}", lease)
                    break
                except SetupError:
                    continue  # gc holds it
                except BaseException as error:
                    failed.append(error)
                    return

    worker = threading.Thread(target=commit_all)
    worker.start()
    while worker.is_alive():
        try:
            collect(Storage(str(root)), 0, now=later(8))
        except SetupError:
            continue  # the job holds it
    worker.join()
    assert not failed
    assert check_versions(root) == len(jobs)


def test_the_shards_are_looked_for_after_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards checked, then gc by a newer lease, then the lease checked while that one ended."""
    dataset = write_dataset(tmp_path / "data")
    asked = []
    with target_lease(dataset.storage) as lease:
        check = lease.check
        monkeypatch.setattr(lease, "check", lambda: (asked.append("lease"), check()))
        monkeypatch.setattr(
            "dist.commit.missing_files", lambda *_: asked.append("shards") or []
        )  # fmt: skip
        commit_dataset(dataset.storage, dataset.manifest, {}, "4" * 64, lease)
    assert asked == ["lease", "shards"]


@pytest.mark.parametrize("damage", ["torn", "edited", "newer", "latest", "provenance"])
def test_what_cannot_be_read_stops_it(damage: str, tmp_path: Path) -> None:
    """References that are not understood taken for none: a newer Leyden's shards deleted."""
    dataset = write_dataset(tmp_path / "data")
    add_garbage(dataset.storage)
    manifest = tmp_path / "data" / "manifests" / f"{dataset.data_digest}.json"
    text = manifest.read_text()
    if damage == "torn":
        manifest.write_text(text[:-20])
    elif damage == "edited":
        manifest.write_text(text.replace('"rows": ', '"rows":  '))
    elif damage == "newer":
        manifest.write_text(text.replace('"format_version": 1', '"format_version": 2'))
    elif damage == "latest":
        manifest.rename(tmp_path / "elsewhere.json")
        write_dataset(tmp_path / "data", seed=1)
        (tmp_path / "data" / "LATEST").write_text(dataset.data_digest + "\n")
    else:
        next((tmp_path / "data" / "provenance").iterdir()).write_text("{")
    before = sorted(path for path in (tmp_path / "data" / "shards").iterdir())
    if damage == "edited":
        # White space changes the bytes, not what they say: the references are still all there.
        assert collect(dataset.storage, 0, now=later(8)).versions == 1
    else:
        with pytest.raises(DataRefused, match="nothing is deleted|before anything is deleted"):
            collect(dataset.storage, 0, now=later(8))
        assert sorted((tmp_path / "data" / "shards").iterdir()) == before


class Killed(BaseException):
    pass


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_an_end_at_any_deletion_leaves_every_version_readable(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """An order of deletions in which a version is broken for a moment."""
    root = tmp_path_factory.mktemp("gc") / "data"
    versions = data.draw(st.integers(1, 3))
    for seed in range(versions):
        dataset = write_dataset(root, seed=seed, documents=6, num_train_shards=2)
    if data.draw(st.booleans()) and versions > 1:
        # An older version given up: its shards become garbage unless another has them.
        gone = next(p for p in (root / "manifests").iterdir() if p.stem != dataset.data_digest)
        gone.unlink()
        versions -= 1
    count = len(add_garbage(dataset.storage, data.draw(st.integers(0, 4))))
    stop_at = data.draw(st.integers(0, count + 3))
    deleted, delete = [], dataset.storage.delete

    def stop(name: str) -> None:
        if name != "lease.json" and len(deleted) == stop_at:
            raise Killed
        deleted.append(name)
        delete(name)

    storage = Storage(str(root))
    storage.delete = stop  # type: ignore[method-assign]
    try:
        collect(storage, 0, now=later(8))
    except Killed:
        pass
    assert check_versions(root) == versions
    collect(Storage(str(root)), 0, now=later(8))
    assert check_versions(root) == versions
    assert not collect(Storage(str(root)), 0, dry_run=True, now=later(8)).garbage


def test_a_killed_gc_leaves_no_lease_for_ever(tmp_path: Path) -> None:
    """SIGKILL in the middle, and every later job refused."""
    dataset = write_dataset(tmp_path / "data")
    add_garbage(dataset.storage, 400)
    code = (
        "import sys, time\nfrom dist.data_gc import collect\nfrom dist.storage import Storage\n"
        "print('go', flush=True)\ncollect(Storage(sys.argv[1]), 0, now=time.time() + 1e6)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "go\n"
    until = time.monotonic() + 30
    while not (tmp_path / "data" / "lease.json").exists() and process.poll() is None:
        assert time.monotonic() < until
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert check_versions(tmp_path / "data") == 1
    collect(dataset.storage, 0, now=later(8))
    assert check_versions(tmp_path / "data") == 1


def test_s3_and_memory_have_ages_too(s3_server: str, tmp_path: Path) -> None:
    """An object store without mtime: nothing deleted for ever, or everything at once."""
    storage = Storage("s3://leyden/gc")
    local = write_dataset(tmp_path / "data")
    copy_to(local, storage)
    garbage = {f"shards/{number:032x}.arrow" for number in range(2)}
    for name in garbage:
        storage.write_atomic(name, b"garbage")
    assert set(collect(storage, 7 * DAY_S, now=later(6)).young) == garbage
    assert set(collect(storage, 7 * DAY_S, now=later(8)).garbage) == garbage
    assert verify_full(open_dataset("s3://leyden/gc"), progress=False).shards == 4


def copy_to(dataset: Dataset, storage: Storage) -> None:
    for shard in dataset.manifest.shards:
        publish_shard(storage, dataset.shard_path(shard), shard.xxh3_128, shard.bytes)
    publish_tokenizer(storage, dataset.read_tokenizer())
    commit_dataset(storage, dataset.manifest, {"inputs": []}, "0" * 64)


def test_ages_have_units() -> None:
    """`--older-than 7` taken for 7 seconds."""
    assert [parse_age(text) for text in ("7d", "12h", "1.5m", "90s")] == [604800, 43200, 90, 90]
    for text in ("7", "d", "-1d", "7 days", ""):
        with pytest.raises(ConfigError, match="is not a number with a unit"):
            parse_age(text)
