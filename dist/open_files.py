"""How many files a process may keep open for its shards."""

from __future__ import annotations

import resource
from contextlib import suppress

_OTHER_FILES = 128
"""Open files of a process that are not of shards."""


def most_shard_files() -> int:
    """Files that may be open for shards, once the limit was raised as far as it can be.

    A lock and a map a shard: the usual soft limit of 1,024 files is soon reached.
    """
    return _allow_many() - _OTHER_FILES


def _allow_many() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft
