"""The files of one checkpoint as DCP writes them: hashed on the way, durable when closed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

from dist.local_files import sync_folder

_BUFFER_BYTES = 1 << 20


class HashedFiles(FileSystem):
    """DCP's local file system, keeping what each file written here must hold.

    Digests are of the bytes that were meant, so a disk that garbles them is found out.
    """

    def __init__(self, folder: Path, *, makes_folder: bool) -> None:
        """`makes_folder`: this rank creates the folder, which must not be there yet."""
        self.folder = folder
        self.written: dict[str, dict[str, Any]] = {}
        """Size and SHA-256 of every file that this rank wrote, by name."""
        self.made_folder = False
        """The folder is of this save; what was there before must not be touched."""
        self._makes_folder = makes_folder

    def writer(self) -> FileSystemWriter:
        """DCP's writer on these files: one for each rank."""
        # Without sync_files: each file is synced here, and DCP falls back to os.sync().
        writer = FileSystemWriter(self.folder, sync_files=False, overwrite=False)
        writer.fs = self
        return writer

    def mkdir(self, path: str | os.PathLike) -> None:
        # DCP calls it on all ranks before any of them writes.
        if self._makes_folder:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir()
            self.made_folder = True
            sync_folder(self.folder.parent)

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        if mode != "wb":
            raise ValueError(f"{path}: only written files are hashed, not mode {mode!r}")
        with open(path, "xb", buffering=_BUFFER_BYTES) as file:
            with hashed(file) as stream:
                yield stream
            file.flush()
            os.fsync(file.fileno())
        name = Path(path).name
        self.written[name] = stream.facts()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        os.rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)

    def write(self, name: str, data: bytes) -> None:
        """Write one small file beside DCP's."""
        with self.create_stream(self.folder / name, "wb") as stream:
            stream.write(data)

    def sync(self) -> None:
        """Make the files' names durable."""
        sync_folder(self.folder)


@contextmanager
def hashed(file: Any) -> Iterator[HashedStream]:
    """A stream into `file`; where a write failed, its own OSError and not torch.save's words."""
    stream = HashedStream(file)
    try:
        yield stream
    except Exception:
        if stream.failure is not None:
            raise stream.failure from None
        raise


class HashedStream:
    """A file being written; never seeks, so its position is what was written."""

    def __init__(self, file: Any) -> None:
        self.sha256 = hashlib.sha256()
        self.failure: OSError | None = None
        """Why a write failed: torch.save tells only that one did."""
        self._file, self._position = file, 0

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        count = memoryview(data).nbytes
        try:
            self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self._position += count
        return count

    def facts(self) -> dict[str, Any]:
        """Size and digest of what was meant to be written."""
        return {"bytes": self._position, "sha256": self.sha256.hexdigest()}

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """The file is flushed and synced once, at its end."""

    def close(self) -> None:
        """DCP closes what create_stream closes after syncing."""
