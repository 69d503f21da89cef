"""How many live processes use a folder: one locked file each, numbered as they came."""

from __future__ import annotations

import os
import time
import uuid
from contextlib import suppress
from pathlib import Path

from dist.file_locks import drop_lock, is_locked, locked, try_lock

_COUNTED_FOR_S = 1.0


class Members:
    """The live processes, this one among them."""

    def __init__(self, folder: Path, guard: Path) -> None:
        """`guard`: the lock under which files come and go."""
        self._folder, self._guard = folder, guard
        with locked(guard):
            self._number = 1 + max((_number(one) for one in self._files()), default=0)
            # Not pid alone: containers that share the folder have equal ones.
            name = f"member-{self._number:08d}-{os.getpid()}-{uuid.uuid4().hex[:8]}.lock"
            self._own = folder / name
            self._handle = try_lock(self._own)
        self._pid = os.getpid()
        self._counts, self._counted_at = (1, 0), float("-inf")

    def count(self) -> int:
        """Live members, this one among them; at most a second old."""
        return self._counted()[0]

    def earlier(self) -> int:
        """Live members that came before this one; at most a second old."""
        return self._counted()[1]

    def recount(self) -> None:
        """Forget what was counted less than a second ago."""
        self._counted_at = float("-inf")

    def leave(self) -> None:
        """Be counted no more."""
        handle, self._handle = self._handle, None
        if handle is not None and self._pid == os.getpid():
            self._own.unlink(missing_ok=True)
            drop_lock(handle)

    def _files(self) -> list[Path]:
        return list(self._folder.glob("member-*.lock"))

    def _counted(self) -> tuple[int, int]:
        if time.monotonic() - self._counted_at > _COUNTED_FOR_S:
            with locked(self._guard):
                self._stay()
                others = [one for one in self._files() if one != self._own]
                live = [path for path in others if is_locked(path)]
                for path in set(others) - set(live):
                    with suppress(OSError):  # of another user, in a folder like /tmp
                        path.unlink()
            earlier = sum(_number(path) < self._number for path in live)
            self._counts, self._counted_at = (1 + len(live), earlier), time.monotonic()
        return self._counts

    def _stay(self) -> None:
        """Whoever deletes old files, or the whole folder, makes nobody leave."""
        if self._handle is not None and not self._own.exists():
            drop_lock(self._handle)
            self._handle = try_lock(self._own)


def _number(path: Path) -> int:
    found = path.name.split("-")[1]
    return int(found) if found.isdigit() else 0
