"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable


def came(what: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether something becomes true in time. A fetch that was under way at the end of a loader,
    for one, holds its shard for a moment more."""
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
    return what()
