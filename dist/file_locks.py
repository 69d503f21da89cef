"""Locks between processes of a node: flock on files, gone with the process that held them.

Each lock has an open file description of its own, so threads of a process exclude each other too.
A lock is dropped by closing it: unlocking would also drop it for a process forked meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_S = (0.001, 0.05)


def try_lock(path: Path, *, shared: bool = False) -> int | None:
    """A handle that holds the lock until os.close(); None while another holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except BaseException:
        os.close(handle)
        raise
    return handle


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock exclusively; for work of milliseconds, as the wait has no end."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def is_locked(path: Path) -> bool:
    """Whether any process holds the lock now, shared or not."""
    handle = try_lock(path)
    if handle is None:
        return True
    os.close(handle)
    return False


class Polling:
    """Pauses between tries, longer and longer up to 50 ms; a stop ends them."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop, self._pause_s = stop, _POLL_S[0]

    def wait(self) -> bool:
        """Pause; False once a stop is asked for."""
        stopped = self._stop.wait(self._pause_s * random.uniform(0.5, 1.0))
        self._pause_s = min(_POLL_S[1], self._pause_s * 1.5)
        return not stopped


class Slots:
    """At most `count` holders at a time among all processes that use this folder."""

    def __init__(self, folder: Path, count: int) -> None:
        self._paths = [folder / f"slot-{number}.lock" for number in range(count)]

    @contextmanager
    def one(self, stop: threading.Event) -> Iterator[None]:
        """Hold a slot; TimeoutError if a stop is asked for first."""
        polling = Polling(stop)
        while (handle := self._take()) is None:
            if not polling.wait():
                raise TimeoutError("stopped")
        try:
            yield
        finally:
            os.close(handle)

    def _take(self) -> int | None:
        first = random.randrange(len(self._paths))
        for path in self._paths[first:] + self._paths[:first]:
            if (handle := try_lock(path)) is not None:
                return handle
        return None


class Members:
    """How many live processes use a folder: one locked file each."""

    COUNTED_FOR_S = 1.0

    def __init__(self, folder: Path, guard: Path) -> None:
        """`guard`: the lock under which files come and go."""
        self._folder, self._guard = folder, guard
        self._own = folder / f"member-{os.getpid()}-{random.randrange(1 << 32):08x}.lock"
        with locked(guard):
            self._handle = try_lock(self._own)
        self._count, self._counted_at = 0, 0.0

    def count(self) -> int:
        """Live members, this one among them; at most a second old."""
        if time.monotonic() - self._counted_at > self.COUNTED_FOR_S:
            with locked(self._guard):
                others = [one for one in self._folder.glob("member-*.lock") if one != self._own]
                live = [path for path in others if is_locked(path)]
                for path in set(others) - set(live):
                    path.unlink(missing_ok=True)
            self._count, self._counted_at = 1 + len(live), time.monotonic()
        return self._count

    def leave(self) -> None:
        """Be counted no more."""
        if self._handle is not None:
            self._own.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None
