"""The files of a shard cache: what is trusted, what it takes, and making room in it.

<folder>/<digest>.arrow   a whole shard whose bytes were checked
         <digest>.stamp   its facts when they were (dist.stamps), and the boot of the machine
         <digest>.lock    held exclusively while it is fetched or evicted, shared while it is used;
                          its mtime is the last use
         <digest>.part    being fetched; left by a killed process if nobody holds the lock
         space.lock       held while room is made
         member-*.lock    one for each live process; slot-*.lock: requests under way

Nothing is synced to disk: a shard from an earlier boot is hashed before its first use.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dist.errors import SetupError
from dist.file_locks import Members, locked, try_lock
from dist.manifest import Shard
from dist.shard_file import file_digest
from dist.stamps import file_facts, is_stamped

_LIMIT_KNOWN_FOR_S = 1.0


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where shards of remote datasets are kept, and how many bytes of them."""

    folder: str = ""
    """Empty: $XDG_CACHE_HOME/leyden/shards."""
    limit_gb: float = 0.0
    """10^9 bytes; 0: the disk's free space but for a margin."""

    def path(self) -> Path:
        """The folder, absolute."""
        if self.folder:
            return Path(self.folder).expanduser().absolute()
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(home, "leyden", "shards").absolute()


@dataclass
class CacheCounts:
    """What one process met in the cache and fetched into it."""

    found: int = 0
    fetched: int = 0
    fetched_bytes: int = 0
    hashed_again: int = 0
    """Files that were there without a stamp that fits."""
    refused: int = 0
    """Files whose bytes were wrong, fetched or found."""
    retries: int = 0


class CacheFolder:
    """One folder of shards, which any number of processes use at a time."""

    def __init__(self, path: Path, limit_bytes: int = 0) -> None:
        """`limit_bytes` 0: free space but for a margin. SetupError for a folder of no use."""
        self.path, self._limit_bytes = path, limit_bytes
        self.evicted = 0
        """Shards that this process evicted."""
        self._limit_known: tuple[float, int] = (0.0, 0)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.members = Members(path, path / "space.lock")
            with locked(path / "space.lock"):
                self._sweep()
        except OSError as error:
            raise SetupError(
                f"the shard cache {path} cannot be used: {error.strerror}; set data.cache_dir to "
                "a folder on a disk of the node"
            ) from error

    @property
    def limit_bytes(self) -> int:
        """What the folder may hold; for limit 0 as of a second ago at most."""
        if self._limit_bytes:
            return self._limit_bytes
        if time.monotonic() - self._limit_known[0] > _LIMIT_KNOWN_FOR_S:
            self._limit_known = (time.monotonic(), self._limit_of_disk())
        return self._limit_known[1]

    def _limit_of_disk(self) -> int:
        disk = os.statvfs(self.path)
        margin = min(10 << 30, disk.f_blocks * disk.f_frsize // 20)
        return max(0, self.used_bytes() + disk.f_bavail * disk.f_frsize - margin)

    def used_bytes(self) -> int:
        """What shards take, those being fetched with their whole size."""
        used = 0
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.endswith((".arrow", ".part")):
                    with suppress(FileNotFoundError):
                        used += entry.stat().st_size
        return used

    def state(self) -> str:
        """Its sizes, for a person."""
        disk = os.statvfs(self.path)
        return (
            f"it holds {in_words(self.used_bytes())} of at most {in_words(self.limit_bytes)}, the "
            f"disk has {in_words(disk.f_bavail * disk.f_frsize)} free, "
            f"{self.members.count()} processes use it"
        )

    def file(self, shard: Shard, kind: str) -> Path:
        """Of kind arrow, stamp, lock or part."""
        return self.path / f"{shard.xxh3_128}.{kind}"

    def is_trusted(self, shard: Shard) -> bool:
        """Whether the shard is there as it was when its bytes were checked in this boot."""
        try:
            facts = file_facts(self.file(shard, "arrow"), shard.xxh3_128)
        except OSError:
            return False
        # After a power cut a file may be empty where its stamp is whole.
        facts["boot"] = _boot_id()
        return facts["size"] == shard.bytes and is_stamped(self.file(shard, "stamp"), facts)

    def trust(self, path: Path, shard: Shard) -> None:
        """Stamp a file whose bytes were checked; a rename keeps its facts. Needs its lock."""
        facts = {**file_facts(path, shard.xxh3_128), "boot": _boot_id()}
        fresh = self.path / f"{shard.xxh3_128}.stamp.tmp"
        fresh.write_text(json.dumps(facts))
        os.replace(fresh, self.file(shard, "stamp"))

    def check(self, shard: Shard) -> bool:
        """Hash a shard that is there, stamp it if it is right, delete it if not. Needs its lock."""
        path = self.file(shard, "arrow")
        facts = file_facts(path, shard.xxh3_128)
        if file_digest(path) == shard.xxh3_128 and facts == file_facts(path, shard.xxh3_128):
            self.trust(path, shard)
            return True
        path.unlink()
        return False

    def reserve(self, shard: Shard) -> int | None:
        """The open part file at its whole size, so that the disk cannot fill up half-way.

        None if there is no room, whatever is evicted. Needs the shard's lock.
        """
        part = self.file(shard, "part")
        with locked(self.path / "space.lock"):
            part.unlink(missing_ok=True)
            over = self.used_bytes() + shard.bytes - self.limit_bytes
            if over > 0 and self._evict(over) < over:
                return None
            while (handle := _open_whole(part, shard.bytes)) is None:
                if not self._evict(shard.bytes):
                    return None
            return handle

    def drop(self, shard: Shard) -> bool:
        """Forget a shard; False if someone uses it."""
        with locked(self.path / "space.lock"):
            return self._evict_one(shard.xxh3_128)

    def _evict(self, num_bytes: int) -> int:
        """Delete the coldest shards that nobody uses; returns the bytes that it freed."""
        freed = self._sweep()
        found = []
        for path in self.path.glob("*.arrow"):
            with suppress(OSError):
                found.append((_last_use(path), path.stat().st_size, path.stem))
        for _, size, digest in sorted(found):
            if freed >= num_bytes:
                break
            if self._evict_one(digest):
                freed += size
                self.evicted += 1
        return freed

    def _evict_one(self, digest: str) -> bool:
        lock = try_lock(self.path / f"{digest}.lock")
        if lock is None:
            return False
        try:
            (self.path / f"{digest}.arrow").unlink(missing_ok=True)
            (self.path / f"{digest}.stamp").unlink(missing_ok=True)
        finally:
            os.close(lock)
        return True

    def _sweep(self) -> int:
        """Delete what killed processes left; returns the bytes that it freed."""
        freed = 0
        for part in self.path.glob("*.part"):
            lock = try_lock(part.with_suffix(".lock"))
            if lock is not None:
                with suppress(FileNotFoundError):
                    size = part.stat().st_size
                    part.unlink()
                    freed += size
                os.close(lock)
        return freed


def in_words(num_bytes: int) -> str:
    """Bytes for a person."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} bytes"


def _open_whole(path: Path, num_bytes: int) -> int | None:
    """A new file whose bytes are allocated; None on a full disk."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        os.posix_fallocate(handle, 0, num_bytes)
    except OSError as error:
        os.close(handle)
        path.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return None
        raise
    return handle


def _last_use(path: Path) -> float:
    try:
        return path.with_suffix(".lock").stat().st_mtime
    except FileNotFoundError:
        return path.stat().st_mtime


@functools.cache
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
