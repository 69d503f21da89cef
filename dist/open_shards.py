"""Shards that a loader has mapped, and those of remote datasets that it fetches ahead of use."""

from __future__ import annotations

import concurrent.futures
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from dist.batch_layout import RowsAhead, Steps
from dist.cache import Lease, NodeCache
from dist.cache_folder import in_words
from dist.dataset import Dataset
from dist.errors import LeydenError
from dist.open_files import most_shard_files
from dist.order_choice import network_file_system
from dist.split_table import SplitTable
from dist.transfer import untested_note
from dist.verify import ShardVerifier

MAX_OPEN_SHARDS = 4096
"""Opening a shard takes some 0.3 ms and 0.1 MB; in a global order each row may lie in another."""
STEPS_AHEAD = 64
SHARDS_AHEAD = 8
MOST_STEPS_AHEAD = 1 << 16
"""So far a plan is searched for shards to fetch."""
FETCHES_AT_ONCE = 4
_LOOK_S = 0.2


def shards_of_steps(split: SplitTable, order: Any, plan: Steps) -> Iterator[tuple[int, list[int]]]:
    """(step, numbers of the shards that this rank reads in it) of each step of a plan."""
    ahead = RowsAhead(order, plan)
    while steps := ahead.take(1):
        yield steps[0].step, np.unique(split.locate(steps[0].rows)[0]).tolist()


def remote_notes(dataset: Dataset, order: str = "global") -> list[str]:
    """What to tell the person who trains on a remote dataset; [] for a local one."""
    if not dataset.is_remote:
        return []
    shards = dataset.split("train").shards
    total, folder = sum(shard.bytes for shard in shards), dataset.cache.folder
    url, limit = dataset.storage.url, folder.limit_bytes
    notes = [
        f"data: {len(shards)} shards, {in_words(total)}, from {url} through the cache "
        f"{folder.path} of at most {in_words(limit)}"
    ]
    if shared := network_file_system(folder.path):
        notes.append(
            f"warning: that cache lies on {shared}, which other nodes share: each would hash the "
            "others' copies again and again; set data.cache_dir to a disk of the node"
        )
    if order == "global":
        again = ""
        if total > limit:
            again = (
                ", and as the cache holds less, shards are fetched again and again: set "
                f"data.cache_gb to {total / 1e9:.3g} or more"
            )
        notes.append(
            f"warning: in a global order every rank reads every shard, so that each node fetches "
            f"all {in_words(total)}{again}"
        )
    return [*notes, *filter(None, [untested_note(url)])]


