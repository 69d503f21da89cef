"""Fetching ahead, and giving it up, where something else goes wrong at that moment."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist import open_shards, transfer
from dist.cache import CacheConfig, NodeCache
from dist.dataset import Dataset, mix, open_dataset
from dist.errors import DataRefused, SetupError
from dist.file_locks import drop_lock, try_lock
from dist.loader import LoaderPlan, TokenLoader
from dist.open_shards import OpenShards, ShardsAhead
from dist.order import Order, SequentialOrder
from dist.storage import Storage
from dist.transfer import Cancelled
from tests.http_server import FolderServer, serve
from tests.make_dataset import write_dataset
from tests.remote_shards import make_shards
from tests.waiting import came

SHARDS = 8


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("far") / "data", num_train_shards=SHARDS)


@pytest.fixture
def server(local: Dataset) -> Iterator[FolderServer]:
    with serve(local.storage.url) as server:
        yield server


@pytest.fixture
def remote(server: FolderServer, local: Dataset, tmp_path: Path) -> Dataset:
    """Its cache has room for all shards twice."""
    limit = 2 * sum(shard.bytes for shard in local.manifest.shards) + 1
    return open_dataset(
        server.url, CacheConfig(folder=str(tmp_path / "cache"), limit_gb=limit / 1e9)
    )


def test_a_broken_connection_is_no_short_file(
    server: FolderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that restarts, told as damaged data: a run that is not started again."""
    monkeypatch.setattr(transfer, "RETRIES", transfer.Retries(tries=6, first_pause_s=0.001))
    (shard,) = make_shards(tmp_path / "data", 1, 50_000)
    with serve(tmp_path / "data") as other:
        for number, faults in enumerate(
            (["cut"] * 4, ["503", "503", "cut"], ["cut", "503", "cut"])
        ):
            asked = len(other.gets)

            def fault(one: object, asked: int = asked, faults: list[str] = faults) -> str | None:
                left = faults[len(other.gets) - asked - 1 :]
                return left[0] if left else None

            other.fault = fault
            cache = NodeCache(tmp_path / f"cache-{number}")
            with cache.acquire(Storage(other.url), shard) as lease:
                assert lease.path.stat().st_size == shard.bytes
            assert cache.counts.retries == len(faults)
        other.fault = lambda one: "cut"
        with pytest.raises(SetupError, match="after 6 tries: .*broke off"):
            NodeCache(tmp_path / "never").acquire(Storage(other.url), shard)
        # A file that is short on the server stays damage, also between other failures.
        path = tmp_path / "data" / "shards" / shard.name
        path.write_bytes(path.read_bytes()[:-9])
        first = len(other.gets) + 2
        other.fault = lambda one: "503" if len(other.gets) <= first else None
        with pytest.raises(DataRefused, match="is shorter than the manifest says"):
            NodeCache(tmp_path / "short").acquire(Storage(other.url), shard)


def test_a_download_ends_when_nobody_wants_it(tmp_path: Path) -> None:
    """A closed loader's process that lives until its shard has come: longer than the time that a
    preempted job is given."""
    (shard,) = make_shards(tmp_path / "data", 1, 40 << 20)
    cache, stop, raised = NodeCache(tmp_path / "cache"), threading.Event(), list[BaseException]()

    def fetch() -> None:
        try:
            cache.acquire(Storage(server.url), shard, stop)
        except BaseException as error:
            raised.append(error)

    with serve(tmp_path / "data") as server:
        server.bytes_per_s = 1_000_000.0  # 8 s a part, and two rounds of parts
        thread = threading.Thread(target=fetch)
        thread.start()
        assert came(lambda: server.sent_bytes > 0)
        stop.set()
        thread.join(60)
        sent = server.sent_bytes
        server.bytes_per_s = 0.0
    assert not thread.is_alive() and isinstance(raised[0], Cancelled)
    assert sent < 16 << 20, "parts that nobody waits for were read to their end"
    with pytest.raises(Cancelled):
        cache.acquire(Storage("http://127.0.0.1:1"), shard, stop)


def test_local_sources_of_a_mixture_take_no_room(remote: Dataset, tmp_path: Path) -> None:
    """A local source of large shards: nothing of the remote one is fetched ahead any more, and no
    steps are gathered together."""
    near = write_dataset(tmp_path / "near", num_train_shards=1, documents=4000, seed=3)
    assert near.manifest.shards[0].bytes > remote.cache.share_bytes
    mixed = mix(("near", "far"), (near, remote))
    split = mixed.split("train")
    assert mixed.remote_shards(split) == [False] + [True] * SHARDS
    steps = [(step, [0, 1 + step]) for step in range(SHARDS)]
    ahead = ShardsAhead(mixed, split, iter(steps))
    try:
        assert came(lambda: set(ahead._pins) == set(range(1, SHARDS + 1)))
    finally:
        ahead.close()
    opened = OpenShards(mixed, split, None)
    assert opened.are_here([0]) and not opened.are_here([0, 1])
    opened.get(0)
    for number in (1, 2):
        opened.get(number)
    assert opened.are_here([0, 1, 2]) and [len(group) for group in opened.groups([0, 1, 2])] == [3]
    while opened._close_coldest():
        pass
    assert list(opened._open) == [0] and mixed.cache.held_bytes == 0


