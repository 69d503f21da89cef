"""What two processes, a fork, or a person do to the node's cache at the wrong moment."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist import cache as cache_module
from dist import file_locks
from dist.cache import CacheConfig, Lease, NodeCache, node_cache
from dist.errors import DataRefused, SetupError
from dist.file_locks import drop_lock, locked, try_lock
from dist.manifest import Shard
from dist.storage import Storage
from dist.transfer import Cancelled
from tests.http_server import FolderServer, serve
from tests.remote_shards import make_shards, process

SIZE = 4_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FolderServer]:
    with serve(tmp_path / "data") as server:
        yield server


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    return make_shards(tmp_path / "data", 6, SIZE)


def ended(job: Callable[[], object], timeout_s: float = 20.0) -> list[object]:
    """What a job returns or raises in a thread of its own; [] if it hangs."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(job())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return found


def left(folder: Path) -> set[str]:
    """Files of shards, without those of the folder itself."""
    own = ("space.", "slot-", "member-")
    return {path.name for path in folder.iterdir() if not path.name.startswith(own)}


def fetch_behind_a_gate(
    server: FolderServer, cache: NodeCache, shard: Shard
) -> tuple[threading.Event, threading.Thread, list[Lease]]:
    """A thread that fetches a shard; its bytes come when the event is set."""
    gate, leases = threading.Event(), list[Lease]()
    server.fault = lambda _: None if gate.wait(20) else "503"
    thread = threading.Thread(
        target=lambda: leases.append(cache.acquire(Storage(server.url), shard)), daemon=True
    )
    thread.start()
    while not server.gets:
        time.sleep(0.002)
    return gate, thread, leases


