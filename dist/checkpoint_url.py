"""The files of one checkpoint, local or at a URL: uploaded as they are made, read by ranges."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.checkpoint.filesystem import (
    FileSystemBase,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from dist.checkpoint_files import HashedFiles, HashedStream, hashed
from dist.storage import Storage
from dist.url_path import Place, UrlPath

_READ_AHEAD_BYTES = 64 << 20


def files_to_write(folder: Place, *, makes_folder: bool) -> HashedFiles | HashedUploads:
    """The files of a checkpoint that is being saved; rank 0 alone makes the folder."""
    if isinstance(folder, UrlPath):
        return HashedUploads(folder, makes_folder=makes_folder)
    return HashedFiles(folder, makes_folder=makes_folder)


def reader_of(folder: Place) -> StorageReader:
    """DCP's reader of a checkpoint, for dcp.load."""
    return UrlReader(folder) if isinstance(folder, UrlPath) else FileSystemReader(folder)


class HashedUploads(FileSystemBase):
    """HashedFiles for a URL: an object appears when it is complete, and is never renamed."""

    def __init__(self, folder: UrlPath, *, makes_folder: bool = False) -> None:
        """`makes_folder`: this rank makes sure that nothing is there yet."""
        self.folder = folder
        self.storage = Storage(folder.url)
        self.written: dict[str, dict[str, Any]] = {}
        """Size and SHA-256 of every file that this rank wrote, by name."""
        self.made_folder = False
        """The folder is of this save; what was there before must not be touched."""
        self._makes_folder = makes_folder
        self._held: dict[str, bytes] = {}

    def writer(self) -> FileSystemWriter:
        """DCP's writer on these files: one for each rank."""
        writer = FileSystemWriter(".", sync_files=False, overwrite=False)
        writer.fs, writer.path = self, self.folder.url  # type: ignore[assignment]
        return writer

    def mkdir(self, path: str | os.PathLike) -> None:
        # DCP calls it on all ranks before any of them writes. Names hold the attempt, and a
        # run has one writer (its lease), so that nobody else comes between.
        if self._makes_folder:
            if self.storage.sizes():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.folder.url)
            self.made_folder = True

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        name = _name(path)
        if mode == "rb":
            yield io.BytesIO(self.storage.read(name))
            return
        if name.endswith(".tmp"):
            # DCP writes .metadata.tmp and renames it: a copy for an object store. Held until then.
            held = io.BytesIO()
            stream = HashedStream(held)
            yield stream
            self._held[name] = held.getvalue()
        else:
            with self.storage.upload(name) as file, hashed(file) as stream:
                yield stream
        self.written[name] = stream.facts()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        name, new_name = _name(path), _name(new_path)
        self.storage.write_atomic(new_name, self._held.pop(name))
        self.written[new_name] = self.written.pop(name)

    def write(self, name: str, data: bytes) -> None:
        """Write one small file beside DCP's."""
        stream = HashedStream(io.BytesIO())
        stream.write(data)
        self.storage.write_atomic(name, data)
        self.written[name] = stream.facts()

    def sync(self) -> None:
        """What was uploaded is durable already."""

    def concat_path(self, path: str | os.PathLike, suffix: str) -> str:
        return f"{path}/{suffix}"

    def init_path(self, path: str | os.PathLike) -> str:
        return str(path)

    def exists(self, path: str | os.PathLike) -> bool:
        """DCP asks whether a .metadata is in its way: mkdir has found nothing."""
        return False

    def rm_file(self, path: str | os.PathLike) -> None:
        self.storage.delete(_name(path))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return "://" in str(checkpoint_id)


class UrlReader(FileSystemReader):
    """DCP's reader by ranged requests: each rank fetches the saved pieces that it needs, no more.

    Pieces are fetched many at once, up to 64 MiB ahead (or one piece, if it is larger).
    """

    def __init__(self, folder: UrlPath) -> None:
        super().__init__(".")
        self._files = HashedUploads(folder)
        self.fs = _Unopened(self._files)  # type: ignore[assignment]
        self.path = folder.url  # type: ignore[assignment]
        self._order: list[tuple[str, int, int]] = []
        self._fetched: dict[tuple[str, int, int], bytes] = {}

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted = [_key(self.storage_data[item.storage_index]) for item in plan.items]
        by_file: dict[str, list[tuple[str, int, int]]] = {}
        for key in dict.fromkeys(wanted):
            by_file.setdefault(key[0], []).append(key)
        # The order in which DCP will ask: file by file, each in the order of the plan.
        self._order = [key for keys in by_file.values() for key in keys]
        try:
            return super().read_data(plan, planner)
        finally:
            self._order, self._fetched = [], {}

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        key = _key(sinfo)
        if key not in self._fetched:
            self._fetch_from(self._order.index(key))
        return io.BytesIO(self._fetched[key])

    def _fetch_from(self, first: int) -> None:
        last, size = first, 0
        while last < len(self._order):
            size += self._order[last][2]
            if last > first and size > _READ_AHEAD_BYTES:
                break
            last += 1
        keys = self._order[first:last]
        ranges = [(name, offset, offset + length) for name, offset, length in keys]
        self._fetched = dict(zip(keys, self._files.storage.read_ranges(ranges), strict=True))


class _Unopened:
    """Opens .metadata only: tensors are read by ranges, not from a stream."""

    def __init__(self, files: HashedUploads) -> None:
        self._files = files

    def concat_path(self, path: str | os.PathLike, suffix: str) -> str:
        return self._files.concat_path(path, suffix)

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        if _name(path) == ".metadata":
            with self._files.create_stream(path, mode) as stream:
                yield stream
        else:
            yield None


def _key(info: Any) -> tuple[str, int, int]:
    return info.relative_path, info.offset, info.length


def _name(path: str | os.PathLike) -> str:
    return str(path).rpartition("/")[2]
