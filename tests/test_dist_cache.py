"""The node's cache of remote shards: one download, warm starts, limits, nothing in use evicted."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist import cache as cache_module
from dist import cache_folder
from dist.cache import CacheConfig, NodeCache, node_cache
from dist.errors import SetupError
from dist.file_locks import Slots, is_locked, locked
from dist.manifest import Shard
from dist.members import Members
from dist.storage import Storage
from tests.http_server import FolderServer, serve
from tests.remote_shards import make_shards, process

SIZE = 10_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FolderServer]:
    with serve(tmp_path / "data") as server:
        yield server


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    return make_shards(tmp_path / "data", 10, SIZE)


def served(server: FolderServer, shard: Shard) -> bytes:
    return (server.folder / "shards" / shard.name).read_bytes()


def names(folder: Path, ending: str) -> set[str]:
    return {path.stem for path in folder.glob(f"*.{ending}")}


def acquire_one(folder: str, url: str, shard: Shard, gate: str, out: str) -> None:
    """A process that waits for a file `gate`, then asks for a shard and says what it got."""
    cache = NodeCache(Path(folder))
    while not os.path.exists(gate):
        time.sleep(0.001)
    with cache.acquire(Storage(url), shard) as lease:
        Path(out).write_bytes(lease.path.read_bytes())
    Path(out + ".fetched").write_text(str(cache.counts.fetched))


def hold_one(folder: str, url: str, shard: Shard, said: str, limit: int = 0) -> None:
    """A process that maps a shard and keeps it until it is killed."""
    cache = NodeCache(Path(folder), limit)
    lease = cache.acquire(Storage(url), shard)
    with open(lease.path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    Path(said).write_text("held")
    time.sleep(120)
    mapped.close()


def wait_for(path: Path, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.005)


def test_cold_then_warm(server: FolderServer, shards: list[Shard], tmp_path: Path) -> None:
    """A warm start that downloads again, or that reads every byte again."""
    first = NodeCache(tmp_path / "cache")
    for shard in shards[:3]:
        with first.acquire(Storage(server.url), shard) as lease:
            assert lease.path.read_bytes() == served(server, shard)
    first.close()
    assert (first.counts.fetched, len(server.gets)) == (3, 3)
    again = NodeCache(tmp_path / "cache")
    for shard in shards[:3]:
        with again.acquire(Storage(server.url), shard) as lease:
            assert lease.path.read_bytes() == served(server, shard)
    assert again.counts.found == 3 and again.counts.hashed_again == 0
    assert again.counts.fetched == 0 and len(server.gets) == 3


def test_parts_are_put_together(server: FolderServer, tmp_path: Path) -> None:
    """A part at the wrong offset, or a last part of the wrong length."""
    size = 2 * (8 << 20) + 12_345
    (shard,) = make_shards(tmp_path / "data", 1, size)
    cache = NodeCache(tmp_path / "cache")
    with cache.acquire(Storage(server.url), shard) as lease:
        assert lease.path.read_bytes() == served(server, shard)
    assert sorted((one.start, one.end) for one in server.gets) == [
        (0, 8 << 20), (8 << 20, 16 << 20), (16 << 20, size),
    ]  # fmt: skip


def test_four_processes_fetch_a_shard_once(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """Each rank of a node downloading the same bytes; a reader of a file that is not whole."""
    server.bytes_per_s = 50_000  # 0.2 s a shard: all of them come while it is under way
    outs = [tmp_path / f"out-{number}" for number in range(4)]
    ranks = [
        process(
            acquire_one,
            str(tmp_path / "cache"),
            server.url,
            shards[0],
            str(tmp_path / "go"),
            str(o),
        )
        for o in outs
    ]
    (tmp_path / "go").touch()
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert {out.read_bytes() for out in outs} == {served(server, shards[0])}
    assert len(server.gets) == 1 and server.sent_bytes == shards[0].bytes
    fetched = [int(Path(f"{out}.fetched").read_text()) for out in outs]
    assert sorted(fetched) == [0, 0, 0, 1]


def test_threads_share_a_shard(server: FolderServer, shards: list[Shard], tmp_path: Path) -> None:
    """Locks of one process that do not exclude its own threads, or a lease released twice."""
    cache = NodeCache(tmp_path / "cache")
    leases = []

    def take() -> None:
        leases.append(cache.acquire(Storage(server.url), shards[0]))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(leases) == 8 and len(server.gets) == 1
    for lease in leases[:7]:
        lease.release()
        lease.release()
    assert cache.holds(shards[0]) and not cache.folder.drop(shards[0])
    leases[7].release()
    assert not cache.holds(shards[0]) and cache.folder.drop(shards[0])


def test_the_limit_holds_and_the_coldest_goes(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """A cache that grows beyond its limit, or evicts what is needed next."""
    cache = NodeCache(tmp_path / "cache", limit_bytes=2 * SIZE + 100)
    storage = Storage(server.url)
    for number in range(10):
        with cache.acquire(storage, shards[number]):
            assert cache.folder.used_bytes() <= 2 * SIZE + 100
        if number:
            time.sleep(0.01)  # mtimes tell the last use
            with cache.acquire(storage, shards[0]):  # used again and again
                pass
            time.sleep(0.01)
            assert shards[0].xxh3_128 in names(tmp_path / "cache", "arrow")
    assert cache.folder.evicted == 8 and cache.counts.fetched == 10
    assert names(tmp_path / "cache", "arrow") == {shards[0].xxh3_128, shards[9].xxh3_128}
    with cache.acquire(storage, shards[9]):  # its last use is the end of this one
        time.sleep(0.01)
        cache.acquire(storage, shards[0]).release()
        time.sleep(0.01)
    cache.acquire(storage, shards[1]).release()
    assert names(tmp_path / "cache", "arrow") == {shards[1].xxh3_128, shards[9].xxh3_128}


def test_a_shard_is_warm_from_the_moment_it_is_used(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """A process killed while it uses a shard: the next one evicts first what was used last."""
    cache, other = NodeCache(tmp_path / "cache", 2 * SIZE + 100), Storage(server.url)
    for shard in shards[:2]:
        cache.acquire(other, shard).release()
    locks = [cache.folder.file(shard, "lock") for shard in shards]
    # Found there, and fetched where an older lock's file lies: both are uses.
    os.utime(locks[0], (1, 1))
    with cache.acquire(other, shards[0]):
        assert locks[0].stat().st_mtime > 1
    locks[2].touch()
    os.utime(locks[2], (1, 1))
    with cache.acquire(other, shards[2]):
        assert locks[2].stat().st_mtime > 1


def test_what_another_process_maps_stays(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """A file deleted under another rank's map, or kept after that rank was killed."""
    folder, limit = tmp_path / "cache", 4 * SIZE + 100
    holder = process(hold_one, str(folder), server.url, shards[0], str(tmp_path / "said"), limit)
    wait_for(tmp_path / "said")
    cache = NodeCache(folder, limit)
    for shard in shards[1:]:
        with cache.acquire(Storage(server.url), shard):
            pass
    kept = folder / f"{shards[0].xxh3_128}.arrow"
    assert kept.read_bytes() == served(server, shards[0])
    holder.kill()
    holder.join()
    for shard in shards[1:]:
        with cache.acquire(Storage(server.url), shard):
            pass
    assert not kept.exists()


