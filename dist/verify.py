"""Is the data what its manifest says: presence at once, every byte before it is trained on."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dist.commit import missing_shards
from dist.dataset import Dataset, SplitTable
from dist.errors import DataRefused
from dist.local_files import write_atomic
from dist.manifest import Shard
from dist.progress import Progress
from dist.shard_file import bad_batches, file_digest

FULL_BELOW_BYTES = 10 << 30
"""Data smaller than this is hashed whole before training, unless the config says otherwise."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a full verification read."""

    shards: int
    bytes: int
    seconds: float


def check_presence(dataset: Dataset) -> None:
    """Manifest, tokenizer, and every shard's presence and size; DataRefused lists what is wrong."""
    problems = missing_shards(dataset.storage, dataset.manifest)
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise DataRefused(
            f"{dataset.reference[:-52]} is incomplete: {'; '.join(problems[:5])}{more}; copy it "
            "anew, or run the prep job again"
        )
    if dataset.manifest.tokenizer_digest is not None:
        dataset.read_tokenizer()


def wrong_bytes(path: Path, shard: Shard) -> str:
    """What is wrong with a shard file, '' if nothing is; names the damaged record batches."""
    found = file_digest(path)
    if found == shard.xxh3_128:
        return ""
    try:
        bad = bad_batches(path)
        where = f"record batches {bad[:8]}" if bad else "its schema or footer"
    except Exception:  # damage can make Arrow raise anything; the digest has already decided
        where = "it no longer opens as an Arrow file"
    return f"{path} has xxh3-128 {found}, the manifest says {shard.xxh3_128} (damaged: {where})"


def verify_full(dataset: Dataset, *, progress: bool = True) -> VerifyReport:
    """Hash every byte of every shard, on all cores; DataRefused names each damaged shard."""
    check_presence(dataset)
    started = time.monotonic()
    shards = dataset.manifest.shards
    total = sum(shard.bytes for shard in shards)
    problems: list[str] = []
    # Threads suffice: xxhash releases the interpreter lock.
    with (
        Progress("verify", total / 1e6, "MB", enabled=progress) as bar,
        concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
    ):
        jobs = {pool.submit(wrong_bytes, dataset.shard_path(s), s): s for s in shards}
        for job in concurrent.futures.as_completed(jobs):
            if job.result():
                problems.append(job.result())
            bar.update(jobs[job].bytes / 1e6)
    if problems:
        raise DataRefused(
            f"{len(problems)} of {len(shards)} shards are damaged: {'; '.join(sorted(problems))}; "
            "copy them anew, or run the prep job again"
        )
    return VerifyReport(shards=len(shards), bytes=total, seconds=time.monotonic() - started)


class ShardVerifier:
    """Hashes shards in place ahead of their use; what was hashed on this machine is stamped.

    A stamp holds (digest, inode, mtime, size): a file that changed since is hashed again.
    """

    def __init__(self, dataset: Dataset, split: SplitTable, stamps: Path) -> None:
        self._dataset, self._shards, self._stamps = dataset, split.shards, stamps
        self._checked: set[int] = set()
        self._locks: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, planned: Iterable[int]) -> None:
        """Hash shards in this order in the background; damage is raised by require()."""
        self._thread = threading.Thread(
            target=self._run, args=(planned,), name="verify-ahead", daemon=True
        )
        self._thread.start()

    def require(self, index: int) -> None:
        """Return once this shard's bytes are known to be right, or raise DataRefused."""
        if index in self._checked:
            return
        with self._lock:
            lock = self._locks.setdefault(index, threading.Lock())
        with lock:
            if index not in self._checked:
                self._check(index)

    def close(self) -> None:
        """Stop hashing ahead."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, planned: Iterable[int]) -> None:
        for index in planned:
            if self._stop.is_set():
                return
            try:
                self.require(index)
            except (DataRefused, OSError):
                continue  # require() finds it again, in the thread that would train on it

    def _check(self, index: int) -> None:
        shard = self._shards[index]
        path = self._dataset.shard_path(shard)
        stamp = self._stamps / f"{_name(path)}.json"
        facts = _facts(path, shard)
        if not _stamped(stamp, facts):
            problem = wrong_bytes(path, shard)
            if problem:
                raise DataRefused(f"{problem}; copy it anew, or run the prep job again")
            # A file that changed while it was read gets no stamp.
            if _facts(path, shard) == facts:
                with suppress(OSError):  # a full disk: it is hashed again next time
                    write_atomic(stamp, json.dumps(facts).encode())
        self._checked.add(index)


def _name(path: Path) -> str:
    return hashlib.blake2b(os.fsencode(path.absolute()), digest_size=16).hexdigest()


def _facts(path: Path, shard: Shard) -> dict[str, int | str]:
    stat = path.stat()
    return {
        "digest": shard.xxh3_128,
        "inode": stat.st_ino,
        "mtime_ns": stat.st_mtime_ns,
        "size": stat.st_size,
    }


def _stamped(stamp: Path, facts: dict[str, int | str]) -> bool:
    try:
        return bool(json.loads(stamp.read_bytes()) == facts)
    except (OSError, ValueError):
        return False