def test_a_source_without_the_split_has_no_part_in_it(remote: Dataset, tmp_path: Path) -> None:
    """A mixture of which one source has no validation: no loader of it, and no run."""
    near = write_dataset(tmp_path / "near", num_train_shards=1, documents=30, seed=4)
    manifest = near.manifest
    only = dataclasses.replace(
        manifest, shards=manifest.shards_of("train"), totals={"train": manifest.totals["train"]}
    )
    mixed = mix(("near", "far"), (dataclasses.replace(near, manifest=only), remote))
    split = mixed.split("validation")
    assert mixed.remote_shards(split) == [True] * len(split.shards)
    plan = LoaderPlan(batch=4, micro_batch=4, end_t=split.num_rows)
    with TokenLoader(mixed, split, SequentialOrder(split.num_rows), plan) as loader:
        assert sum(len(one.rows) for one in loader) == split.num_rows


def test_a_shard_that_is_here_too_is_not_fetched(local: Dataset, remote: Dataset) -> None:
    """A lease of a shard that counts as local: nobody gives it back."""
    for parts in ((local, remote), (remote, local)):
        mixed = mix(("a", "b"), parts)
        split = mixed.split("train")
        assert mixed.remote_shards(split) == [False] * 2 * SHARDS
        opened = OpenShards(mixed, split, None)
        for number in range(2 * SHARDS):
            opened.get(number)
        assert mixed.cache.held_bytes == 0 == mixed.cache.counts.fetched


def test_a_plan_is_not_searched_to_its_end(
    remote: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that goes through a million steps beside the training, as all shards are here."""
    monkeypatch.setattr(open_shards, "MOST_STEPS_AHEAD", 200)
    looked = [0]

    def endless(shards: int) -> Iterator[tuple[int, list[int]]]:
        for step in itertools.count():
            looked[0] = step
            yield step, [step % shards]

    split = remote.split("train")
    for shards, most in ((open_shards.SHARDS_AHEAD, open_shards.STEPS_AHEAD), (2, 200)):
        ahead = ShardsAhead(remote, split, endless(shards))
        try:
            for at in (0, 500):
                ahead.reach(at)
                assert came(lambda at=at, most=most: looked[0] == at + most + 1)  # type: ignore[misc]
                time.sleep(0.1)
                assert looked[0] == at + most + 1
        finally:
            ahead.close()


def test_readers_and_those_who_need_room_meet(remote: Dataset, local: Dataset) -> None:
    """A set that changes while another thread looks through it: the thread that fetches ahead dies,
    or the run."""
    near = write_dataset(Path(local.storage.url).parent / "many", num_train_shards=40, seed=5)
    mixed = mix(("near", "far"), (near, remote))
    opened = OpenShards(mixed, mixed.split("train"), None)
    for number in range(40):
        opened.get(number)
    stop, failed = threading.Event(), list[BaseException]()

    def close_on() -> None:
        try:
            while not stop.is_set():
                opened._close_coldest()
                opened._open_bytes()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=close_on)
    thread.start()
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline and not failed:
        for number in range(40):
            opened.get(number)
    stop.set()
    thread.join()
    assert not failed


def test_what_is_opened_after_the_end_is_given_back(remote: Dataset) -> None:
    """A thread that outlives close(): its shards can never be evicted while the process lives."""
    split = remote.split("train")
    opened = OpenShards(remote, split, None)
    opened.begin(Order(split.num_rows, 1), LoaderPlan(batch=4, micro_batch=4, end_step=2))
    opened.cancel()
    opened.end()
    with pytest.raises(Cancelled):
        opened.get(0)
    opened._stop.clear()  # it had asked just before
    opened.get(0)
    assert remote.cache.held_bytes
    opened.end()
    # A fetch that was under way may have its shard now, and gives it back when it sees the end.
    assert came(lambda: remote.cache.held_bytes == 0)


def test_one_failure_of_the_folder_does_not_end_fetching_ahead(
    remote: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files for a moment, and for the rest of the run each shard is waited for."""
    failed, counted = list[str](), remote.cache.folder.members._counted

    def fails_once() -> int:
        if threading.current_thread().name == "plan-ahead" and not failed:
            failed.append("once")
            raise OSError(errno.EMFILE, "Too many open files")
        return counted()

    monkeypatch.setattr(remote.cache.folder.members, "_counted", fails_once)
    split = remote.split("train")
    ahead = ShardsAhead(remote, split, iter([(step, [step]) for step in range(SHARDS)]))
    try:
        assert came(lambda: len(ahead._pins) == SHARDS) and failed
    finally:
        ahead.close()


def test_a_lock_goes_with_the_failure_to_hash(
    server: FolderServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails for a moment, and a shard that can never be evicted again."""
    (shard,) = make_shards(tmp_path / "data", 1, 4_000)
    cache, other = NodeCache(tmp_path / "cache"), NodeCache(tmp_path / "cache")
    with serve(tmp_path / "data") as source:
        lease = cache.acquire(Storage(source.url), shard)
        cache.folder.file(shard, "stamp").unlink()  # as if the copy had been touched

        def broken(_: object) -> bool:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch, pytest.raises(SetupError):
            patch.setattr(other.folder, "is_right", broken)
            other.acquire(Storage(source.url), shard)
        lease.release()
    lock = try_lock(cache.folder.file(shard, "lock"))
    assert lock is not None
    drop_lock(lock)
