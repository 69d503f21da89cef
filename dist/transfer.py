"""Bytes from a store that fails now and then: retries, ranges side by side, errors by kind."""

from __future__ import annotations

import concurrent.futures
import errno
import functools
import random
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

from dist.errors import DataRefused, LeydenError, SetupError
from dist.http_files import HttpError, ShortRead
from dist.local_files import HugePageWriter
from dist.storage import Storage

T = TypeVar("T")

PART_BYTES = 8 << 20
PARTS_AT_ONCE = 4
REQUESTS_AT_ONCE = 16
"""Requests under way at a time, of all processes of a node that share a cache."""
_SHORT_TRIES = 3
_JITTER = random.SystemRandom()
"""Not the program's own numbers: those are seeded, on all ranks alike."""
UNTESTED = ("gs", "gcs", "hdfs", "abfs", "az", "adl", "webhdfs", "sftp", "ftp")


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How often and how patiently a request is given again: about half a minute in all."""

    tries: int = 8
    first_pause_s: float = 0.25
    longest_pause_s: float = 10.0

    def pause_s(self, failed: int) -> float:
        """After `failed` tries, between half of it and all of it, so that ranks spread out."""
        doubled = self.first_pause_s * 2.0 ** min(failed - 1, 30)
        return min(self.longest_pause_s, doubled) * _JITTER.uniform(0.5, 1.0)


RETRIES = Retries()


class Cancelled(LeydenError):
    """A download was given up because nobody waits for it any more."""


class _NotWritten(Exception):
    """The local file could not be written: no reason to ask the store again."""


def untested_note(url: str) -> str:
    """What to say of a store that fsspec knows and we have never tried; '' for the others."""
    scheme = url.partition("://")[0] if "://" in url else ""
    if scheme not in UNTESTED:
        return ""
    return f"note: {scheme}:// is read through fsspec; Leyden was never tried with it"


def retried(
    read: Callable[[], T], url: str, *, retries: Retries | None = None,
    stop: threading.Event | None = None, on_retry: Callable[[], None] = lambda: None,
) -> T:  # fmt: skip
    """What `read` returns, tried again after failures that may pass.

    Raises FileNotFoundError as it comes, DataRefused for a file that stays too short, SetupError
    for a store that refuses or cannot be reached, Cancelled after `stop`.
    """
    retries, stop = retries or RETRIES, stop or threading.Event()
    failed = shorts = 0
    while True:
        if stop.is_set():
            raise Cancelled(f"reading {url} was given up")
        try:
            return read()
        except (FileNotFoundError, LeydenError, _NotWritten):
            raise
        except Exception as error:  # each store has its own kinds
            failed += 1
            last = failed >= retries.tries
            shorts = shorts + 1 if is_short(error) else 0
            if shorts >= min(_SHORT_TRIES, retries.tries):
                raise DataRefused(
                    f"{url} is shorter than the manifest says: {_said(error)}; copy it anew"
                ) from error
            if (final := _refusal(error, url)) is not None:
                raise final from error
            if last:
                raise SetupError(
                    f"{url} cannot be read after {failed} tries: {_said(error)}; check the "
                    "network, the address and the credentials, then give the same command again"
                ) from error
        on_retry()
        stop.wait(retries.pause_s(failed))


def read_small(storage: Storage, name: str) -> bytes:
    """A small file; from a store, with retries and errors that say what to do."""
    if storage.is_local:
        return storage.read(name)
    return retried(functools.partial(storage.read, name), f"{storage.url}/{name}")


def fetch_file(
    storage: Storage, name: str, size: int, handle: int, *,
    slot: Callable[[], AbstractContextManager[None]] = nullcontext,
    stop: threading.Event | None = None, on_retry: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Write bytes [0, size) of a stored file to an open local one, parts of 8 MiB side by side.

    `slot` bounds the requests of all processes; a part that fails is fetched again alone. OSError
    where the local file cannot be written.
    """
    given_up = stop or threading.Event()
    url = f"{storage.url}/{name}"

    def part(start: int) -> None:
        end = min(size, start + PART_BYTES)

        def copy() -> None:
            writer, came = HugePageWriter(handle, start), 0

            def take(data: bytes) -> None:
                nonlocal came
                if given_up.is_set():  # or a process that ends waits for bytes that nobody wants
                    raise Cancelled(f"reading {url} was given up")
                came += len(data)
                _written(lambda: writer.write(data))

            with slot():
                storage.copy_range(name, start, end, take)
            if came != end - start:
                raise ShortRead(errno.EIO, f"{came} bytes came from {start} to {end}")
            _written(writer.flush)

        try:
            retried(copy, url, stop=given_up, on_retry=on_retry)
        except _NotWritten as failed:
            assert failed.__cause__ is not None
            raise failed.__cause__ from None

    starts = range(0, size, PART_BYTES)
    if len(starts) <= 1:
        part(0)
        return
    with concurrent.futures.ThreadPoolExecutor(min(PARTS_AT_ONCE, len(starts))) as pool:
        jobs = [pool.submit(part, start) for start in starts]
        try:
            for job in concurrent.futures.as_completed(jobs):
                job.result()
        except BaseException:
            for job in jobs:
                job.cancel()
            raise


def _written(write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise _NotWritten from error


def is_short(error: BaseException) -> bool:
    """Whether the file ends before the range that was asked for (S3 says InvalidRange)."""
    if isinstance(error, ShortRead):
        return True
    return isinstance(error, OSError) and "range" in str(error).lower() and (
        error.errno == errno.EINVAL
    )  # fmt: skip


def _refusal(error: Exception, url: str) -> LeydenError | None:
    """The error of a failure that would come again; None for one that may pass."""
    if isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
        return SetupError(
            f"no permission to read {url}: {_said(error)}; check the credentials and the bucket's "
            "policy"
        )
    if (
        isinstance(error, HttpError)
        and error.status < 500  # a redirect that leads nowhere and a wrong range among them
        and error.status not in (408, 429)
    ):
        return SetupError(f"{url} cannot be read: {_said(error)}; check the address")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return SetupError(f"{url} cannot be read: {_said(error)}")
    return None


def _said(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or repr(error)
