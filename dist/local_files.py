"""Files that are never seen half-written: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

HUGE_PAGE_BYTES = 2 << 20


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path | str, data: bytes) -> None:
    """Replace `path` by `data`; a reader sees the old bytes or the new ones, never a mixture."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        _write_synced(temporary, data)
        os.replace(temporary, path)
    except IsADirectoryError as error:
        temporary.unlink(missing_ok=True)
        raise IsADirectoryError(
            error.errno, "a folder of that name is in the way", str(path)
        ) from None
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a write that found the disk full tells no name
        raise
    sync_folder(path.parent)


def create_exclusive(path: Path | str, data: bytes) -> bool:
    """Create `path` whole, or return False if it is there already; of two callers one wins."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        _write_synced(temporary, data)
        # link() fails if the target exists: unlike O_EXCL, no reader can see a partial file.
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def publish_file(temporary: Path, final: Path) -> None:
    """Move a finished file of the same file system to its final name, durably."""
    handle = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    os.replace(temporary, final)
    sync_folder(final.parent)


def append_line(path: Path, line: str) -> None:
    """Append one line with one write; a line that a kill tore is closed first.

    Where it raises OSError, nothing was appended.
    """
    end = None
    try:
        with open(path, "a+b") as file:
            end = file.seek(0, os.SEEK_END)
            torn = b""
            if end:
                file.seek(end - 1)
                torn = b"" if file.read(1) == b"\n" else b"\n"
            file.write(torn + line.encode() + b"\n")
    except OSError:
        if end is not None:
            with suppress(OSError):
                os.truncate(path, end)  # a full disk takes a part of the line
        raise


class HugePageWriter:
    """Writes an open file from a place on, in order; call flush() at the end.

    In whole huge pages, as Linux may then keep the file in such and map it by them (seen with ext4
    and Linux 6.18): rows of a mapped shard are copied faster.
    """

    def __init__(self, handle: int, at: int = 0) -> None:
        """at: a multiple of HUGE_PAGE_BYTES, or no page is whole."""
        self._handle, self._at = handle, at
        self._buffer, self._filled = memoryview(bytearray(HUGE_PAGE_BYTES)), 0

    def write(self, data: bytes) -> None:
        """Append; OSError where the disk takes it no more."""
        left = memoryview(data).cast("B")
        while left:
            part = left[: HUGE_PAGE_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            left = left[len(part) :]
            if self._filled == HUGE_PAGE_BYTES:
                self.flush()

    def flush(self) -> None:
        """Write what waits."""
        left, self._filled = self._buffer[: self._filled], 0
        while left:
            count = os.pwrite(self._handle, left, self._at)
            self._at += count
            left = left[count:]


class LocalStore:
    """A local folder with the four calls that a lease needs."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def url(self) -> str:
        return str(self.folder)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def write_atomic(self, name: str, data: bytes) -> None:
        write_atomic(self.folder / name, data)

    def create_exclusive(self, name: str, data: bytes) -> bool:
        return create_exclusive(self.folder / name, data)

    def delete(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)
