"""Shards of remote datasets on a disk of the node, shared by all its ranks and runs.

One process fetches a shard, the others wait for it. A process holds what it uses and what it is
about to use; the limit is divided among the live processes, so that what is held always fits, and
anything else may be evicted. dist/cache_folder.py says which files lie in the folder.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dist.cache_folder import CacheConfig, CacheCounts, CacheFolder, in_words
from dist.errors import DataRefused, SetupError
from dist.file_locks import Polling, Slots, drop_lock, share_lock, try_lock
from dist.manifest import Shard
from dist.open_files import most_shard_files
from dist.shard_file import file_digest
from dist.storage import Storage
from dist.transfer import REQUESTS_AT_ONCE, Cancelled, fetch_file

ROOM_TIMEOUT_S = 60.0
"""How long to wait for other processes to give shards back before the cache is called too small."""
DAMAGED_IN_USE_S = 5.0
"""So long may a damaged shard be locked by others, who may only look at it too, before it is said
to be in use."""
GIVE_BACK_AFTER_S = 1.0
"""Who waits for room for so long gives back what it holds itself, though it is within its share."""
_FILES_A_SHARD = 3
"""Its lock, its map, and one while it is opened."""
_MAKING = threading.Lock()


class Lease:
    """A shard that stays in the cache until release(); `path` can be mapped."""

    def __init__(self, path: Path, give_back: Callable[[], None]) -> None:
        self.path = path
        self._give_back = [give_back]

    def release(self) -> None:
        """Let it be evicted; again does nothing, by whichever thread."""
        with suppress(IndexError):
            self._give_back.pop()()

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
    damaged_since: float | None = None
    """When it was first found damaged while others had locked it."""


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
        self._pid = os.getpid()
        self._most_held = max(2, most_shard_files() // _FILES_A_SHARD)

    def close(self) -> None:
        """Give everything back and be counted no more."""
        with self._lock:
            for held in self._held.values():
                if held.handle is not None:
                    drop_lock(held.handle)
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
        if stop.is_set():  # nobody would give it back
            raise Cancelled(f"waiting for the shard {shard.name} was given up")
        try:
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
        except OSError as error:
            raise self._of_no_use(f"{storage.url}/shards/{shard.name}", error) from error
        return self._lease(shard, handle)

    def recheck(self, shard: Shard) -> str:
        """Hash the copy of a shard; '' if it is right or absent. A wrong one is deleted.

        A copy that somebody uses is hashed too, but can only be named.
        """
        path = self.folder.file(shard, "arrow")
        if not path.exists():
            return ""
        lock = try_lock(self.folder.file(shard, "lock"))
        try:
            if lock is not None:
                good = not path.exists() or self.folder.check(shard)
            else:
                good = file_digest(path) == shard.xxh3_128
        except FileNotFoundError:  # evicted meanwhile
            return ""
        finally:
            if lock is not None:
                self.folder.let_go(shard, lock)
        what = "it is in use: stop the runs of this node" if lock is None else "it was deleted"
        return "" if good else f"the copy {path} of {shard.name} was damaged ({what})"

    def holds(self, shard: Shard) -> bool:
        """Whether this process uses the shard now, or is fetching it."""
        with self._lock:
            return shard.xxh3_128 in self._held

    def keep_to_share(self, more_bytes: int = 0) -> None:
        """Give back what this process holds beyond its share, if it can."""
        while self.is_too_much(more_bytes) and any(give() for give in list(self.holders)):
            pass

    def is_too_much(self, more_bytes: int = 0) -> bool:
        """Whether what this process holds, and a shard of more_bytes, is beyond its share."""
        share = self.share_bytes
        with self._lock:
            held_bytes = sum(one.bytes for one in self._held.values())
            too_many = len(self._held) + (more_bytes > 0) > self._most_held
            return too_many or held_bytes + more_bytes > share

    def _enter(self, shard: Shard) -> None:
        """Count a shard as held; if it is new here, within the share of this process."""
        with self._lock:
            if shard.xxh3_128 in self._held:
                self._held[shard.xxh3_128].users += 1
                return
        self._refuse_too_large(shard)
        self.keep_to_share(shard.bytes)
        with self._lock:
            self._held.setdefault(shard.xxh3_128, _Held(shard.bytes)).users += 1

    def _refuse_too_large(self, shard: Shard) -> None:
        """SetupError where this process cannot have one shard at a time beside those before it.

        Who came later is not counted: a second run must not end the first.
        """
        share, limit, members = self.share_bytes, self.folder.limit_bytes, self.folder.members
        if shard.bytes > share and shard.bytes > limit // (1 + members.earlier()):
            count = members.count()
            raise SetupError(
                f"the cache {self.folder.path} may hold {in_words(limit)}, {in_words(share)} for "
                f"each of {count} processes, but a shard has {in_words(shard.bytes)}: it needs "
                f"{in_words(count * shard.bytes)} at least, and twice that to fetch ahead; raise "
                "data.cache_gb, or set data.cache_dir to a larger disk"
            )

    def _lease(self, shard: Shard, handle: int) -> Lease:
        digest = shard.xxh3_128
        with self._lock:
            held = self._held.get(digest)
            if held is not None:
                # The older lock may be of a file that somebody deleted.
                before, held.handle, held.damaged_since = held.handle, handle, None
        if held is None:
            drop_lock(handle)
            raise _closed(shard)
        if before is not None:
            drop_lock(before)
        return Lease(self.folder.file(shard, "arrow"), lambda: self._leave(digest))

    def _leave(self, digest: str) -> None:
        if self._pid != os.getpid():
            return  # forked since: it holds nothing, and _lock may be held for ever
        with self._lock:
            held = self._held.get(digest)
            if held is None:  # closed meanwhile
                return
            held.users -= 1
            if held.users == 0:
                del self._held[digest]
                if held.handle is not None:
                    _note_use(held.handle)
                    drop_lock(held.handle)

    def _try(self, storage: Storage, shard: Shard, stop: threading.Event) -> int | None:
        """One round: use it, or bring it; None where another process is at it."""
        handle = self._use(shard)
        if handle is not None:
            self.counts.found += 1
            return handle
        lock = try_lock(self.folder.file(shard, "lock"))
        if lock is None:
            return self._use_without_stamp(shard)
        try:
            if not self._is_there(shard):
                self._bring(storage, shard, stop)
        except BaseException:
            self.folder.let_go(shard, lock)
            raise
        # Shared before it is dropped, or it could be evicted before its first use.
        if not share_lock(lock):
            return None
        _note_use(lock)
        return lock

    def _use(self, shard: Shard) -> int | None:
        """A shared lock on a shard that is there and trusted."""
        # A look at what is not there must not leave a lock's file behind.
        if not self.folder.file(shard, "arrow").exists():
            return None
        handle = try_lock(self.folder.file(shard, "lock"), shared=True)
        if handle is None:
            return None
        if self.folder.is_trusted(shard):
            _note_use(handle)
            return handle
        drop_lock(handle)
        return None

    def _use_without_stamp(self, shard: Shard) -> int | None:
        """A shared lock on a shard that others use, though its stamp does not fit: it was touched.

        To wait until they give it back could be for ever: they may wait for this process.
        """
        handle = try_lock(self.folder.file(shard, "lock"), shared=True)
        if handle is None:  # it is being fetched
            return None
        if self.folder.file(shard, "arrow").exists():
            self.counts.hashed_again += 1
            try:
                is_right = self.folder.is_right(shard)
            except BaseException:
                drop_lock(handle)
                raise
            if is_right:
                _note_use(handle)
                return handle
        if not self.folder.file(shard, "arrow").exists():
            self.folder.set_aside(shard, handle)
            return None
        drop_lock(handle)
        held, now = self._held.get(shard.xxh3_128), time.monotonic()
        if held is None:
            raise _closed(shard)
        held.damaged_since = held.damaged_since or now
        if now - held.damaged_since < DAMAGED_IN_USE_S:
            return None
        self.counts.refused += 1
        raise DataRefused(
            f"the copy {self.folder.file(shard, 'arrow')} of {shard.name} was damaged while "
            "another process uses it, so that it cannot be fetched anew; check that disk, stop "
            "the runs of this node, then give the same command again"
        )

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
                self.folder.keep(shard)
                return
            raise DataRefused(
                f"{url} has xxh3-128 {file_digest(part)}, the manifest says {shard.xxh3_128} "
                "(fetched twice); copy it anew, or run the prep job again"
            )
        finally:
            part.unlink(missing_ok=True)

    def _of_no_use(self, url: str, error: OSError) -> SetupError:
        """What to say of a failure of the disk, or of this process on it."""
        what = "free space, or set data.cache_dir to another disk"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            what = "raise the limit of open files (ulimit -n)"
        return SetupError(
            f"{url} cannot be kept in {self.folder.path}: {error.strerror or error}; "
            f"{self.folder.state()}; {what}"
        )

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
            if waited_s > GIVE_BACK_AFTER_S:  # a disk may hold less than the limit
                any(give() for give in list(self.holders))
            if not polling.wait():
                raise Cancelled(f"waiting for room for {shard.name} was given up")
        return handle


def _closed(shard: Shard) -> Cancelled:
    return Cancelled(f"the cache was closed while the shard {shard.name} was asked for")


def node_cache(config: CacheConfig) -> NodeCache:
    """This process's cache for a config, made once."""
    with _MAKING:  # two would be two members, each with half of this process's share
        return _cache_at(config.path(), int(config.limit_gb * 1e9), os.getpid())


@functools.cache
def _cache_at(path: Path, limit_bytes: int, pid: int) -> NodeCache:
    # A forked process needs one of its own, or its releases would be its parent's.
    return NodeCache(path, limit_bytes)


def _note_use(handle: int) -> None:
    with suppress(OSError):  # another user's lock, or a disk that became read-only
        os.utime(handle)
