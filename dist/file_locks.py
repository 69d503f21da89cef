"""Locks between processes of a node: flock on files, gone with the process that held them.

Each lock has an open file description of its own, so threads of a process exclude each other too.
The file of a lock may be deleted by whoever holds it exclusively: a lock counts only while the
file that was locked still lies at its name. A forked process gives up at once what it inherits.
"""

from __future__ import annotations

import fcntl
import functools
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_POLL_S = (0.001, 0.05)
LOCKED_TOLD_AFTER_S = 10.0
# Not the module's own generator: users seed it, alike on all ranks, and expect it undisturbed.
_RANDOM = random.SystemRandom()
_OPEN: set[int] = set()
_GUARD = threading.Lock()
"""Held while a lock is taken or dropped, and so while no process is forked."""


def try_lock(path: Path, *, shared: bool = False) -> int | None:
    """A handle that holds the lock until drop_lock(); None while another holds it."""
    _forget_in_forked_processes()
    with _GUARD:
        while True:
            handle = _open(path)
            try:
                fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                if lies_at(handle, path):
                    _OPEN.add(handle)
                    return handle
            except BlockingIOError:
                os.close(handle)
                return None
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # deleted between the two calls


def drop_lock(handle: int) -> None:
    """Let another have it; nothing in a process forked since, which has given it up already."""
    with _GUARD:
        if handle in _OPEN:
            _OPEN.remove(handle)
            os.close(handle)


def share_lock(handle: int) -> bool:
    """Turn an exclusive lock into a shared one; if another came in between, it is dropped: False"""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:  # nothing on Linux comes in between, but flock(2) does not promise it
        drop_lock(handle)
        return False
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock exclusively, for work of milliseconds; says who is in the way for seconds."""
    began, told, polling = time.monotonic(), False, Polling(threading.Event(), longest_s=0.005)
    while (handle := try_lock(path)) is None:
        if not told and time.monotonic() - began > LOCKED_TOLD_AFTER_S:
            told = True
            print(
                f"waiting for {path}, which {who_holds(path)} holds; if that process is stopped, "
                "let it go on (kill -CONT) or end it",
                file=sys.stderr,
            )
        polling.wait()
    try:
        yield
    finally:
        drop_lock(handle)


def is_locked(path: Path) -> bool:
    """Whether any process holds the lock now, shared or not."""
    handle = try_lock(path)
    if handle is None:
        return True
    drop_lock(handle)
    return False


def who_holds(path: Path) -> str:
    """The processes that hold a lock, for a person."""
    pids = []
    with suppress(OSError):
        inode = path.stat().st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()  # 1: FLOCK ADVISORY WRITE pid major:minor:inode start end
            if words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode):
                pids.append(words[4])
    return f"process {', '.join(pids)}" if pids else "another process"


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:  # somebody deleted the folder
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        # Another user's, and a lock needs no more than reading.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def lies_at(handle: int, path: Path) -> bool:
    """Whether the file that was locked is the one at its name still."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


@functools.cache
def _forget_in_forked_processes() -> None:
    """Locks belong to the process that took them.

    A worker forked while a shard is fetched would else hold that lock, and those of all shards in
    use, for as long as it lives, long after its parent has dropped them.
    """

    def forget() -> None:
        for handle in _OPEN:
            with suppress(OSError):
                os.close(handle)
        _OPEN.clear()
        _GUARD.release()

    os.register_at_fork(
        before=_GUARD.acquire, after_in_parent=_GUARD.release, after_in_child=forget
    )


class Polling:
    """Pauses between tries, longer and longer up to `longest_s`; a stop ends them."""

    def __init__(self, stop: threading.Event, longest_s: float = _POLL_S[1]) -> None:
        self._stop, self._pause_s, self._longest_s = stop, _POLL_S[0], longest_s

    def wait(self) -> bool:
        """Pause; False once a stop is asked for."""
        stopped = self._stop.wait(self._pause_s * _RANDOM.uniform(0.5, 1.0))
        self._pause_s = min(self._longest_s, self._pause_s * 1.5)
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
            drop_lock(handle)

    def _take(self) -> int | None:
        first = _RANDOM.randrange(len(self._paths))
        for path in self._paths[first:] + self._paths[:first]:
            if (handle := try_lock(path)) is not None:
                return handle
        return None
