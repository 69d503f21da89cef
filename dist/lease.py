"""One writer at a time: a small file that names its holder and is refreshed every 10 s.

A lease whose process is dead on this host and boot, or whose heartbeat is older than 60 s, is
taken over. Clocks of hosts are assumed to agree within a few seconds.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from dist.errors import SetupError

HEARTBEAT_S = 10.0
EXPIRY_S = 60.0
TAKE_OVER_SETTLE_S = 0.1


class Store(Protocol):
    """What a lease needs of the place that it guards (LocalStore or Storage)."""

    @property
    def url(self) -> str: ...
    def read(self, name: str) -> bytes: ...
    def write_atomic(self, name: str, data: bytes) -> None: ...
    def create_exclusive(self, name: str, data: bytes) -> bool: ...
    def delete(self, name: str) -> None: ...


def boot_id() -> str:
    """This boot of this machine; tells a pid of today from the same pid before a reboot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """Start time of a process in clock ticks since boot; tells a reused pid from the first."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def holder_gone(record: dict[str, Any], now: float) -> str:
    """Why a lease record is void, or '' while its holder must be taken to be alive."""
    here = record.get("host") == socket.gethostname() and record.get("boot_id") == boot_id()
    pid = record.get("pid")
    if here and isinstance(pid, int) and _process_start(pid) != record.get("started"):
        return f"process {pid} of this host has ended"
    age_s = now - float(record.get("heartbeat", 0))
    return f"its heartbeat is {age_s:.0f} s old" if age_s > EXPIRY_S else ""


class Lease:
    """Context manager that holds `name` in `store`, or raises SetupError naming the holder."""

    def __init__(
        self, store: Store, name: str, *, what: str, job_id: str = "", attempt: int = 0
    ) -> None:
        self._store, self._name, self._what = store, name, what
        self._record: dict[str, Any] = {
            "what": what,
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _process_start(os.getpid()),
            "boot_id": boot_id(),
            "job_id": job_id,
            "attempt": attempt,
            "since": time.time(),
        }
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost = ""
        """Set by the heartbeat when another writer has taken the lease over."""

    def __enter__(self) -> Lease:
        if not self._store.create_exclusive(self._name, self._bytes()):
            self._take_over()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        # On a disk that has become read-only it stays, and is void once this process is gone.
        with suppress(OSError):
            if self._mine():
                self._store.delete(self._name)

    def check(self) -> None:
        """Raise if the lease was taken over meanwhile; call before publishing anything."""
        if self.lost or not self._mine():
            raise SetupError(
                f"the lease on {self._what} was taken over by another process "
                f"({self.lost or 'its record changed'}); this one stops without publishing"
            )

    def _bytes(self) -> bytes:
        return json.dumps({**self._record, "heartbeat": time.time()}, indent=1).encode()

    def _current(self) -> dict[str, Any] | None:
        try:
            record = json.loads(self._store.read(self._name))
        except (FileNotFoundError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    def _mine(self) -> bool:
        current = self._current()
        return current is not None and current.get("token") == self._record["token"]

    def _take_over(self) -> None:
        current = self._current()
        why = "" if current is None else holder_gone(current, time.time())
        if current is not None and self._supersedes(current):
            why = f"attempt {current.get('attempt')} of the same job was restarted"
        if current is not None and not why:
            since_s = time.time() - float(current.get("since", 0))
            raise SetupError(
                f"{self._what} is in use by process {current.get('pid')} on host "
                f"{current.get('host')} for {since_s:.0f} s; wait until it ends, or end it "
                f"(lease: {self._name} in {self._store.url})"
            )
        # Several may see the same dead holder and delete each other's new record once; the last
        # to create keeps it, and the others find out here or in check() before they publish.
        if self._current() == current:
            self._store.delete(self._name)
        created = self._store.create_exclusive(self._name, self._bytes())
        time.sleep(TAKE_OVER_SETTLE_S)
        if not created or not self._mine():
            raise SetupError(f"{self._what} was just taken by another process; try again")

    def _supersedes(self, current: dict[str, Any]) -> bool:
        same_job = self._record["job_id"] and self._record["job_id"] == current.get("job_id")
        return bool(same_job) and self._record["attempt"] > int(current.get("attempt", 0))

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                current = self._current()
                if current is None or current.get("token") != self._record["token"]:
                    self.lost = f"now held by {current}"
                    return
                self._store.write_atomic(self._name, self._bytes())
            except OSError:
                continue  # a full disk or a slow server; EXPIRY_S leaves five more tries
