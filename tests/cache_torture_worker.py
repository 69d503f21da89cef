"""One process of tests/cache_torture.py: it reads shards and checks their bytes until killed."""

from __future__ import annotations

import faulthandler
import mmap
import random
import signal
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dist import transfer
from dist.cache import CacheConfig, Lease, NodeCache
from dist.dataset import Dataset
from dist.errors import DataRefused, SetupError
from dist.http_files import HttpFiles
from dist.manifest import Shard
from dist.open_shards import ShardsAhead
from dist.split_table import SplitTable
from dist.storage import Storage

COLUMNS = (
    *("progress_ms", "reads", "read_bytes", "planned", "rechecks", "fetched"),
    *("fetched_bytes", "found", "hashed_again", "refused", "retries", "evicted", "given_up"),
    "found_damaged",
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a worker needs to know; `row` is its own line of the table of counts."""

    folder: str
    limit_bytes: int
    sources: tuple[tuple[str, tuple[Shard, ...]], ...]
    """(url, shards) of each dataset."""
    table: str
    rows: int
    row: int
    failures: str
    seed: int
    may_vanish: bool


def work(one: Work) -> None:
    """Read until killed; an error that the cache must not give is written to `failures`."""
    faulthandler.register(signal.SIGUSR1)
    HttpFiles.timeout_s = 1.0
    transfer.RETRIES = transfer.Retries(tries=8, first_pause_s=0.01, longest_pause_s=0.2)
    try:
        Worker(one).run()
    except BaseException:
        Path(one.failures, f"{one.row}.txt").write_text(traceback.format_exc())
        raise


class Worker:
    """A process of a run: it maps shards, gives them back, and is never wrong about a byte."""

    def __init__(self, one: Work) -> None:
        self._one, self._rng = one, random.Random(one.seed)
        config = CacheConfig(folder=one.folder, limit_gb=one.limit_bytes / 1e9)
        manifest: Any = None  # nothing here asks for it
        self._datasets = [
            Dataset(storage=Storage(url), manifest=manifest, data_digest="", cache_config=config)
            for url, _ in one.sources
        ]
        self._cache: NodeCache = self._datasets[0].cache
        shape = (one.rows, len(COLUMNS))
        self._counts = np.memmap(one.table, np.int64, "r+", shape=shape)[one.row]
        self._open: list[tuple[Shard, Lease, mmap.mmap]] = []
        self._lock = threading.Lock()

    def run(self) -> None:
        self._cache.holders.append(self._give)
        self._note()
        while True:
            number = self._rng.randrange(len(self._datasets))
            shards = self._one.sources[number][1]
            try:
                if self._rng.random() < 0.3:
                    self._follow_a_plan(self._datasets[number], shards)
                else:
                    for _ in range(20):
                        self._read(self._datasets[number], self._rng.choice(shards))
            except (DataRefused, SetupError) as error:
                # A server that was bad eight times, or wrong twice; all else is a fault of ours.
                said = str(error)
                if "fetched twice" not in said and "cannot be read after" not in said and (
                    "is shorter than" not in said
                ):  # fmt: skip
                    raise
                self._count("given_up")

    def _read(self, dataset: Dataset, shard: Shard) -> None:
        what = self._rng.random()
        if what < 0.1:
            self._count("rechecks")
            self._count("found_damaged", bool(self._cache.recheck(shard)))
        self._keep(shard, self._cache.acquire(dataset.storage, shard))
        self._cache.keep_to_share()
        while len(self._open) > self._rng.randrange(4):
            self._give()
        if what < 0.5:
            time.sleep(self._rng.random() * 0.02)

    def _follow_a_plan(self, dataset: Dataset, shards: tuple[Shard, ...]) -> None:
        """As a loader does it, some steps of an epoch."""
        while self._give():
            pass
        order = self._rng.sample(range(len(shards)), min(len(shards), 12))
        steps = [(step, order[step // 2 : step // 2 + 2]) for step in range(2 * len(order) - 2)]
        rows = np.arange(len(shards) + 1)
        split = SplitTable(name="train", shards=shards, row_start=rows)
        ahead = ShardsAhead(dataset, split, iter(steps))
        self._cache.holders.append(ahead.give_back)
        try:
            for step, numbers in steps[: self._rng.randrange(1, len(steps))]:
                ahead.reach(step)
                for number in numbers:
                    lease = dataset.hold(shards[number])
                    assert lease is not None
                    self._count("planned")
                    self._keep(shards[number], lease)
                    self._give()
                time.sleep(self._rng.random() * 0.01)
        finally:
            self._cache.holders.remove(ahead.give_back)
            ahead.close()

    def _keep(self, shard: Shard, lease: Lease) -> None:
        try:
            with open(lease.path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            assert self._one.may_vanish, f"{lease.path} was evicted while it was held"
            return lease.release()
        self._check(shard, mapped)
        with self._lock:
            self._open.append((shard, lease, mapped))
        self._note()

    def _give(self) -> bool:
        with self._lock:
            if not self._open:
                return False
            shard, lease, mapped = self._open.pop(0)
        # What is held stays at its name, with its bytes, to the end.
        self._check(shard, mapped)
        there = lease.path.exists() or self._one.may_vanish
        assert there, f"{lease.path} was evicted while it was held"
        mapped.close()
        lease.release()
        return True

    def _check(self, shard: Shard, mapped: mmap.mmap) -> None:
        found = xxhash.xxh3_128_hexdigest(mapped)
        assert found == shard.xxh3_128, f"wrong bytes delivered: {shard.name} has {found}"
        self._count("reads")
        self._count("read_bytes", shard.bytes)

    def _count(self, name: str, more: int = 1) -> None:
        self._counts[COLUMNS.index(name)] += more

    def _note(self) -> None:
        counts = self._cache.counts
        for name in ("fetched", "fetched_bytes", "found", "hashed_again", "refused", "retries"):
            self._counts[COLUMNS.index(name)] = getattr(counts, name)
        self._counts[COLUMNS.index("evicted")] = self._cache.folder.evicted
        self._counts[COLUMNS.index("progress_ms")] = time.monotonic_ns() // 1_000_000
