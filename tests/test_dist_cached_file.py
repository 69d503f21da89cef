"""Lengths of remote examples in the node's cache: fetched once a node, checked by each reader."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist.cache import CacheConfig
from dist.cached_file import read_cached
from dist.dataset import Dataset, open_dataset
from dist.errors import DataRefused
from dist.file_locks import locked
from dist.verify import check_presence, verify_full
from tests.http_server import FolderServer, serve
from tests.make_dataset import flip_byte
from tests.make_examples import write_examples
from tests.remote_shards import process


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_examples(tmp_path_factory.mktemp("data"))


@pytest.fixture
def server(local: Dataset) -> Iterator[FolderServer]:
    with serve(local.storage.url) as server:
        yield server


def opened(server: FolderServer, folder: Path, limit_gb: float = 0.0) -> Dataset:
    return open_dataset(server.url, CacheConfig(folder=str(folder), limit_gb=limit_gb))


def table_gets(server: FolderServer) -> int:
    return sum("/lengths/" in one.path for one in server.gets)


def told(dataset: Dataset, fresh: bool = False) -> list[list[int]]:
    found = dataset.read_lengths(fresh=fresh) or {}
    return [one.tolist() for split in sorted(found) for one in found[split]]


def read_at(url: str, folder: str, gate: str, out: str) -> None:
    """A rank that reads the lengths when a file is there."""
    dataset = open_dataset(url, CacheConfig(folder=folder))
    while not os.path.exists(gate):
        time.sleep(0.001)
    Path(out).write_text(repr(told(dataset)))


def test_a_node_fetches_the_lengths_once(
    local: Dataset, server: FolderServer, tmp_path: Path
) -> None:
    """Each of 8 ranks, and each restart, that downloads the same hundreds of megabytes."""
    server.bytes_per_s = 2_000
    outs = [tmp_path / f"out-{number}" for number in range(3)]
    given = (server.url, str(tmp_path / "cache"), str(tmp_path / "go"))
    ranks = [process(read_at, *given, str(out)) for out in outs]
    (tmp_path / "go").touch()
    for rank in ranks:
        rank.join(60)
    wanted = told(local)
    assert [out.read_text() for out in outs] == [repr(wanted)] * 3
    assert table_gets(server) == 1
    again = opened(server, tmp_path / "cache")
    check_presence(again)
    assert told(again) == wanted and table_gets(server) == 1
    # Its file counts, and makes room, as shards do.
    path = tmp_path / "cache" / f"{local.manifest.lengths_digest}.arrow"
    assert again.cache.folder.used_bytes() == path.stat().st_size
    assert again.cache.folder._evict(1) and not path.exists()
    assert not path.with_suffix(".lock").exists()


def test_a_damaged_copy_of_the_lengths_is_fetched_anew(
    local: Dataset, server: FolderServer, tmp_path: Path
) -> None:
    """Rows packed by lengths that a disk has changed, with a stamp that still fits."""
    dataset, wanted = opened(server, tmp_path / "cache"), told(local)
    assert told(dataset) == wanted
    path = tmp_path / "cache" / f"{local.manifest.lengths_digest}.arrow"
    stat = path.stat()
    flip_byte(path, stat.st_size // 2)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert told(dataset) == wanted and table_gets(server) == 2
    path.write_bytes(b"")
    assert told(dataset) == wanted and table_gets(server) == 3
    server.fault = lambda one: "flip" if table_gets(server) == 4 else None
    path.unlink()
    assert told(dataset) == wanted and table_gets(server) == 5
    path.unlink()
    server.fault = lambda one: "flip"
    with pytest.raises(DataRefused, match="is another table of lengths"):
        told(dataset)
    assert not path.exists() and not path.with_suffix(".lock").exists()


def test_a_verification_reads_the_lengths_at_the_url(tmp_path: Path) -> None:
    """`leyden data verify URL` that finds the copy of this node right, whatever lies there."""
    data = write_examples(tmp_path / "data")
    path = data.storage.local_path(f"lengths/{data.manifest.lengths_digest}.arrow")
    assert path is not None
    with serve(data.storage.url) as server:
        dataset = opened(server, tmp_path / "cache")
        assert verify_full(dataset, progress=False).shards and told(dataset)
        flip_byte(path, path.stat().st_size // 2)
        with pytest.raises(DataRefused, match="is another table of lengths"):
            verify_full(dataset, progress=False)


def test_without_room_the_lengths_are_read_all_the_same(
    local: Dataset, server: FolderServer, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    """A start that fails for a copy that it could do without; or one that breaks the limit."""
    tiny = opened(server, tmp_path / "cache", 1e-8)
    assert told(tiny) == told(local) and tiny.cache.folder.used_bytes() == 0
    disk = small_disk("64k")
    full = opened(server, disk / "cache", 1.0)
    assert full.cache.folder.members.count() == 1
    with open(disk / "ballast", "wb", buffering=0) as file, pytest.raises(OSError, match="space"):
        while True:
            file.write(bytes(4096))
    assert told(full) == told(local) and full.cache.folder.used_bytes() == 0
    assert not list((disk / "cache").glob("*.part"))


def test_the_next_reader_takes_over_from_a_killed_one(
    local: Dataset, server: FolderServer, tmp_path: Path
) -> None:
    """Ranks that wait for a table whose fetcher is gone, or a part of it taken for the whole."""
    server.fault = lambda one: (
        "slow" if "/lengths/" in one.path and table_gets(server) == 1 else None
    )
    (tmp_path / "go").touch()
    given = (server.url, str(tmp_path / "cache"), str(tmp_path / "go"), str(tmp_path / "out"))
    first = process(read_at, *given)
    while not table_gets(server):
        time.sleep(0.01)
    server.fault = lambda _: None
    first.kill()
    first.join()
    assert told(opened(server, tmp_path / "cache")) == told(local)


def test_who_finds_it_locked_waits(server: FolderServer, local: Dataset, tmp_path: Path) -> None:
    """Two processes that fetch at once, where one looked before the other had the lock."""
    folder, digest = opened(server, tmp_path / "cache").cache.folder, "ab" * 32
    with locked(folder.path / f"{digest}.lock"):
        other = process(_ask, str(folder.path), digest, str(tmp_path / "out"))
        time.sleep(1.0)
        assert not (tmp_path / "out").exists()
    other.join(60)
    assert (tmp_path / "out").read_text() == "fetched"


def _ask(folder: str, digest: str, out: str) -> None:
    from dist.cache_folder import CacheFolder

    def fetch() -> bytes:
        Path(out).write_text("fetched")
        return b""

    read_cached(CacheFolder(Path(folder)), digest, fetch)
