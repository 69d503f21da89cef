"""The files of one folder, local or at a URL, with the promises that a checkpoint needs."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from dist.errors import LeydenError, SetupError
from dist.local_files import sync_folder, write_atomic
from dist.storage import Storage
from dist.url_path import Place, UrlPath

_HASHED_AT_ONCE_BYTES = 8 << 20
_RANGES_AT_ONCE = 4


class FolderFiles(Protocol):
    """What dist/checkpoint_folder.py asks of a folder; names have no '/'."""

    def folders(self) -> list[str]:
        """Names of the folders directly in it; [] if it is absent."""

    def sizes(self) -> dict[str, int]:
        """Bytes of the files directly in it, by name; {} if it is absent."""

    def read(self, name: str) -> bytes:
        """A whole file; FileNotFoundError if it is absent."""

    def sha256(self, name: str, size: int) -> str:
        """Digest of a file of `size` bytes; reads all of it."""

    def publish(self, name: str, data: bytes) -> None:
        """Write a file that appears whole and durable, or not at all."""

    def delete(self, first: str) -> None:
        """Delete the folder; its file `first` is gone for good before any other."""


def files_of(place: Place) -> FolderFiles:
    """The files of a folder."""
    return UrlFiles(place) if isinstance(place, UrlPath) else LocalFiles(place)


class LocalFiles:
    """A local folder. A file that cannot be read raises OSError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def folders(self) -> list[str]:
        return [one.name for one in self._entries() if one.is_dir()]

    def sizes(self) -> dict[str, int]:
        return {one.name: one.stat().st_size for one in self._entries() if one.is_file()}

    def _entries(self) -> list[os.DirEntry[str]]:
        try:
            return list(os.scandir(self._path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def sha256(self, name: str, size: int) -> str:
        with open(self._path / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def publish(self, name: str, data: bytes) -> None:
        write_atomic(self._path / name, data)

    def delete(self, first: str) -> None:
        try:
            (self._path / first).unlink(missing_ok=True)
            # The files must not be gone before `first` is, whatever order the disk prefers.
            sync_folder(self._path)
        except FileNotFoundError:
            return
        shutil.rmtree(self._path)


class UrlFiles:
    """A folder of an object store. One that cannot be reached is a SetupError.

    It is no reason to call a checkpoint damaged and to go on from an older one.
    """

    def __init__(self, place: UrlPath) -> None:
        self._storage = Storage(place.url)

    def folders(self) -> list[str]:
        with self._reached():
            return self._storage.folders()

    def sizes(self) -> dict[str, int]:
        with self._reached():
            return self._storage.sizes()

    def read(self, name: str) -> bytes:
        with self._reached():
            return self._storage.read(name)

    def sha256(self, name: str, size: int) -> str:
        digest, step = hashlib.sha256(), _HASHED_AT_ONCE_BYTES
        with self._reached():
            for start in range(0, size, step * _RANGES_AT_ONCE):
                starts = range(start, min(size, start + step * _RANGES_AT_ONCE), step)
                ranges = [(name, begin, min(size, begin + step)) for begin in starts]
                for data in self._storage.read_ranges(ranges):
                    digest.update(data)
        return digest.hexdigest()

    def publish(self, name: str, data: bytes) -> None:
        # A PUT whose answer was lost is sent again: then it finds its own bytes.
        if not self._storage.create_exclusive(name, data) and self._storage.read(name) != data:
            raise FileExistsError(f"{self._storage.url}/{name} is there already, with other bytes")

    def delete(self, first: str) -> None:
        with self._reached():
            self._storage.delete(first)
            self._storage.delete_folder()

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, LeydenError):
            raise
        except Exception as error:  # each store has its own kinds
            raise SetupError(
                f"{self._storage.url} cannot be reached: {error or repr(error)}; check the network "
                "and the credentials, then give the same command again"
            ) from error