def test_a_shard_gets_its_name_while_nobody_adds_up(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """A cache beyond its limit: whoever added up the sizes saw the part go and no shard come.
    The torture met it within seconds: 1,540,015 bytes of at most 1,320,043."""
    cache = NodeCache(tmp_path / "cache")
    gate, thread, leases = fetch_behind_a_gate(server, cache, shards[0])
    with locked(tmp_path / "cache" / "space.lock"):
        gate.set()
        time.sleep(0.3)
        assert cache.folder.file(shards[0], "part").exists()
        assert not cache.folder.file(shards[0], "arrow").exists()
    thread.join(20)
    assert leases[0].path.exists() and not cache.folder.file(shards[0], "part").exists()


def test_what_is_gone_leaves_no_lock_behind(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """A file for every shard that ever was in the cache: each look at the folder reads them all."""
    cache, folder = NodeCache(tmp_path / "cache", 2 * SIZE + 100), tmp_path / "cache"
    for shard in shards:
        cache.acquire(Storage(server.url), shard).release()
    kept = {path.stem for path in folder.glob("*.arrow")}
    assert len(kept) == 2
    assert left(folder) == {f"{one}.{kind}" for one in kept for kind in ("arrow", "lock", "stamp")}
    server.fault = lambda _: "403"
    with pytest.raises(SetupError, match="no permission"):
        cache.acquire(Storage(server.url), shards[0])
    assert {name.partition(".")[0] for name in left(folder)} <= kept


def test_a_start_sweeps_locks_and_stamps_of_no_shard(shards: list[Shard], tmp_path: Path) -> None:
    """What kills, and versions before this one, left: thousands of files that nobody deletes."""
    folder = tmp_path / "cache"
    folder.mkdir()
    first, second, third = (one.xxh3_128 for one in shards[:3])
    for name in (f"{first}.lock", f"{first}.stamp", f"{first}.0123abcd.tmp", f"{second}.stamp"):
        (folder / name).touch()
    for name in (f"{third}.arrow", f"{third}.stamp", f"{third}.lock"):
        (folder / name).touch()
    with locked(folder / f"{second}.lock"):  # is being fetched
        NodeCache(folder)
    thirds = {f"{third}.{ending}" for ending in ("arrow", "stamp", "lock")}
    assert left(folder) == {f"{second}.lock", f"{second}.stamp"} | thirds


def test_a_lock_whose_file_was_deleted_is_no_lock(tmp_path: Path) -> None:
    """Two holders of one lock: one of a file that its last holder deleted, one of a new file."""
    racers = [process(_race, str(tmp_path / "lock"), str(tmp_path / f"{n}")) for n in range(4)]
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0] * 4
    assert all(int((tmp_path / f"{n}").read_text()) > 20 for n in range(4))


def _race(path: str, out: str) -> None:
    """Take, delete and drop a lock; who holds it makes a file that may not be there."""
    lock, inside, rounds = Path(path), Path(f"{path}.inside"), 0
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        handle = try_lock(lock)
        if handle is None:
            continue
        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
        rounds += 1
        inside.unlink()
        lock.unlink()
        drop_lock(handle)
    Path(out).write_text(str(rounds))


@pytest.fixture
def forked() -> Iterator[Callable[[Callable[[], None]], int]]:
    """forked(job): a child made by fork that runs `job`, then sleeps until the test ends."""
    children: list[int] = []

    def fork(job: Callable[[], None]) -> int:
        ready, say = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                job()
                os.write(say, b"1")
                time.sleep(60)
            finally:
                os._exit(1)
        children.append(pid)
        os.close(say)
        assert os.read(ready, 1) == b"1"
        os.close(ready)
        return pid

    yield fork
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_forked_process_holds_nothing(
    server: FolderServer, shards: list[Shard], tmp_path: Path, forked: Callable[..., int]
) -> None:
    """A DataLoader worker forked while a shard is fetched: it keeps the lock of the fetch, so its
    parent waits for that shard for ever; and what was in use then is never evicted."""
    cache = NodeCache(tmp_path / "cache")
    before = cache.acquire(Storage(server.url), shards[1])
    server.gets.clear()
    gate, thread, leases = fetch_behind_a_gate(server, cache, shards[0])
    forked(lambda: None)
    gate.set()
    thread.join(20)
    assert leases, "the fetch waits for its own child"
    leases[0].release()
    before.release()
    assert cache.folder.drop(shards[0]) and cache.folder.drop(shards[1])
    cache.close()
    assert NodeCache(tmp_path / "cache").folder.members.count() == 1


def test_a_forked_process_gives_nothing_of_its_parent_back(
    server: FolderServer, shards: list[Shard], tmp_path: Path, forked: Callable[..., int]
) -> None:
    """A child that ends, or lets its copies go: the parent's shard is evicted under its map."""
    cache = node_cache(CacheConfig(folder=str(tmp_path / "cache")))
    lease = cache.acquire(Storage(server.url), shards[0])
    with cache._lock:  # as a thread of the parent may hold it just then

        def let_go() -> None:
            lease.release()
            cache.folder.members.leave()
            mine = node_cache(CacheConfig(folder=str(tmp_path / "cache")))
            mine.acquire(Storage(server.url), shards[1])

        forked(let_go)
    assert not cache.folder.drop(shards[0]) and not cache.folder.drop(shards[1])
    assert cache.folder.members._own.exists()
    cache.folder.members.recount()
    assert cache.folder.members.count() == 2


def test_a_newcomer_yields_to_who_was_there(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """`leyden data inspect` that ends a run on the same node: with one more process, a share of the
    cache is less than a shard."""
    limit = 2 * SIZE + 100
    first, second = (NodeCache(tmp_path / "cache", limit) for _ in range(2))
    third = NodeCache(tmp_path / "cache", limit)
    for cache in (first, second):
        cache.folder.members.recount()
        assert cache.share_bytes < SIZE
        cache.acquire(Storage(server.url), shards[0]).release()
    with pytest.raises(SetupError, match="for each of 3 processes"):
        third.acquire(Storage(server.url), shards[0])
    first.close()
    third.folder.members.recount()
    third.acquire(Storage(server.url), shards[0]).release()


def test_a_touched_shard_in_use_is_used(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """Two ranks that wait for each other for ever: one maps a shard that a backup has touched, the
    other would have to have it alone to trust it again."""
    one, two = (NodeCache(tmp_path / "cache") for _ in range(2))
    lease = one.acquire(Storage(server.url), shards[0])
    os.utime(lease.path, ns=(1, 1))
    found = ended(lambda: two.acquire(Storage(server.url), shards[0]))
    assert len(found) == 1 and isinstance(found[0], Lease)
    assert two.counts.hashed_again == 1 and len(server.gets) == 1
    assert one.folder.is_trusted(shards[0])
    assert not one.folder.drop(shards[0])


def test_a_damaged_shard_that_others_only_look_at_is_fetched_anew(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """A run refused by chance: two threads look whether a damaged shard is good, each with a shared
    lock, and each takes the other for one that uses it."""
    cache = NodeCache(tmp_path / "cache")
    with cache.acquire(Storage(server.url), shards[0]) as lease:
        pass
    lease.path.write_bytes(bytes(shards[0].bytes))
    looks = try_lock(cache.folder.file(shards[0], "lock"), shared=True)
    assert looks is not None
    threading.Timer(0.5, drop_lock, [looks]).start()
    (found,) = ended(lambda: cache.acquire(Storage(server.url), shards[0]))
    assert isinstance(found, Lease), found
    assert cache.folder.is_right(shards[0]) and len(server.gets) == 2


def test_damage_to_a_shard_in_use_is_named(
    server: FolderServer, shards: list[Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that waits for ever, or uses bytes that changed under another's map."""
    monkeypatch.setattr(cache_module, "DAMAGED_IN_USE_S", 0.2)
    one, two = (NodeCache(tmp_path / "cache") for _ in range(2))
    lease = one.acquire(Storage(server.url), shards[0])
    lease.path.write_bytes(bytes(shards[0].bytes))
    (found,) = ended(lambda: two.acquire(Storage(server.url), shards[0]))
    assert isinstance(found, DataRefused) and "was damaged while another process" in str(found)
    lease.release()
    two.acquire(Storage(server.url), shards[0]).release()
    assert len(server.gets) == 2


def test_a_shard_deleted_in_use_is_fetched_anew(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """Ranks that wait for each other for ever, as somebody made room by hand: one maps a shard that
    has no name any more, the others would have to have it alone to fetch it."""
    one, two = (NodeCache(tmp_path / "cache") for _ in range(2))
    first = one.acquire(Storage(server.url), shards[0])
    for cache, gets in ((two, 2), (one, 3)):
        first.path.unlink()
        (found,) = ended(lambda cache=cache: cache.acquire(Storage(server.url), shards[0]))  # type: ignore[misc]
        assert isinstance(found, Lease) and len(server.gets) == gets
        assert not cache.folder.drop(shards[0]), "what was fetched anew is not held"
    first.release()
    assert not one.folder.drop(shards[0])


def test_only_the_lock_of_a_deleted_shard_is_set_aside(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """Two that find a shard deleted: the second takes away the lock under which the first fetches,
    and both write one part."""
    cache = NodeCache(tmp_path / "cache")
    lock = cache.folder.file(shards[0], "lock")
    first, second = try_lock(lock, shared=True), try_lock(lock, shared=True)
    assert first is not None and second is not None
    cache.folder.set_aside(shards[0], first)
    fetching = try_lock(lock)
    assert fetching is not None
    cache.folder.set_aside(shards[0], second)
    assert try_lock(lock) is None
    drop_lock(fetching)


def test_a_size_that_does_not_fit_the_digest_is_refused(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """A manifest whose size of a shard is wrong, where the cache has the shard from elsewhere:
    hashed again and again for ever."""
    cache = NodeCache(tmp_path / "cache")
    cache.acquire(Storage(server.url), shards[0]).release()
    lying = dataclasses.replace(shards[0], bytes=SIZE - 10)
    (found,) = ended(lambda: cache.acquire(Storage(server.url), lying))
    assert isinstance(found, DataRefused) and shards[0].name in str(found)


def test_the_random_numbers_of_a_program_are_its_own(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """Threads that draw from the generator which the user seeded: a run whose augmentations no one
    can repeat. And jitter that is the same on all ranks, as they seed alike."""
    random.seed(6)
    wanted = random.getstate()
    cache = NodeCache(tmp_path / "cache")
    with locked(cache.folder.file(shards[0], "lock")):
        stop = threading.Event()
        waiting = threading.Thread(
            target=lambda: ended(lambda: cache.acquire(Storage(server.url), shards[0], stop))
        )
        waiting.start()
        time.sleep(0.1)
    waiting.join(20)
    assert len(server.gets) == 1 and random.getstate() == wanted


def test_a_cache_is_made_once_by_many_threads(tmp_path: Path) -> None:
    """A process that counts as two: half of its share is gone for as long as it lives."""
    for number in range(20):
        config, gate = CacheConfig(folder=str(tmp_path / f"{number}")), threading.Barrier(4)
        made: list[NodeCache] = []

        def make(
            config: CacheConfig = config,
            gate: threading.Barrier = gate,
            made: list[NodeCache] = made,
        ) -> None:
            gate.wait()
            made.append(node_cache(config))

        threads = [threading.Thread(target=make) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(one) for one in made}) == 1 and made[0].folder.members.count() == 1


def test_a_folder_deleted_while_in_use_is_made_anew(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """A run that ends with a traceback because somebody made room by hand; or that goes on and is
    counted no more, so that others take its share."""
    cache = NodeCache(tmp_path / "cache", 10 * SIZE)
    lease = cache.acquire(Storage(server.url), shards[0])
    shutil.rmtree(tmp_path / "cache")
    for shard in (shards[0], shards[1]):
        cache.acquire(Storage(server.url), shard).release()
    lease.release()
    cache.folder.members.recount()
    assert cache.folder.members.count() == 1
    other = NodeCache(tmp_path / "cache", 10 * SIZE)
    assert other.folder.members.count() == 2


def test_a_fetched_shard_is_not_evicted_before_its_first_use(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """A shard that goes between its fetch and its use, and is fetched again: with a full cache all
    processes evict at such moments."""
    cache, other = NodeCache(tmp_path / "cache"), NodeCache(tmp_path / "cache")
    stop, dropped = threading.Event(), 0

    def evict() -> None:
        nonlocal dropped
        path = cache.folder.file(shards[0], "arrow")
        while not stop.is_set():
            dropped += path.exists() and other.folder.drop(shards[0])

    thread = threading.Thread(target=evict)
    thread.start()
    try:
        for _ in range(60):
            before = cache.counts.fetched
            cache.acquire(Storage(server.url), shards[0]).release()
            assert cache.counts.fetched <= before + 1
            time.sleep(0.01)
    finally:
        stop.set()
        thread.join()
    assert dropped > 10


def test_a_copy_evicted_while_it_is_rechecked_is_no_error(
    server: FolderServer, shards: list[Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`leyden data verify` that ends with a traceback because a run made room meanwhile."""
    cache, other = NodeCache(tmp_path / "cache"), NodeCache(tmp_path / "cache")
    cache.acquire(Storage(server.url), shards[0]).release()
    real = cache_module.try_lock

    def evict_first(path: Path, *, shared: bool = False) -> int | None:
        other.folder.drop(shards[0])
        return real(path, shared=shared)

    monkeypatch.setattr(cache_module, "try_lock", evict_first)
    assert cache.recheck(shards[0]) == "" and left(tmp_path / "cache") == set()


def test_a_cache_that_is_closed_while_a_shard_comes_says_so(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """A thread that still fetches as a run ends: a KeyError, and a lock that nobody gives back."""
    cache = NodeCache(tmp_path / "cache")
    server.fault = lambda _: cache.close()  # type: ignore[func-returns-value]
    with pytest.raises(Cancelled, match=f"closed while the shard {shards[0].name}"):
        cache.acquire(Storage(server.url), shards[0])
    lock = try_lock(cache.folder.file(shards[0], "lock"))
    assert lock is not None
    drop_lock(lock)


def test_a_stopped_process_in_the_way_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole node that waits without a word for a process in a debugger, or a suspended job."""
    monkeypatch.setattr(file_locks, "LOCKED_TOLD_AFTER_S", 0.1)
    holder = process(_hold, str(tmp_path / "lock"), str(tmp_path / "held"))
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    threading.Timer(0.5, holder.kill).start()
    with locked(tmp_path / "lock"):
        pass
    said = capsys.readouterr().err
    assert said.count(f"which process {holder.pid} holds") == 1 and "kill -CONT" in said


def _hold(path: str, said: str) -> None:
    with locked(Path(path)):
        Path(said).touch()
        time.sleep(60)
