"""The files of a shard cache: what is trusted, what it takes, and making room in it.

<folder>/<digest>.arrow   a whole shard whose bytes were checked; or a file of lengths, named by its
                          SHA-256 (dist/cached_file.py), which has no stamp
         <digest>.stamp   its facts when they were (dist.stamps), and the boot of the machine
         <digest>.lock    held exclusively while it is fetched or evicted, shared while it is used;
                          its mtime is the last use; it goes when the shard goes
         <digest>.part    being fetched; left by a killed process if nobody holds the lock
         space.lock       held while room is made, and while a part becomes a shard
         member-*.lock    one for each live process; slot-*.lock: requests under way

Nothing is synced to disk: a shard from an earlier boot is hashed before its first use.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import os
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dist.errors import SetupError
from dist.file_locks import drop_lock, lies_at, locked, try_lock
from dist.manifest import Shard
from dist.members import Members
from dist.shard_file import file_digest
from dist.stamps import file_facts, is_stamped

_LIMIT_KNOWN_FOR_S = 1.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_SHORTEST_DIGEST = 32
"""Of hex digits: what is named shorter, as the space's own lock, is no shard's."""
_SWEPT_AT_A_START = 1000


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
                self._sweep_leftovers()
        except OSError as error:
            raise SetupError(
                f"the shard cache {path} cannot be used: {error.strerror or error}; set "
                "data.cache_dir to a folder of yours on a disk of the node"
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
        for entry in self._entries((".arrow", ".part")):
            with suppress(FileNotFoundError):
                used += entry.stat().st_size
        return used

    def _entries(self, endings: str | tuple[str, ...]) -> list[os.DirEntry[str]]:
        # Of ten thousand files, pathlib's glob takes several times as long.
        with os.scandir(self.path) as entries:
            return [entry for entry in entries if entry.name.endswith(endings)]

    def state(self) -> str:
        """Its sizes, for a person."""
        try:
            disk = os.statvfs(self.path)
            return (
                f"it holds {in_words(self.used_bytes())} of at most {in_words(self.limit_bytes)}, "
                f"the disk has {in_words(disk.f_bavail * disk.f_frsize)} free, "
                f"{self.members.count()} processes use it"
            )
        except OSError as error:
            return f"it cannot be read: {error.strerror or error}"

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
        fresh = self.path / f"{shard.xxh3_128}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            fresh.write_text(json.dumps(facts))
            os.replace(fresh, self.file(shard, "stamp"))
        except OSError as error:
            with suppress(OSError):
                fresh.unlink(missing_ok=True)
            if error.errno not in _FULL:  # without a stamp it is hashed again next time
                raise

    def keep(self, shard: Shard) -> None:
        """Stamp a part whose bytes were checked and give it its final name. Needs its lock."""
        self.trust(self.file(shard, "part"), shard)
        self.name_part(shard.xxh3_128)

    def check(self, shard: Shard) -> bool:
        """Hash a shard that is there, stamp it if it is right, delete it if not. Needs its lock."""
        if self.is_right(shard):
            return True
        self.file(shard, "arrow").unlink(missing_ok=True)
        return False

    def is_right(self, shard: Shard) -> bool:
        """Hash a shard and stamp it if it is right. Needs its lock, be it shared."""
        path = self.file(shard, "arrow")
        try:
            for _ in range(3):
                facts = file_facts(path, shard.xxh3_128)
                if facts["size"] != shard.bytes or file_digest(path) != shard.xxh3_128:
                    return False
                if facts == file_facts(path, shard.xxh3_128):
                    self.trust(path, shard)
                    return True
                # It was touched, or changed, while it was read: once more.
        except FileNotFoundError:
            pass
        return False

    def set_aside(self, shard: Shard, shared: int) -> None:
        """Drop a shared lock; if somebody deleted its shard by hand, let it be fetched anew.

        Those who use it keep their maps, and a lock that no longer lies at its name.
        """
        lock = self.file(shard, "lock")
        with locked(self.path / "space.lock"):
            if not self.file(shard, "arrow").exists() and lies_at(shared, lock):
                _unlink(lock)
        drop_lock(shared)

    def let_go(self, shard: Shard, lock: int) -> None:
        """Drop the exclusive lock of a shard; where none is there, its file goes too."""
        self.let_go_of(shard.xxh3_128, lock)

    def let_go_of(self, digest: str, lock: int) -> None:
        """As let_go, of any file that is named by its digest."""
        if not (self.path / f"{digest}.arrow").exists():
            _unlink(self.path / f"{digest}.lock")
        drop_lock(lock)

    def reserve(self, shard: Shard) -> int | None:
        """The open part file at its whole size, so that the disk cannot fill up half-way.

        None if there is no room, whatever is evicted. Needs the shard's lock.
        """
        return self.reserve_part(shard.xxh3_128, shard.bytes)

    def reserve_part(self, digest: str, num_bytes: int) -> int | None:
        """As reserve, of any file that is named by its digest."""
        part = self.path / f"{digest}.part"
        with locked(self.path / "space.lock"):
            part.unlink(missing_ok=True)
            over = self.used_bytes() + num_bytes - self.limit_bytes
            if over > 0 and self._evict(over) < over:
                return None
            while (handle := _open_whole(part, num_bytes)) is None:
                if not self._evict(num_bytes):
                    return None
            return handle

    def name_part(self, digest: str) -> None:
        """Give a part whose bytes were checked its final name. Needs its lock."""
        # Whoever adds up the sizes would miss a file that changes its name meanwhile.
        with locked(self.path / "space.lock"):
            os.replace(self.path / f"{digest}.part", self.path / f"{digest}.arrow")

    def drop(self, shard: Shard) -> bool:
        """Forget a shard; False if someone uses it."""
        with locked(self.path / "space.lock"):
            return self._evict_one(shard.xxh3_128)

    def _evict(self, num_bytes: int) -> int:
        """Delete the coldest shards that nobody uses; returns the bytes that it freed."""
        freed = self._sweep()
        found = []
        for entry in self._entries(".arrow"):
            with suppress(FileNotFoundError):
                found.append((_last_use(entry), entry.stat().st_size, Path(entry.name).stem))
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
            gone = _unlink(self.path / f"{digest}.arrow")
            if gone:
                _unlink(self.path / f"{digest}.stamp")
                _unlink(self.path / f"{digest}.lock")
        finally:
            drop_lock(lock)
        return gone

    def _sweep(self) -> int:
        """Delete what killed processes were fetching; returns the bytes that it freed."""
        freed = 0
        for entry in self._entries(".part"):
            part = Path(entry.path)
            lock = try_lock(part.with_suffix(".lock"))
            if lock is not None:
                with suppress(FileNotFoundError):
                    size = part.stat().st_size
                    freed += size if _unlink(part) else 0
                drop_lock(lock)
        return freed

    def _sweep_leftovers(self) -> None:
        """Delete stamps and locks of shards that are gone, as kills leave them: thousands in time.

        A shard that is there keeps its own; so does one that somebody fetches now.
        """
        with os.scandir(self.path) as entries:
            names = {entry.name for entry in entries}
        shards = {name.partition(".")[0] for name in names if name.endswith(".arrow")}
        left = (one for one in names if _is_leftover(one, shards))
        # Others wait meanwhile; the rest goes at the next starts.
        for name in itertools.islice(left, _SWEPT_AT_A_START):
            digest, _, ending = name.partition(".")
            lock = try_lock(self.path / f"{digest}.lock")
            if lock is None:
                continue
            if ending.endswith("tmp"):
                _unlink(self.path / name)
            if not (self.path / f"{digest}.arrow").exists():
                _unlink(self.path / f"{digest}.stamp")
                _unlink(self.path / f"{digest}.lock")
            drop_lock(lock)


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
        if error.errno in _FULL:
            return None
        raise
    return handle


def _is_leftover(name: str, shards: set[str]) -> bool:
    """Whether a file is a stamp or lock of a shard that is not there, or an unfinished stamp."""
    digest, _, ending = name.partition(".")
    if len(digest) < _SHORTEST_DIGEST:
        return False
    return ending.endswith("tmp") or (ending in ("lock", "stamp") and digest not in shards)


def _unlink(path: Path) -> bool:
    """Whether a file is gone; that of another user in a folder like /tmp stays."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        return False
    return True


def _last_use(shard: os.DirEntry[str]) -> float:
    try:
        return os.stat(shard.path.removesuffix(".arrow") + ".lock").st_mtime
    except FileNotFoundError:
        return shard.stat().st_mtime


@functools.cache
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
