"""Torture of the node's cache: processes that read, a server that lies, signals at random.

    nice -n 15 python -m tests.cache_torture --seconds 120 --seed 1

Some processes read shards of two datasets, which share some, from a web server that refuses, cuts,
delays and flips, through a cache of a few shards. They are killed, stopped and continued at
random; shards that lie in the cache are touched, copied, damaged and deleted. Oracles: every byte
is right, nothing held is evicted, the folder never exceeds its limit, every process gets on, and
once all are dead the next start works at once and finds nothing in its way.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dist.cache import NodeCache
from dist.cache_folder import CacheFolder
from dist.file_locks import drop_lock, try_lock
from dist.manifest import Shard
from dist.storage import Storage
from tests.cache_torture_worker import COLUMNS, Work, work
from tests.http_server import FolderServer, Request, serve
from tests.remote_shards import make_shards, process

ROWS = 20_000


@dataclass(frozen=True, kw_only=True)
class Torture:
    """One run of it."""

    seconds: float = 10.0
    seed: int = 0
    processes: int = 4
    shards: int = 24
    """Of each of two datasets; a third of them are the same."""
    size: int = 100_000
    fits: int = 7
    """Shards that the cache may hold."""
    kills_per_s: float = 3.0
    stops_per_s: float = 1.0
    damages_per_s: float = 3.0
    in_use: bool = False
    """Delete shards in use too; then what is held may vanish."""
    faults: float = 0.15
    """Share of requests that the server fails."""
    stuck_s: float = 45.0
    """A process that reads nothing for so long, though it is not stopped, hangs."""


@dataclass
class Findings:
    """What happened, and what must not."""

    problems: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, name: str, more: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + more


def torture(one: Torture, folder: Path) -> Findings:
    """Run it in an empty folder; what it finds is also what the caller has to judge."""
    found = Findings()
    (folder / "failures").mkdir(parents=True)
    shared = make_shards(folder / "both", one.shards // 3, one.size, seed=1)
    sources = []
    for number, name in enumerate("ab"):
        own = make_shards(folder / name, one.shards - len(shared), one.size, seed=2 + number)
        shutil.copytree(folder / "both" / "shards", folder / name / "shards", dirs_exist_ok=True)
        sources.append((name, (*shared, *own)))
    with serve(folder) as server:
        process(os.getpid).join()  # the server of processes takes seconds to start
        server.fault = _faults(random.Random(one.seed), one.faults, found)
        given = tuple((f"{server.url}/{name}", shards) for name, shards in sources)
        run = _Run(one, folder, given, found)
        run.until_the_end()
        server.fault = lambda _: None
        _start_after_death(folder / "cache", run.limit_bytes, given, found)
        _add_up(folder, server, found)
    return found


def _faults(rng: random.Random, share: float, found: Findings) -> Any:
    kinds = ("503", "429", "cut", "flip", "flip", "late", "slow")

    def fault(request: Request) -> str | None:
        if request.number == 0 or rng.random() > share:
            return None
        kind = rng.choice(kinds)
        found.count(f"server: {kind}")
        if kind == "late":
            time.sleep(rng.random() * 1.5)
            return None
        return kind

    return fault


class _Run:
    """The processes, and who disturbs and watches them."""

    def __init__(self, one: Torture, folder: Path, sources: Any, found: Findings) -> None:
        self._one, self._folder, self._sources, self._found = one, folder, sources, found
        self._cache = folder / "cache"
        self._rng = random.Random(one.seed + 1)
        largest = max(shard.bytes for _, shards in sources for shard in shards)
        self.limit_bytes = one.fits * largest + 1
        self._table = folder / "counts"
        shape = (ROWS, len(COLUMNS))
        self._counts = np.memmap(self._table, np.int64, "w+", shape=shape)
        self._live: dict[int, Any] = {}
        self._stopped: dict[int, float] = {}
        self._born: dict[int, float] = {}
        self._rows = 0

    def until_the_end(self) -> None:
        began, tick_s = time.monotonic(), 0.02
        while time.monotonic() - began < self._one.seconds and not self._found.problems:
            while len(self._live) < self._one.processes:
                self._start()
            self._disturb(tick_s)
            self._watch()
            time.sleep(tick_s)
        for row in list(self._live):
            self._kill(row)

    def _start(self) -> None:
        row, self._rows = self._rows, self._rows + 1
        given = Work(
            folder=str(self._cache), limit_bytes=self.limit_bytes, sources=self._sources,
            table=str(self._table), rows=ROWS, row=row, failures=str(self._folder / "failures"),
            seed=self._rng.randrange(1 << 60), may_vanish=self._one.in_use,
        )  # fmt: skip
        self._live[row], self._born[row] = process(work, given), time.monotonic()
        self._found.count("processes")

    def _kill(self, row: int) -> None:
        self._stopped.pop(row, None)
        killed = self._live.pop(row)
        killed.kill()
        killed.join()
        self._found.count("kills")

    def _disturb(self, tick_s: float) -> None:
        now, rng, one = time.monotonic(), self._rng, self._one
        for row in [row for row, until in self._stopped.items() if now > until]:
            del self._stopped[row]
            os.kill(self._live[row].pid, signal.SIGCONT)
        if rng.random() < one.kills_per_s * tick_s:
            self._kill(rng.choice(list(self._live)))
        if rng.random() < one.stops_per_s * tick_s and len(self._stopped) < len(self._live) - 1:
            row = rng.choice(list(self._live))
            os.kill(self._live[row].pid, signal.SIGSTOP)
            self._stopped[row] = now + rng.random() * 2.0
            self._found.count("stops")
        if rng.random() < one.damages_per_s * tick_s:
            _damage(rng, self._cache, self._folder / "copy", self._found, one.in_use)

    def _watch(self) -> None:
        used = _used_bytes(self._cache)
        self._found.counts["most bytes"] = max(self._found.counts.get("most bytes", 0), used)
        if used > self.limit_bytes:
            self._found.problems.append(f"{used} bytes of at most {self.limit_bytes}")
        self._found.problems += [
            path.read_text() for path in self._folder.glob("failures/*") if path.stat().st_size
        ]
        for row, one in self._live.items():
            if row in self._stopped:
                self._born[row] = time.monotonic()
                continue
            if one.exitcode is not None:
                self._found.problems.append(f"process {row} ended by itself: {one.exitcode}")
            last = max(self._born[row], int(self._counts[row][0]) / 1000)
            waited_s = time.monotonic() - last
            self._found.counts["longest wait ms"] = max(
                self._found.counts.get("longest wait ms", 0), int(1000 * waited_s)
            )
            if waited_s > self._one.stuck_s:
                os.kill(one.pid, signal.SIGUSR1)  # says on stderr where it is
                self._found.problems.append(f"process {row} has read nothing for {waited_s:.0f} s")


def _used_bytes(cache: Path) -> int:
    used = 0
    with suppress(FileNotFoundError):
        for entry in os.scandir(cache):
            if entry.name.endswith((".arrow", ".part")):
                with suppress(FileNotFoundError):
                    used += entry.stat().st_size
    return used


def _damage(rng: random.Random, cache: Path, copy: Path, found: Findings, in_use: bool) -> None:
    """Do to one of the shards what people, backups and disks do to files."""
    paths = sorted(cache.glob("*.arrow"))
    if not paths:
        return
    path = rng.choice(paths)
    kinds = ("touch", "copy", "flip", "delete", "cut")
    kind = rng.choice((*kinds, "delete in use", "delete in use") if in_use else kinds)
    # Under a map nobody could tell of damage; and without a lock a copy could bring back a shard
    # that was evicted, which no limit holds.
    lock = try_lock(path.with_suffix(".lock"), shared=kind in ("touch", "copy", "delete in use"))
    if lock is None:
        return
    with suppress(FileNotFoundError):
        if kind == "touch":
            os.utime(path)
        elif kind.startswith("delete"):
            path.unlink()
        else:
            data = bytearray(path.read_bytes())
            if kind == "flip":
                data[rng.randrange(len(data))] ^= 1
            elif kind == "cut":
                del data[rng.randrange(len(data)) :]
            copy.write_bytes(data)
            if path.exists():
                os.replace(copy, path)
        found.count(f"cache: {kind}")
    drop_lock(lock)


def _start_after_death(cache: Path, limit_bytes: int, sources: Any, found: Findings) -> None:
    """All are dead: the next start works at once, and what it trusts is right."""
    began = time.monotonic()
    next_one = NodeCache(cache, limit_bytes)
    if (members := next_one.folder.members.count()) != 1:
        found.problems.append(f"{members} members after all were killed")
    left = sorted(path.name for path in cache.iterdir() if not _belongs(path))
    if left:
        found.problems.append(f"left behind: {left[:10]} of {len(left)}")
    for url, shards in sources:
        for shard in shards:
            _check_start(next_one.folder, shard, found)
        with next_one.acquire(Storage(url), shards[-1]) as lease:
            if xxhash.xxh3_128_hexdigest(lease.path.read_bytes()) != shards[-1].xxh3_128:
                found.problems.append(f"the next start delivers wrong bytes of {shards[-1].name}")
    found.counts["next start ms"] = int(1000 * (time.monotonic() - began))
    next_one.close()
    if found.counts["next start ms"] > 5000:
        found.problems.append("the next start took more than 5 s")


def _belongs(path: Path) -> bool:
    """A shard with its stamp and lock, and the few locks of the folder itself."""
    if path.name == "space.lock" or path.name.startswith(("slot-", "member-")):
        return True
    return path.suffix in (".arrow", ".stamp", ".lock") and path.with_suffix(".arrow").exists()


def _check_start(folder: CacheFolder, shard: Shard, found: Findings) -> None:
    if folder.is_trusted(shard):
        found.count("trusted at the next start")
        if xxhash.xxh3_128_hexdigest(folder.file(shard, "arrow").read_bytes()) != shard.xxh3_128:
            found.problems.append(f"{shard.name} is trusted and wrong")


def _add_up(folder: Path, server: FolderServer, found: Findings) -> None:
    shape = (ROWS, len(COLUMNS))
    totals = np.memmap(folder / "counts", np.int64, "r", shape=shape).sum(axis=0)
    for name, total in zip(COLUMNS[1:], totals[1:].tolist(), strict=True):
        found.counts[name] = total
    found.counts["requests"] = len(server.gets)


def main(argv: list[str]) -> int:
    """Run it once for each seed; prints the counts as JSON, 1 where an oracle was broken."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    for name, default in asdict(Torture()).items():
        kind = int if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default)
    given = Torture(**vars(parser.parse_args(argv)))
    folder = Path(tempfile.mkdtemp(prefix="leyden-torture-"))
    try:
        found = torture(given, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"given": asdict(given), "counts": dict(sorted(found.counts.items()))}))
    for problem in found.problems:
        print(f"PROBLEM: {problem}", file=sys.stderr)
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
