"""Faults of the shard cache: kills at each stage, a server that fails, bytes that change."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist import transfer
from dist.cache import NodeCache
from dist.errors import DataRefused, LeydenError, SetupError
from dist.http_files import HttpFiles, ShortRead
from dist.manifest import Shard
from dist.storage import Storage
from tests.http_server import FolderServer, Request, serve
from tests.remote_shards import make_shards, process

SIZE = 4_000
STAGES = ("reserve", "write", "hash", "stamp", "rename", "done")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FolderServer]:
    with serve(tmp_path / "data") as server:
        yield server


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    return make_shards(tmp_path / "data", 4, SIZE)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "RETRIES", transfer.Retries(tries=5, first_pause_s=0.001))


def original(server: FolderServer, shard: Shard) -> Path:
    return server.folder / "shards" / shard.name


def die_in(stage: str, folder: str, url: str, shard: Shard) -> None:
    """A process that is killed in one stage of a download."""
    from dist import cache, cache_folder

    def die(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def half(handle: int, data: Any, offset: int) -> int:
        os.write(handle, bytes(data[: len(data) // 2]))
        return die()

    made = NodeCache(Path(folder))
    if stage == "reserve":
        cache.fetch_file = die  # type: ignore[assignment]
    elif stage == "write":
        os.pwrite = half  # type: ignore[assignment]
    elif stage == "hash":
        cache.file_digest = die
    elif stage == "stamp":
        cache_folder.CacheFolder.trust = die  # type: ignore[method-assign]
    elif stage == "rename":
        replace = os.replace

        def replace_or_die(source: Any, target: Any) -> None:
            if str(target).endswith(".arrow"):
                die()
            replace(source, target)

        os.replace = replace_or_die  # type: ignore[assignment]
    made.acquire(Storage(url), shard)
    die()


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_in_any_stage_leaves_nothing_in_the_way(
    stage: str, server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """A lock, a part or half a shard of a killed process: the next start hangs, or maps it."""
    folder = tmp_path / "cache"
    killed = process(die_in, stage, str(folder), server.url, shards[0])
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    left = {path.suffix for path in folder.glob(f"{shards[0].xxh3_128}.*")}
    assert (".arrow" in left) == (stage == "done") and (".part" in left) == (stage != "done")
    began = time.monotonic()
    cache = NodeCache(folder)
    assert not list(folder.glob("*.part"))
    assert cache.folder.members.count() == 1
    with cache.acquire(Storage(server.url), shards[0]) as lease:
        assert lease.path.read_bytes() == original(server, shards[0]).read_bytes()
    assert time.monotonic() - began < 30.0
    assert cache.counts.fetched == (stage != "done")


def test_who_waits_takes_over_from_the_killed(
    server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """A rank that waits for ever for a download whose process is gone."""
    server.fault = lambda one: "slow" if one.number == 1 else None  # for minutes
    other = process(die_in, "done", str(tmp_path / "cache"), server.url, shards[0])
    while not server.gets:
        time.sleep(0.005)
    cache = NodeCache(tmp_path / "cache")
    os.kill(other.pid, signal.SIGKILL)
    with cache.acquire(Storage(server.url), shards[0]) as lease:
        assert lease.path.read_bytes() == original(server, shards[0]).read_bytes()
    other.join()
    assert len(server.gets) == 2


@pytest.mark.parametrize("fault", ["503", "429", "cut", "flip"])
def test_a_fault_that_passes_is_survived(
    fault: str, server: FolderServer, shards: list[Shard], tmp_path: Path
) -> None:
    """A run that ends because a server was busy for a moment, or that keeps what came then."""
    server.fault = lambda one: fault if one.number == 1 else None
    cache = NodeCache(tmp_path / "cache")
    with cache.acquire(Storage(server.url), shards[0]) as lease:
        assert lease.path.read_bytes() == original(server, shards[0]).read_bytes()
    assert len(server.gets) == 2
    assert (cache.counts.refused, cache.counts.retries) == ((1, 0) if fault == "flip" else (0, 1))


def test_only_the_part_that_failed_is_fetched_again(server: FolderServer, tmp_path: Path) -> None:
    """A shard of gigabytes that starts anew for one broken connection."""
    (shard,) = make_shards(tmp_path / "data", 1, 3 * transfer.PART_BYTES)
    seen: set[int] = set()

    def once(request: Request) -> str | None:
        if request.start == transfer.PART_BYTES and request.start not in seen:
            seen.add(request.start)
            return "cut"
        return None

    server.fault = once
    cache = NodeCache(tmp_path / "cache")
    with cache.acquire(Storage(server.url), shard) as lease:
        assert lease.path.read_bytes() == original(server, shard).read_bytes()
    assert sorted(one.start // transfer.PART_BYTES for one in server.gets) == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("fault", "kind", "said", "gets"),
    [
        ("503", SetupError, "cannot be read after 5 tries: HTTP 503", 5),
        ("403", SetupError, "no permission to read", 1),
        ("cut", SetupError, "cannot be read after 5 tries: .*broke off", 5),
        (
            "flip",
            DataRefused,
            r"has xxh3-128 \w{32}, the manifest says \w{32} \(fetched twice\)",
            2,
        ),
    ],
)
def test_a_fault_that_stays_is_named(
    fault: str, kind: type[LeydenError], said: str, gets: int,
    server: FolderServer, shards: list[Shard], tmp_path: Path,
) -> None:  # fmt: skip
    """An error without the URL, a retry of what cannot pass, or a refused shard that stays."""
    server.fault = lambda _: fault
    cache = NodeCache(tmp_path / "cache")
    with pytest.raises(kind, match=said) as caught:
        cache.acquire(Storage(server.url), shards[0])
    assert f"{server.url}/shards/{shards[0].name}" in str(caught.value)
    assert len(server.gets) == gets
    assert not list((tmp_path / "cache").glob("*.arrow")) and cache.held_bytes == 0
    assert not list((tmp_path / "cache").glob("*.part"))
    server.fault = lambda _: None
    cache.acquire(Storage(server.url), shards[0]).release()


def test_a_slow_server_is_a_failure_in_time(
    server: FolderServer, shards: list[Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte every few seconds, for ever: no read times out, and training never goes on."""
    monkeypatch.setattr(HttpFiles, "timeout_s", 1.0)
    server.fault = lambda one: "slow" if one.number == 1 else None
    cache = NodeCache(tmp_path / "cache")
    began = time.monotonic()
    with cache.acquire(Storage(server.url), shards[0]) as lease:
        assert lease.path.read_bytes() == original(server, shards[0]).read_bytes()
    assert time.monotonic() - began < 60.0 and cache.counts.retries >= 1


