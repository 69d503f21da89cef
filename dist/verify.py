"""Is the data what its manifest says: presence at once, every byte before it is trained on."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from dist.batch_hashes import damaged_batches
from dist.commit import missing_files
from dist.dataset import Dataset, MixedDataset
from dist.errors import DataRefused
from dist.local_files import write_atomic
from dist.manifest import Shard
from dist.progress import Progress
from dist.shard_file import file_digest
from dist.split_table import SplitTable
from dist.stamps import file_facts, is_stamped
from dist.transfer import PART_BYTES, retried

FULL_BELOW_BYTES = 10 << 30
"""Data smaller than this is hashed whole before training, unless the config says otherwise."""
STREAMS = 8
"""Shards of a remote dataset that are read at the same time."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a full verification read."""

    shards: int
    bytes: int
    seconds: float


def check_presence(dataset: Dataset) -> None:
    """Tokenizer, lengths, and every shard's presence and size; DataRefused lists what is wrong."""
    if isinstance(dataset, MixedDataset):
        for part in dataset.parts:
            check_presence(part)
        return
    problems = missing_files(dataset.storage, dataset.manifest)
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise DataRefused(
            f"{dataset.reference[:-52]} is incomplete: {'; '.join(problems[:5])}{more}; copy it "
            "anew, or run the prep job again"
        )
    if dataset.manifest.tokenizer_digest is not None:
        dataset.read_tokenizer()
    dataset.read_lengths()


def wrong_bytes(path: Path, shard: Shard, found: str = "") -> str:
    """What is wrong with a shard file, '' if nothing is; names the damaged record batches.

    found: its xxh3-128, if it was computed already.
    """
    found = found or file_digest(path)
    if found == shard.xxh3_128:
        return ""
    try:
        bad = damaged_batches(path)
        where = f"record batches {bad[:8]}" if bad else "its schema or footer"
    except Exception:  # damage can make Arrow raise anything; the digest has already decided
        where = "it no longer opens as an Arrow file"
    return f"{path} has xxh3-128 {found}, the manifest says {shard.xxh3_128} (damaged: {where})"


def verify_full(dataset: Dataset, *, progress: bool = True) -> VerifyReport:
    """Hash every byte of every shard, on all cores; DataRefused names each damaged shard.

    A remote dataset is streamed and nothing of it is kept. A mixture is its datasets, one by one.
    """
    if isinstance(dataset, MixedDataset):
        parts = [verify_full(part, progress=progress) for part in dataset.parts]
        return VerifyReport(
            shards=sum(part.shards for part in parts), bytes=sum(part.bytes for part in parts),
            seconds=sum(part.seconds for part in parts),
        )  # fmt: skip
    check_presence(dataset)
    if dataset.is_remote:  # the cache's copy says nothing of the file at the URL
        dataset.read_lengths(fresh=True)
    started = time.monotonic()
    shards = dataset.manifest.shards
    total = sum(shard.bytes for shard in shards)
    problems: list[str] = []
    threads = STREAMS if dataset.is_remote else min(16, os.cpu_count() or 1)
    lock = threading.Lock()
    # Threads suffice: xxhash releases the interpreter lock.
    with (
        Progress("verify", total / 1e6, "MB", enabled=progress) as bar,
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
    ):

        def check(shard: Shard) -> None:
            problem = _problem(dataset, shard, tick)
            if problem:
                with lock:
                    problems.append(problem)
                    bar.update(0, f"{len(problems)} damaged")

        def tick(num_bytes: int) -> None:
            with lock:
                bar.update(num_bytes / 1e6)

        jobs = [pool.submit(check, shard) for shard in shards]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # Ctrl-C: not the rest of a terabyte first
            raise
    if problems:
        listed = "".join(f"\n  {one}" for one in sorted(problems))
        raise DataRefused(
            f"{len(problems)} of {len(shards)} shards are damaged:{listed}\n"
            "copy them anew, or run the prep job again"
        )
    return VerifyReport(shards=len(shards), bytes=total, seconds=time.monotonic() - started)


def _problem(dataset: Dataset, shard: Shard, tick: Callable[[int], None]) -> str:
    """What is wrong with a shard's bytes; '' if nothing is.

    A remote one is read at its URL and nothing of it kept; a damaged copy of it is deleted from
    the cache.
    """
    name = f"shards/{shard.name}"
    path = dataset.storage.local_path(name)
    url = f"{dataset.storage.url}/{name}"
    digest = xxhash.xxh3_128()
    try:
        for chunk in dataset.storage.chunks(name) if path is not None else _parts(dataset, shard):
            digest.update(chunk)
            tick(len(chunk))
    except FileNotFoundError:
        return f"{url} is missing"
    except DataRefused as error:
        return str(error)
    found = digest.hexdigest()
    if path is not None:
        return "" if found == shard.xxh3_128 else wrong_bytes(path, shard, found)
    if found != shard.xxh3_128:
        return f"{url} has xxh3-128 {found}, the manifest says {shard.xxh3_128}"
    return dataset.cache.recheck(shard)


def _parts(dataset: Dataset, shard: Shard) -> Iterator[bytes]:
    """A remote shard's bytes, by ranges, with retries."""
    name = f"shards/{shard.name}"
    for start in range(0, shard.bytes, PART_BYTES):
        end = min(shard.bytes, start + PART_BYTES)
        read = functools.partial(dataset.storage.read_range, name, start, end)
        yield retried(read, f"{dataset.storage.url}/{name}")


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
        stamp = self._stamps / f"{stamp_name(path)}.json"
        facts = file_facts(path, shard.xxh3_128)
        if not is_stamped(stamp, facts):
            problem = wrong_bytes(path, shard)
            if problem:
                raise DataRefused(f"{problem}; copy it anew, or run the prep job again")
            # A file that changed while it was read gets no stamp.
            if file_facts(path, shard.xxh3_128) == facts:
                with suppress(OSError):  # a full disk: it is hashed again next time
                    write_atomic(stamp, json.dumps(facts).encode())
        self._checked.add(index)


def stamp_name(path: Path) -> str:
    """What the stamp of a file at this path is called."""
    return hashlib.blake2b(os.fsencode(path.absolute()), digest_size=16).hexdigest()
