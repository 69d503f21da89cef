"""The cache on disks that are full, read-only or another user's, and in processes of few files."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dist.cache import Lease, NodeCache
from dist.errors import LeydenError, SetupError
from dist.manifest import Shard
from dist.storage import Storage
from tests.http_server import FolderServer, serve
from tests.remote_shards import make_shards, process

SIZE = 4_000
OTHER_USER = 65_534


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FolderServer]:
    with serve(tmp_path / "data") as server:
        yield server


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    return make_shards(tmp_path / "data", 6, SIZE)


def fill(disk: Path) -> None:
    """Leave no block free."""
    with open(disk / "ballast", "ab", buffering=0) as file:
        for block in (1 << 16, 1 << 12):
            try:
                while True:
                    file.write(bytes(block))
            except OSError:
                continue


def test_a_warm_start_on_a_full_disk(
    server: FolderServer, shards: list[Shard], tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    """A run that ends because no stamp of a hundred bytes fits, where all its shards are there."""
    disk = small_disk("1m")
    NodeCache(disk / "cache").acquire(Storage(server.url), shards[0]).release()
    (disk / "cache" / f"{shards[0].xxh3_128}.stamp").unlink()
    cache, other = NodeCache(disk / "cache", 1 << 20), NodeCache(disk / "cache", 1 << 20)
    fill(disk)
    lease = cache.acquire(Storage(server.url), shards[0])
    with other.acquire(Storage(server.url), shards[0]) as theirs:
        data = (server.folder / "shards" / shards[0].name).read_bytes()
        assert theirs.path.read_bytes() == data
    assert len(server.gets) == 1 and not list((disk / "cache").glob("*.tmp"))
    (disk / "ballast").unlink()
    lease.release()
    cache.acquire(Storage(server.url), shards[0]).release()
    assert cache.folder.is_trusted(shards[0]) and len(server.gets) == 1


def test_who_waits_for_a_full_disk_gives_back_its_own(
    server: FolderServer, tmp_path: Path, small_disk: Callable[[str], Path]
) -> None:
    """A process that waits for itself, and ends after a minute: the disk holds less than the limit
    says, so nobody holds more than its share."""
    shards = make_shards(tmp_path / "data", 3, 400_000)
    cache = NodeCache(small_disk("1m") / "cache", 1 << 30)
    held = [cache.acquire(Storage(server.url), shard) for shard in shards[:2]]

    def give() -> bool:
        if held:
            held.pop(0).release()
            return True
        return False

    cache.holders.append(give)
    cache.acquire(Storage(server.url), shards[2]).release()
    assert len(held) == 1


def test_a_disk_of_no_use_is_named(
    server: FolderServer, shards: list[Shard], small_disk: Callable[[str], Path], tmp_path: Path
) -> None:
    """A traceback of OSError, at the start or, where a disk fails, in the middle of a run."""
    disk = small_disk("1m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(SetupError, match=r"cannot be used: Read-only.*data\.cache_dir"):
        NodeCache(disk / "cache")
    cache = NodeCache(tmp_path / "cache")
    kept = cache.acquire(Storage(server.url), shards[0])
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").touch()
    for shard in (shards[0], shards[1]):
        with pytest.raises(SetupError, match=r"shards/\w+.arrow cannot be kept in .*cache_dir"):
            cache.acquire(Storage(server.url), shard)
    kept.release()
    assert cache.held_bytes == 0


def as_other_user(folder: str, url: str, shard: Shard, out: str, make_room: bool) -> None:
    """What another user's process says who uses a folder."""
    import encodings.idna  # noqa: F401 -- a user who cannot read our Python could not later

    os.setgroups([])
    os.setgid(OTHER_USER)
    os.setuid(OTHER_USER)
    try:
        cache = NodeCache(Path(folder))
        with cache.acquire(Storage(url), shard) as lease:
            said = str(len(lease.path.read_bytes()))
        if make_room:
            said += f" {cache.folder._evict(1 << 40)}"
        said += f" {cache.folder.members.count()}"
    except LeydenError as error:
        said = f"{error.exit_code} {error}"
    Path(out).write_text(said)


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder that other users may look into; pytest closes its own to them at each start."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o755)
        yield Path(made)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_folder_of_another_user(
    server: FolderServer, shards: list[Shard], open_place: Path
) -> None:
    """A traceback in somebody else's cache; and in a folder that all may write to, as /tmp, a lock
    that only its maker can take, or an end because another's file cannot be deleted."""
    folder, out = open_place / "cache", open_place / "out"
    out.mkdir()
    out.chmod(0o777)
    cache = NodeCache(folder)
    cache.acquire(Storage(server.url), shards[0]).release()

    def ask(name: str, shard: Shard, make_room: bool = False) -> str:
        there = out / name
        other = process(as_other_user, str(folder), server.url, shard, str(there), make_room)
        other.join(60)
        assert other.exitcode == 0
        return there.read_text()

    folder.chmod(0o755)
    assert ask("private", shards[0]).startswith(f"4 the shard cache {folder} cannot be used: Perm")
    folder.chmod(0o777)
    assert ask("open", shards[0]) == f"{shards[0].bytes} 2"
    assert ask("fetch", shards[1]) == f"{shards[1].bytes} 2"
    folder.chmod(0o1777)
    (folder / "member-1-dead.lock").touch()
    (folder / f"{shards[3].xxh3_128}.part").write_bytes(b"x")
    # It evicts its own, not ours.
    assert ask("sticky", shards[2], True) == f"{shards[2].bytes} {shards[1].bytes + SIZE + 2} 2"
    assert cache.folder.file(shards[0], "arrow").exists()
    cache.acquire(Storage(server.url), shards[0]).release()
    assert len(server.gets) == 3


def with_few_files(folder: str, url: str, shards: list[Shard], out: str) -> None:
    """Map many shards where 256 files may be open, hard."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    cache = NodeCache(Path(folder))
    held: list[tuple[Lease, Any]] = []

    def give() -> bool:
        if not held:
            return False
        lease, file = held.pop(0)
        file.close()
        lease.release()
        return True

    cache.holders.append(give)
    for shard in shards:
        lease = cache.acquire(Storage(url), shard)
        held.append((lease, open(lease.path, "rb")))  # noqa: SIM115 -- closed by give()
    cache.holders.clear()
    others: list[int] = []
    try:
        while True:
            others.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    try:
        cache.acquire(Storage(url), shards[0])
        said = "no error"
    except LeydenError as error:
        said = str(error)
    for handle in others:
        os.close(handle)
    Path(out).write_text(f"{len(held)} {said}")


def test_few_open_files_are_enough(server: FolderServer, tmp_path: Path) -> None:
    """ulimit -n 256: a run that ends at the 100th shard, or a traceback of EMFILE."""
    shards = make_shards(tmp_path / "data", 150, 100)
    given = (str(tmp_path / "cache"), server.url, shards, str(tmp_path / "out"))
    user = process(with_few_files, *given)
    user.join(60)
    assert user.exitcode == 0
    held, _, said = (tmp_path / "out").read_text().partition(" ")
    assert 10 < int(held) < 100
    assert "Too many open files" in said and "ulimit -n" in said