def test_pauses_grow_and_differ() -> None:
    """A thousand ranks that come back at the same moment, or at once."""
    retries = transfer.Retries(first_pause_s=0.25, longest_pause_s=10.0)
    for failed in range(1, 9):
        most = min(10.0, 0.25 * 2 ** (failed - 1))
        pauses = {retries.pause_s(failed) for _ in range(50)}
        assert len(pauses) > 40 and most / 2 <= min(pauses) and max(pauses) <= most


def damage(rng: random.Random, path: Path, other: Path) -> str:
    """Damage a file in one of the ways that disks, copies and people have."""
    what = rng.choice(["flip", "flip", "cut", "swap", "delete", "zeros", "grow", "cut to nothing"])
    data = bytearray(path.read_bytes())
    if what == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif what == "cut":
        del data[rng.randrange(len(data)) :]
    elif what == "swap":
        data = bytearray(other.read_bytes())
    elif what == "zeros":
        at = rng.randrange(len(data) - 64)
        data[at : at + 64] = bytes(64)
    elif what == "grow":
        data += bytes([rng.randrange(256)])
    elif what == "cut to nothing":
        data.clear()
    path.unlink()
    if what != "delete":
        path.write_bytes(bytes(data))
    return what


def test_1000_damages_are_found_before_use(tmp_path: Path, server: FolderServer) -> None:
    """One byte that reaches a model although it is not what the manifest says."""
    rng = random.Random(6)
    shards = make_shards(tmp_path / "data", 2, 300)
    cache, storage = NodeCache(tmp_path / "cache"), Storage(server.url)
    good = [original(server, shard).read_bytes() for shard in shards]
    done: dict[tuple[str, str], int] = {}
    for _ in range(1000):
        side = rng.choice(["cache", "cache", "cache", "server"])
        for shard, data in zip(shards, good, strict=True):
            with cache.acquire(storage, shard) as lease:
                assert lease.path.read_bytes() == data
        if side == "cache":
            paths = [cache.folder.file(shard, "arrow") for shard in shards]
            if rng.random() < 0.2:  # written in place, as a faulty program would
                with open(paths[0], "r+b") as file:
                    file.seek(rng.randrange(300))
                    file.write(bytes([rng.randrange(256), rng.randrange(256)]))
                what = "in place"
            else:
                what = damage(rng, *paths)
            with cache.acquire(storage, shards[0]) as lease:
                assert lease.path.read_bytes() == good[0], what
        else:
            what = damage(rng, original(server, shards[0]), original(server, shards[1]))
            assert cache.folder.drop(shards[0])
            if what == "grow":  # what a shard is comes first in it: the rest is never read
                with cache.acquire(storage, shards[0]) as lease:
                    assert lease.path.read_bytes() == good[0]
            else:
                with pytest.raises(DataRefused, match=re.escape(shards[0].name)):
                    cache.acquire(storage, shards[0])
            original(server, shards[0]).write_bytes(good[0])
        done[side, what] = done.get((side, what), 0) + 1
    assert sum(done.values()) == 1000 and len(done) == 15, done


