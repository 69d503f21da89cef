"""What was hashed once need not be hashed again: stamps of files whose bytes are known.

A stamp holds (digest, inode, mtime, size). Whoever writes to the file, replaces it or cuts it
changes one of them, and it is hashed anew. Bits that a disk loses by itself change none: only
hashing every byte (`leyden data verify`) finds those.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def file_facts(path: Path, digest: str) -> dict[str, Any]:
    """What the stamp of a file with these bytes holds; OSError if the file is not there."""
    stat = path.stat()
    return {
        "digest": digest,
        "inode": stat.st_ino,
        "mtime_ns": stat.st_mtime_ns,
        "size": stat.st_size,
    }


def is_stamped(stamp: Path, facts: dict[str, Any]) -> bool:
    """Whether the stamp says exactly this."""
    try:
        return bool(json.loads(stamp.read_bytes()) == facts)
    except (OSError, ValueError):
        return False
