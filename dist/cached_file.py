"""A small file of a remote dataset in the node's cache, so that one process a node fetches it.

It is read whole and its SHA-256 checked by every reader, so that it needs no stamp. It takes room
in the cache as shards do, and is evicted as they are; where there is no room it is not kept.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from dist.cache_folder import CacheFolder
from dist.errors import SetupError
from dist.file_locks import Polling, drop_lock, try_lock


def read_cached(folder: CacheFolder, digest: str, fetch: Callable[[], bytes]) -> bytes:
    """The file with this SHA-256; `fetch` brings it, checked, where the cache has none.

    Raises what `fetch` raises, SetupError for a cache of no use.
    """
    try:
        return _read_cached(folder, digest, fetch)
    except OSError as error:
        raise SetupError(
            f"the shard cache {folder.path} cannot be used: {error.strerror or error}; set "
            "data.cache_dir to a folder of yours on a disk of the node"
        ) from error


def _read_cached(folder: CacheFolder, digest: str, fetch: Callable[[], bytes]) -> bytes:
    path, lock_path = folder.path / f"{digest}.arrow", folder.path / f"{digest}.lock"
    polling = Polling(threading.Event())
    while True:
        if path.exists() and (lock := try_lock(lock_path, shared=True)) is not None:
            try:
                data = _read_if_right(path, digest)
                if data is not None:
                    with suppress(OSError):  # another user's
                        os.utime(lock)
                    return data
            finally:
                drop_lock(lock)
        if (lock := try_lock(lock_path)) is not None:
            break
        polling.wait()  # another process reads or fetches it
    try:
        data = _read_if_right(path, digest)
        if data is None:
            path.unlink(missing_ok=True)
            data = fetch()
            _keep(folder, digest, data)
        return data
    finally:
        folder.let_go_of(digest, lock)


def _read_if_right(path: Path, digest: str) -> bytes | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return data if hashlib.sha256(data).hexdigest() == digest else None


def _keep(folder: CacheFolder, digest: str, data: bytes) -> None:
    """Nothing where there is no room: all the same it was read."""
    handle = folder.reserve_part(digest, len(data))
    if handle is None:
        return
    part = folder.path / f"{digest}.part"
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        folder.name_part(digest)
    finally:
        part.unlink(missing_ok=True)