class OpenShards:
    """A bounded set of mapped shards; bytes are verified before the first use of a shard.

    Local shards go by the verifier. Remote ones are leased from the node's cache, at most half of
    this process's share of it, and fetched ahead along the plan given to begin().
    """

    def __init__(self, dataset: Dataset, split: SplitTable, verifier: ShardVerifier | None) -> None:
        self._dataset, self._split = dataset, split
        self._is_remote = dataset.remote_shards(split)
        """By number: of a mixture some may be local."""
        self._verifier = verifier
        self._open: OrderedDict[int, tuple[Any, Lease | None]] = OrderedDict()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._ahead: ShardsAhead | None = None
        # A map keeps its file open, and another loader may have as many.
        self._most_open = min(MAX_OPEN_SHARDS, max(8, most_shard_files() // 3))

    def get(self, number: int) -> Any:
        """A shard, mapped; waits for its bytes where they are not there yet."""
        found = self._open.get(number)
        if found is not None:
            try:
                self._open.move_to_end(number)
            except KeyError:  # closed by another thread meanwhile; `found` keeps the map
                pass
            return found[0]
        shard = self._split.shards[number]
        if self._is_remote[number]:
            self._close_beyond_half(shard.bytes)
        lease = self._dataset.hold(shard, self._stop)
        if lease is None and self._verifier is not None:  # the cache has checked what it lends
            self._verifier.require(number)
        path = lease.path if lease else self._dataset.shard_path(shard)
        mapped = self._split.open_shard(number, path)
        with self._lock:
            self._open[number] = (mapped, lease)
        if len(self._open) > self._most_open:
            self._close_coldest(remote_only=False)
        return mapped

    def groups(self, numbers: list[int]) -> Iterator[list[Any]]:
        """Shards in order, mapped, as many at a time as may be open; each group is to be dropped
        before the next is asked for, since a map keeps the disk's space of what was evicted."""
        group: list[Any] = []
        size = 0
        for number in numbers:
            more = self._split.shards[number].bytes if self._is_remote[number] else 0
            if group and (len(group) == self._most_open or not self._may_open(size + more)):
                yield group
                group, size = [], 0
            group.append(self.get(number))
            size += more
        yield group

    def _may_open(self, num_bytes: int) -> bool:
        return not self._dataset.is_remote or num_bytes <= self._dataset.cache.share_bytes // 2

    def are_here(self, numbers: list[int]) -> bool:
        """Whether shards are local, open, or were fetched ahead."""
        ahead = self._ahead
        return all(
            not self._is_remote[n] or n in self._open or (ahead is not None and ahead.has(n))
            for n in numbers
        )

    def begin(self, order: Any, plan: Any) -> None:
        """Fetch ahead along a plan; nothing where shards are local or it has begun."""
        if self._dataset.is_remote and self._ahead is None:
            self._stop.clear()
            cache = self._dataset.cache
            cache.holders[:0] = [self._close_coldest]
            steps = shards_of_steps(self._split, order, plan)
            self._ahead = ShardsAhead(self._dataset, self._split, steps)
            cache.holders.append(self._ahead.give_back)

    def reach(self, step: int) -> None:
        """The rows of a step are about to be read; shards of those before may go."""
        if self._ahead is not None:
            self._ahead.reach(step)
            self._dataset.cache.keep_to_share()

    def cancel(self) -> None:
        """Whoever waits for a shard raises Cancelled."""
        self._stop.set()

    def end(self) -> None:
        """The plan is done: remote shards may be evicted from here on."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            holders = self._dataset.cache.holders
            for one in (self._close_coldest, ahead.give_back):
                with suppress(ValueError):
                    holders.remove(one)
            ahead.close()
        # Also where there was no plan any more: a thread may have opened some meanwhile.
        while self._close_coldest():
            pass

    def _close_beyond_half(self, more_bytes: int) -> None:
        half = self._dataset.cache.share_bytes // 2
        while self._open_bytes() + more_bytes > half and self._close_coldest():
            pass

    def _open_bytes(self) -> int:
        with self._lock:
            shards = [self._split.shards[n] for n in list(self._open) if self._is_remote[n]]
            return sum(shard.bytes for shard in shards)

    def _close_coldest(self, remote_only: bool = True) -> bool:
        """Give one mapped shard back; False if there is none."""
        with self._lock:
            # A list is made in one step: a reader moves numbers without the lock.
            numbers = (n for n in list(self._open) if self._is_remote[n] or not remote_only)
            number = next(numbers, None)
            if number is None:
                return False
            _, lease = self._open.pop(number)
        # Whoever reads a row of it now, or is about to, keeps the map alive by a reference.
        if lease is not None:
            lease.release()
        return True


class ShardsAhead:
    """Fetches the shards of the next steps into the node's cache and pins them there.

    STEPS_AHEAD, or SHARDS_AHEAD where steps are small, if this process's share of the cache allows
    it; room for one shard is left to the reader.
    """

    def __init__(
        self, dataset: Dataset, split: SplitTable, steps: Iterator[tuple[int, list[int]]]
    ) -> None:
        self._dataset, self._split, self._steps = dataset, split, steps
        self._cache: NodeCache = dataset.cache
        self._is_remote = dataset.remote_shards(split)
        pairs = zip(split.shards, self._is_remote, strict=True)
        self._largest = max((shard.bytes for shard, remote in pairs if remote), default=0)
        self._pins: dict[int, Lease] = {}
        self._last_step: dict[int, int] = {}
        """Of each shard that was planned: the last step known to read it."""
        self._reached: int | None = None
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(FETCHES_AT_ONCE, "fetch-ahead")
        self._under_way: set[int] = set()
        self._thread = threading.Thread(target=self._run, name="plan-ahead", daemon=True)
        self._thread.start()

    def reach(self, step: int) -> None:
        """Let go of what only earlier steps needed."""
        with self._changed:
            self._reached = step
            over = [n for n, last in self._last_step.items() if last < step]
            leases = [self._pins.pop(n) for n in over if n in self._pins]
            for number in over:
                del self._last_step[number]
            self._changed.notify_all()
        for lease in leases:
            lease.release()

    def has(self, number: int) -> bool:
        """Whether a shard is pinned now."""
        return number in self._pins

    def give_back(self) -> bool:
        """Let go of the pin that is needed last; False if there is none."""
        with self._changed:
            if not self._pins:
                return False
            # A dict keeps the order in which they were planned; fetched they are in any order.
            number = next(n for n in reversed(self._last_step) if n in self._pins)
            lease = self._pins.pop(number)
        lease.release()
        return True

    def close(self) -> None:
        """Stop fetching and let go of everything."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._thread.join(timeout=2.0)
        while self.give_back():
            pass

    def _run(self) -> None:
        first: int | None = None
        for step, numbers in self._steps:
            first = step if first is None else first
            if not self._wait_until_near(step, first):
                return
            for number in numbers:
                if self._is_remote[number] and not self._wait_for_turn(step, first, number):
                    return
            if self._stop.is_set():
                return
        while not self._stop.wait(_LOOK_S):
            self._keep_to_share()

    def _wait_until_near(self, step: int, first: int) -> bool:
        """Wait until a step may be looked at; False after a stop. Where all its shards are local,
        or here, nothing else would hold this thread back from the end of the plan."""
        while not self._stop.is_set():
            with self._changed:
                ahead = step - self._at(first)
                few = len(self._last_step) < SHARDS_AHEAD
                if ahead <= STEPS_AHEAD or (few and ahead <= MOST_STEPS_AHEAD):
                    return True
                self._changed.wait(_LOOK_S)
            self._keep_to_share()
        return False

    def _keep_to_share(self) -> int:
        """Bytes of this process's share; 0 where the folder cannot be read just now (too many open
        files, say): this thread looks again, and who reads meets it too if it stays."""
        try:
            self._cache.keep_to_share()
            return self._cache.share_bytes
        except OSError:
            return 0

    def _wait_for_turn(self, step: int, first: int, number: int) -> bool:
        """Start to fetch a shard for a step as soon as it may be; False after a stop."""
        size = self._split.shards[number].bytes
        while not self._stop.is_set():
            with self._changed:
                if step < self._at(first):
                    return True
                if number in self._pins or number in self._under_way:
                    self._last_step[number] = step
                    return True
            # The share shrinks when another process comes, and the reader may sit in an all-reduce
            # with a rank that waits for room.
            share_bytes = self._keep_to_share()
            with self._changed:
                near = step <= self._at(first) + STEPS_AHEAD or len(self._last_step) < SHARDS_AHEAD
                if near and len(self._under_way) < FETCHES_AT_ONCE:
                    room = share_bytes - self._largest - size
                    if self._cache.held_bytes + self._begun_bytes() <= room:
                        self._under_way.add(number)
                        self._last_step[number] = step
                        break
                # Room may also come from other processes: look again now and then.
                self._changed.wait(_LOOK_S)
        else:
            return False
        try:
            self._pool.submit(self._fetch, number)
        except RuntimeError:  # closed meanwhile
            return False
        return True

    def _at(self, first: int) -> int:
        """The step that is read now; `first` before any is."""
        return self._reached if self._reached is not None else first

    def _begun_bytes(self) -> int:
        """What is about to be fetched and does not count as held yet."""
        shards = [self._split.shards[number] for number in self._under_way]
        return sum(one.bytes for one in shards if not self._cache.holds(one))

    def _fetch(self, number: int) -> None:
        lease: Lease | None = None
        # The reader meets the same failure, and it is the reader who raises it.
        try:
            with suppress(LeydenError, OSError):
                lease = self._dataset.hold(self._split.shards[number], self._stop)
        finally:
            with self._changed:
                self._under_way.discard(number)
                wanted = number in self._last_step and not self._stop.is_set()
                if lease is not None and wanted and number not in self._pins:
                    self._pins[number] = lease
                    lease = None
                self._changed.notify_all()
            if lease is not None:
                lease.release()