def test_a_map_keeps_its_bytes(server: FolderServer, shards: list[Shard], tmp_path: Path) -> None:
    """Bytes that change or vanish under a live map: a wrong batch, or SIGBUS."""
    cache = NodeCache(tmp_path / "cache", limit_bytes=3 * SIZE + 100)
    lease = cache.acquire(Storage(server.url), shards[0])
    with open(lease.path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for shard in [*shards[1:], *shards[1:]]:
        with cache.acquire(Storage(server.url), shard):
            assert bytes(mapped) == served(server, shards[0])
    assert lease.path.exists() and cache.counts.fetched == 19
    mapped.close()


def test_a_limit_below_a_shard_is_named(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """A hang, or shards evicted in turns, where the limit cannot hold what the ranks use."""
    with pytest.raises(SetupError, match=r"9 kB.*a shard has 10 kB.*raise\s+data.cache_gb"):
        NodeCache(tmp_path / "small", 9_000).acquire(Storage(server.url), shards[0])
    one = NodeCache(tmp_path / "cache", SIZE + 5_000)
    two = NodeCache(tmp_path / "cache", SIZE + 5_000)
    with pytest.raises(SetupError, match="for each of 2 processes.*needs 20 kB at least"):
        two.acquire(Storage(server.url), shards[0])
    one.close()
    two.folder.members.recount()
    two.acquire(Storage(server.url), shards[0]).release()


def test_all_in_use_is_an_error_with_sizes(
    server: FolderServer, shards: list[Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for ever for shards that nobody gives back."""
    monkeypatch.setattr(cache_module, "ROOM_TIMEOUT_S", 0.2)
    cache = NodeCache(tmp_path / "cache", 2 * SIZE + 100)
    leases = [cache.acquire(Storage(server.url), shard) for shard in shards[:2]]
    with pytest.raises(SetupError, match=r"no room for.*holds 20 kB of at most 20\.1 kB.*in use"):
        cache.acquire(Storage(server.url), shards[2])
    leases[0].release()
    cache.acquire(Storage(server.url), shards[2]).release()


def test_a_holder_is_asked_before_waiting(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """A process that waits for itself: its own idle maps fill the cache."""
    cache = NodeCache(tmp_path / "cache", 2 * SIZE + 100)
    leases = [cache.acquire(Storage(server.url), shard) for shard in shards[:2]]

    def give() -> bool:
        if leases:
            leases.pop(0).release()
            return True
        return False

    cache.holders.append(give)
    cache.acquire(Storage(server.url), shards[2]).release()
    assert len(leases) == 1 and cache.folder.evicted == 1


def test_two_runs_share_the_limit(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """Two runs on a node that each take the whole limit for themselves and block each other."""
    limit = 4 * SIZE + 100
    one = NodeCache(tmp_path / "cache", limit)
    assert one.share_bytes == limit
    held = [one.acquire(Storage(server.url), shard) for shard in shards[:4]]

    def give() -> bool:
        if held:
            held.pop(0).release()
            return True
        return False

    one.holders.append(give)
    two = NodeCache(tmp_path / "cache", limit)
    one.folder.members.recount()
    assert one.share_bytes == two.share_bytes == limit // 2
    one.keep_to_share()  # as a loader does at each step
    assert len(held) == 2
    for shard in shards[4:]:
        two.acquire(Storage(server.url), shard).release()
    assert all(lease.path.exists() for lease in held)


def test_a_full_disk_is_an_error_with_sizes(
    server: FolderServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_disk: Callable[[str], Path],
) -> None:
    """ENOSPC as a traceback or as a half-written shard; and a full disk of old shards is none."""
    monkeypatch.setattr(cache_module, "ROOM_TIMEOUT_S", 0.2)
    disk = small_disk("2m")
    shards = make_shards(tmp_path / "data", 6, 600_000)
    storage = Storage(server.url)
    # A limit that the disk does not have: the disk itself decides.
    cache = NodeCache(disk / "cache", 1 << 30)
    for shard in shards:
        with cache.acquire(storage, shard) as lease:
            assert lease.path.read_bytes() == served(server, shard)
    assert cache.folder.evicted >= 3
    (disk / "ballast").write_bytes(b"x" * 100_000)
    held = [cache.acquire(storage, shard) for shard in shards[-3:]]
    with pytest.raises(SetupError, match="no room for.*MB of at most.*free"):
        cache.acquire(storage, shards[0])
    assert not list((disk / "cache").glob("*.part"))
    for lease in held:
        lease.release()
    # Without a limit: what is free, but for a margin.
    free = NodeCache(disk / "cache")
    assert 1_000_000 < free.folder.limit_bytes < 2_000_000
    with free.acquire(storage, shards[0]) as lease:
        assert lease.path.read_bytes() == served(server, shards[0])


def test_a_boot_ends_trust(
    server: FolderServer, shards: list[Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that a power cut emptied, with its size and times as the stamp says."""
    cache = NodeCache(tmp_path / "cache")
    for shard in shards[:2]:
        cache.acquire(Storage(server.url), shard).release()
    path = cache.folder.file(shards[0], "arrow")
    stat = path.stat()
    with open(path, "r+b") as file:
        file.write(bytes(shards[0].bytes))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache.folder.is_trusted(shards[0])  # what a stamp cannot see in the same boot
    monkeypatch.setattr(cache_folder, "_boot_id", lambda: "another boot")
    for shard in shards[:2]:
        with cache.acquire(Storage(server.url), shard) as lease:
            assert lease.path.read_bytes() == served(server, shard)
    assert (cache.counts.hashed_again, cache.counts.refused, cache.counts.fetched) == (2, 1, 3)


def test_what_a_dead_process_left_is_swept(shards: list[Shard], tmp_path: Path) -> None:
    """Part files that fill the cache for ever, or one swept under a live download."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for shard in shards[:2]:
        (folder / f"{shard.xxh3_128}.part").write_bytes(b"x" * 500)
    (folder / "member-1-00000000.lock").touch()
    with locked(folder / f"{shards[0].xxh3_128}.lock"):
        cache = NodeCache(folder)
    assert names(folder, "part") == {shards[0].xxh3_128}
    assert cache.folder.members.count() == 1
    assert len(list(folder.glob("member-*"))) == 1


def test_slots_bound_what_is_under_way(tmp_path: Path) -> None:
    """More requests at a time than the node should give, or a slot that is never freed."""
    slots, stop = Slots(tmp_path, 3), threading.Event()
    inside, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal inside, most
        with slots.one(stop):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.01)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 < most <= 3
    assert not any(is_locked(path) for path in tmp_path.glob("slot-*.lock"))


def test_members_are_live_processes(tmp_path: Path) -> None:
    """A killed rank that keeps its share of the cache for ever."""
    one = Members(tmp_path, tmp_path / "guard")
    two = Members(tmp_path, tmp_path / "guard")
    assert one.count() == two.count() == 2
    two.leave()
    one.recount()
    assert one.count() == 1


def test_the_default_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache in somebody else's home, or two caches in a process for one folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    config = CacheConfig()
    assert config.path() == tmp_path / "xdg" / "leyden" / "shards"
    assert node_cache(config) is node_cache(CacheConfig(folder=str(config.path())))
    assert node_cache(CacheConfig(limit_gb=2.0)).folder.limit_bytes == 2_000_000_000


def test_a_folder_of_no_use_is_named(tmp_path: Path) -> None:
    """A traceback for a cache folder that is a file."""
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match=r"file cannot be used.*data.cache_dir"):
        NodeCache(tmp_path / "file")
