"""kill -9 before each system call of a fetch: the next start works at once, nothing is left."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from dist.cache import NodeCache
from dist.manifest import Shard
from dist.storage import Storage
from tests.cache_torture import Torture, torture
from tests.http_server import FolderServer, serve
from tests.remote_shards import make_shards, process

SIZE = 4_000
LIMIT = 2 * SIZE + 100


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FolderServer]:
    with serve(tmp_path / "data") as server:
        yield server


def fetch_until(die_at: int, folder: str, url: str, shard: Shard, said: str) -> None:
    """Evict, fetch, use, find damaged, fetch again; killed before the die_at-th call, from 1."""
    calls, me = 0, os.getpid()

    def watch(frame: Any, event: str, called: Any) -> None:
        nonlocal calls
        # What reaches the kernel from Python: os, fcntl, open() and methods of sockets and files.
        owner = getattr(called, "__module__", None) or type(getattr(called, "__self__", 0)).__name__
        if event == "c_call" and owner in ("posix", "fcntl", "_io", "ScandirIterator", "socket"):
            calls += 1
            if calls == die_at:
                os.kill(me, signal.SIGKILL)

    threading.setprofile(watch)
    sys.setprofile(watch)
    cache = NodeCache(Path(folder), LIMIT)
    lease = cache.acquire(Storage(url), shard)
    lease.release()
    lease.path.write_bytes(b"other bytes")
    cache.acquire(Storage(url), shard).release()
    cache.close()
    sys.setprofile(None)
    Path(said).write_text(str(calls))


def start_and_check(folder: Path, url: str, shards: list[Shard]) -> None:
    """The next start: all that is said of it in docs/remote_data.md, after any kill."""
    cache = NodeCache(folder, LIMIT)
    assert cache.folder.members.count() == 1 and cache.folder.used_bytes() <= LIMIT
    own = ("space.", "slot-", "member-")
    there = [path for path in folder.iterdir() if not path.name.startswith(own)]
    assert all(path.suffix in (".arrow", ".stamp", ".lock") for path in there), there
    orphans = [path.name for path in there if not path.with_suffix(".arrow").exists()]
    assert not orphans, orphans
    for shard in shards:
        if cache.folder.is_trusted(shard):
            path = cache.folder.file(shard, "arrow")
            assert xxhash.xxh3_128_hexdigest(path.read_bytes()) == shard.xxh3_128
    for shard in shards:  # the first is evicted again, as the next child wants it
        with cache.acquire(Storage(url), shard) as lease:
            assert xxhash.xxh3_128_hexdigest(lease.path.read_bytes()) == shard.xxh3_128
    assert cache.folder.used_bytes() <= LIMIT
    cache.close()


def test_a_kill_before_any_call_leaves_nothing_in_the_way(
    server: FolderServer, tmp_path: Path
) -> None:
    """A part, a stamp, a lock or a member of a killed process that costs the next one anything."""
    shards = make_shards(tmp_path / "data", 3, SIZE)
    folder, said = tmp_path / "cache", tmp_path / "said"
    start_and_check(folder, server.url, shards)
    process(fetch_until, 0, str(folder), server.url, shards[0], str(said)).join(60)
    calls = int(said.read_text())
    assert calls > 100
    # Every call takes a minute; LEYDEN_EVERY=1 is for who changes the cache.
    every = int(os.environ.get("LEYDEN_EVERY", "7"))
    kills, at = 0, range(1 + calls % every, calls + 1, every)
    for die_at in at:
        start_and_check(folder, server.url, shards)
        killed = process(fetch_until, die_at, str(folder), server.url, shards[0], str(said))
        killed.join(60)
        # It may do with a few calls fewer than were counted, and end by itself.
        assert killed.exitcode in (0, -signal.SIGKILL), (die_at, killed.exitcode)
        kills += killed.exitcode != 0
        start_and_check(folder, server.url, shards)
    assert kills >= 0.9 * len(at)


def test_ten_seconds_of_torture(tmp_path: Path) -> None:
    """What only chance finds; tests/cache_torture.py runs for as long as one likes."""
    found = torture(Torture(seconds=10.0, seed=6, damages_per_s=6.0), tmp_path / "torture")
    assert found.problems == []
    assert found.counts["kills"] > 4 and found.counts["reads"] > 50
    assert found.counts["refused"] and found.counts["evicted"]
