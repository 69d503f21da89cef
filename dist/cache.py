"""Shards of remote datasets on a disk of the node, shared by all its ranks and runs.

One process fetches a shard, the others wait for it. A process holds what it uses and what it is
about to use; the limit is divided among the live processes, so that what is held always fits, and
anything else may be evicted. dist/cache_folder.py says which files lie in the folder.
"""

from __future__ import annotations

import functools
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dist.cache_folder import CacheConfig, CacheCounts, CacheFolder, in_words
from dist.errors import DataRefused, SetupError
from dist.file_locks import Polling, Slots, try_lock
from dist.manifest import Shard
from dist.shard_file import file_digest
from dist.storage import Storage
from dist.transfer import REQUESTS_AT_ONCE, Cancelled, fetch_file

ROOM_TIMEOUT_S = 60.0
"""How long to wait for other processes to give shards back before the cache is called too small."""


class Lease:
    """A shard that stays in the cache until release(); `path` can be mapped."""

    def __init__(self, path: Path, give_back: Callable[[], None]) -> None:
        self.path = path
        self._give_back: Callable[[], None] | None = give_back

    def release(self) -> None:
        """Let it be evicted; again does nothing."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass
class _Held:
    """A shard that this process uses or is about to."""

    bytes: int
    users: int = 0
    handle: int | None = None


class NodeCache:
    """One process's view of a cache folder; its threads may share it."""

    def __init__(self, path: Path, limit_bytes: int = 0) -> None:
        """`limit_bytes` 0: free space but for a margin. SetupError for a folder of no use."""
        self.folder = CacheFolder(path, limit_bytes)
        self.counts = CacheCounts()
        self.holders: list[Callable[[], bool]] = []
        """Called, first to last, when this process holds too much: each gives one shard back, or
        says False."""
        self._held: dict[str, _Held] = {}
        self._lock = threading.Lock()
        self._slots = Slots(path, REQUESTS_AT_ONCE)
        _allow_many_files()

    def close(self) -> None:
        """Give everything back and be counted no more."""
        with self._lock:
            for held in self._held.values():
                if held.handle is not None:
                    os.close(held.handle)
            self._held.clear()
        self.folder.members.leave()

    @property
    def held_bytes(self) -> int:
        """What this process uses now, or is fetching."""
        with self._lock:
            return sum(one.bytes for one in self._held.values())

    @property
    def share_bytes(self) -> int:
        """What this process may hold: the limit over all live processes."""
        return self.folder.limit_bytes // self.folder.members.count()

    def acquire(self, storage: Storage, shard: Shard, stop: threading.Event | None = None) -> Lease:
        """The shard, whole and checked; fetched by one process while the others wait.

        Raises DataRefused for bytes that stay wrong, SetupError for no room or no network,
        Cancelled after `stop`.
        """
        stop = stop or threading.Event()
        self._enter(shard)
        handle: int | None = None
        try:
            polling = Polling(stop)
            while (handle := self._try(storage, shard, stop)) is None:
                self.keep_to_share()
                if not polling.wait():
                    raise Cancelled(f"waiting for the shard {shard.name} was given up")
        finally:
            if handle is None:
                self._leave(shard.xxh3_128)
        return self._lease(shard, handle)

    def pin(self, shard: Shard) -> Lease | None:
        """The shard, if it is there and checked already; else None, without waiting."""
        with self._lock:
            self._held.setdefault(shard.xxh3_128, _Held(shard.bytes)).users += 1
        handle = self._use(shard)
        if handle is None:
            self._leave(shard.xxh3_128)
            return None
        return self._lease(shard, handle)

    def recheck(self, shard: Shard) -> str:
        """Hash the copy of a shard; '' if it is right or absent. A wrong one is deleted.

        A copy that somebody uses is hashed too, but can only be named.
        """
        path = self.folder.file(shard, "arrow")
        if not path.exists():
            return ""
        lock = try_lock(self.folder.file(shard, "lock"))
        if lock is None:
            good = file_digest(path) == shard.xxh3_128
        else:
            good = self.folder.check(shard)
            os.close(lock)
        what = "it is in use: stop the runs of this node" if lock is None else "it was deleted"
        return "" if good else f"the copy {path} of {shard.name} was damaged ({what})"

    def holds(self, shard: Shard) -> bool:
        """Whether this process uses the shard now, or is fetching it."""
        with self._lock:
            return shard.xxh3_128 in self._held

    def keep_to_share(self, more_bytes: int = 0) -> None:
        """Give back what this process holds beyond its share, if it can."""
        share = self.share_bytes
        while self.held_bytes + more_bytes > share and any(give() for give in list(self.holders)):
            pass

    def _enter(self, shard: Shard) -> None:
        """Count a shard as held; if it is new here, within the share of this process."""
        with self._lock:
            if shard.xxh3_128 in self._held:
                self._held[shard.xxh3_128].users += 1
                return
        share = self.share_bytes
        if shard.bytes > share:
            members = self.folder.members.count()
            raise SetupError(
                f"the cache {self.folder.path} may hold {in_words(self.folder.limit_bytes)}, "
                f"{in_words(share)} for each of {members} processes, but a shard has "
                f"{in_words(shard.bytes)}: it needs {in_words(members * shard.bytes)} at least, "
                "and twice that to fetch ahead; raise data.cache_gb, or set data.cache_dir to a "
                "larger disk"
            )
        self.keep_to_share(shard.bytes)
        with self._lock:
            self._held.setdefault(shard.xxh3_128, _Held(shard.bytes)).users += 1

    def _lease(self, shard: Shard, handle: int) -> Lease:
        digest = shard.xxh3_128
        with self._lock:
            held = self._held[digest]
            if held.handle is None:
                held.handle = handle
            else:
                os.close(handle)
        return Lease(self.folder.file(shard, "arrow"), lambda: self._leave(digest))

    def _leave(self, digest: str) -> None:
        with self._lock:
            held = self._held.get(digest)
            if held is None:  # closed meanwhile
                return
            held.users -= 1
            if held.users == 0:
                del self._held[digest]
                if held.handle is not None:
                    os.utime(held.handle)
                    os.close(held.handle)

    def _try(self, storage: Storage, shard: Shard, stop: threading.Event) -> int | None:
        """One round: use it, or bring it; None where another process is at it."""
        handle = self._use(shard)
        if handle is not None:
            self.counts.found += 1
            return handle
        lock = try_lock(self.folder.file(shard, "lock"))
        if lock is None:
            return None
        try:
            if not self._is_there(shard):
                self._bring(storage, shard, stop)
        finally:
            os.close(lock)
        # It may be evicted between the two locks; then there is another round.
        return self._use(shard)

    def _use(self, shard: Shard) -> int | None:
        """A shared lock on a shard that is there and trusted."""
        handle = try_lock(self.folder.file(shard, "lock"), shared=True)
        if handle is None:
            return None
        if self.folder.is_trusted(shard):
            os.utime(handle)
            return handle
        os.close(handle)
        return None

    def _is_there(self, shard: Shard) -> bool:
        if self.folder.is_trusted(shard):
            return True
        if not self.folder.file(shard, "arrow").exists():
            return False
        self.counts.hashed_again += 1
        good = self.folder.check(shard)
        self.counts.refused += not good
        return good

    def _bring(self, storage: Storage, shard: Shard, stop: threading.Event) -> None:
        """Fetch a shard and give it its final name. Needs its lock."""
        url = f"{storage.url}/shards/{shard.name}"
        part = self.folder.file(shard, "part")
        try:
            if self._fetch(storage, shard, stop) or self._fetch(storage, shard, stop):
                self.folder.trust(part, shard)
                os.replace(part, self.folder.file(shard, "arrow"))
                return
            raise DataRefused(
                f"{url} has xxh3-128 {file_digest(part)}, the manifest says {shard.xxh3_128} "
                "(fetched twice); copy it anew, or run the prep job again"
            )
        except OSError as error:
            raise SetupError(
                f"{url} cannot be kept in {self.folder.path}: {error.strerror or error}; "
                f"{self.folder.state()}; free space, or set data.cache_dir to another disk"
            ) from error
        finally:
            part.unlink(missing_ok=True)

    def _fetch(self, storage: Storage, shard: Shard, stop: threading.Event) -> bool:
        """Fetch a shard into its part file; whether its bytes are right."""
        handle = self._reserve(shard, stop)
        try:
            fetch_file(
                storage, f"shards/{shard.name}", shard.bytes, handle,
                slot=lambda: self._slots.one(stop), stop=stop, on_retry=self._count_retry,
            )  # fmt: skip
        except FileNotFoundError:
            url = f"{storage.url}/shards/{shard.name}"
            raise DataRefused(f"{url} is missing; restore it, or run the prep job again") from None
        finally:
            os.close(handle)
        self.counts.fetched += 1
        self.counts.fetched_bytes += shard.bytes
        good = file_digest(self.folder.file(shard, "part")) == shard.xxh3_128
        self.counts.refused += not good
        return good

    def _count_retry(self) -> None:
        self.counts.retries += 1

    def _reserve(self, shard: Shard, stop: threading.Event) -> int:
        """The part file, once there is room for it."""
        began, polling, told = time.monotonic(), Polling(stop), False
        while (handle := self.folder.reserve(shard)) is None:
            waited_s = time.monotonic() - began
            if waited_s > ROOM_TIMEOUT_S:
                raise SetupError(
                    f"no room for the shard {shard.name} of {in_words(shard.bytes)} in the cache "
                    f"{self.folder.path}: {self.folder.state()}, and all of it is in use; raise "
                    "data.cache_gb, free space on its disk, or set data.cache_dir to a larger one"
                )
            if waited_s > 5 and not told:
                print(
                    f"waiting for room in {self.folder.path}: {self.folder.state()}",
                    file=sys.stderr,
                )
                told = True
            self.keep_to_share()
            if not polling.wait():
                raise Cancelled(f"waiting for room for {shard.name} was given up")
        return handle


def node_cache(config: CacheConfig) -> NodeCache:
    """This process's cache for a config, made once."""
    return _cache_at(config.path(), int(config.limit_gb * 1e9), os.getpid())


@functools.cache
def _cache_at(path: Path, limit_bytes: int, pid: int) -> NodeCache:
    # A forked process needs one of its own, or its releases would be its parent's.
    return NodeCache(path, limit_bytes)


def _allow_many_files() -> None:
    """A lock and a map a shard: the usual soft limit of 1,024 files is soon reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