def test_a_broken_answer_never_looks_whole(server: FolderServer, shards: list[Shard]) -> None:
    """Half a manifest taken for the manifest, as read() of a closed connection returns it."""
    storage, name = Storage(server.url), f"shards/{shards[0].name}"
    server.fault = lambda _: "cut"
    with pytest.raises(ConnectionError, match="broke off"):
        storage.read(name)
    with pytest.raises(ConnectionError, match="broke off"):
        storage.read_range(name, 10, 2000)
    server.fault = lambda _: None
    with pytest.raises(ShortRead):
        storage.read_range(name, 10, SIZE + 1)
    with pytest.raises(ShortRead):
        storage.read_range(name, SIZE, SIZE + 10)
    assert storage.read_range(name, 10, 2000) == original(server, shards[0]).read_bytes()[10:2000]


@pytest.mark.parametrize("scheme", ["memory", "s3"])
def test_a_store_that_ends_early_is_named(
    scheme: str, server: FolderServer, shards: list[Shard], tmp_path: Path,
    s3_server: str,
) -> None:  # fmt: skip
    """A store that answers a range beyond the end with what there is, or with an error."""
    storage = Storage({"memory": "memory://cut", "s3": "s3://leyden/cut"}[scheme])
    data = original(server, shards[0]).read_bytes()
    cache = NodeCache(tmp_path / "cache")
    storage.write_atomic(f"shards/{shards[0].name}", data[: SIZE // 2])
    with pytest.raises(DataRefused, match=f"{scheme}://.*is shorter than the manifest says"):
        cache.acquire(storage, shards[0])
    storage.delete(f"shards/{shards[0].name}")
    with pytest.raises(DataRefused, match=f"{scheme}://.*is missing"):
        cache.acquire(storage, shards[0])
    storage.write_atomic(f"shards/{shards[0].name}", data)
    with cache.acquire(storage, shards[0]) as lease:
        assert lease.path.read_bytes() == data
