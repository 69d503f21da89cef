"""A folder by URL: local paths by rename, object stores by one PUT, through fsspec."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from dist.errors import ConfigError, SetupError
from dist.http_files import HttpFiles
from dist.local_files import LocalStore, publish_file

RENEW_AFTER_S = 86_400.0
"""An object older than this is put again when it is reused: stores have no other renewal."""


class Storage:
    """Files under one root URL (file path, s3://, memory://, ...); names use '/'."""

    def __init__(self, url: str) -> None:
        if "://" not in url or url.startswith("file://"):
            url = os.path.abspath(url.removeprefix("file://"))
        self._url = url.rstrip("/") or "/"
        root = self._url
        try:
            if url.startswith(("http://", "https://")):
                self._fs = HttpFiles()
            else:
                self._fs, root = fsspec.core.url_to_fs(self._url)
        except ImportError as error:
            scheme = url.partition("://")[0]
            raise SetupError(
                f"{url} needs a package that is not installed ({error}); for s3:// run "
                f"`pip install s3fs`, for others see fsspec's page on {scheme!r}"
            ) from None
        except ValueError as error:
            raise ConfigError(f"{url} is not a URL that fsspec knows: {error}") from None
        self._root = str(root).rstrip("/")
        self._local = Path(self._root) if _is_local(self._fs) else None

    @property
    def url(self) -> str:
        return self._url

    @property
    def is_local(self) -> bool:
        """Whether its files are those of a local folder."""
        return self._local is not None

    def read(self, name: str) -> bytes:
        """The whole file; FileNotFoundError with its full URL if it is absent."""
        try:
            return bytes(self._fs.cat_file(self._path(name)))
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such file", f"{self.url}/{name}") from None

    def write_atomic(self, name: str, data: bytes) -> None:
        """Replace a file; a reader sees the old bytes or the new ones."""
        if self._local is not None:
            LocalStore(self._local).write_atomic(name, data)
        else:
            self._fs.pipe_file(self._path(name), data)

    def create_exclusive(self, name: str, data: bytes) -> bool:
        """Create a file; False if it is there. S3: a conditional PUT (If-None-Match)."""
        if self._local is not None:
            return LocalStore(self._local).create_exclusive(name, data)
        try:
            self._fs.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def delete(self, name: str) -> None:
        """Delete a file if it is there."""
        try:
            self._fs.rm_file(self._path(name))
        except FileNotFoundError:
            return

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Size in bytes, or None where there is no such file."""
        try:
            if self._local is not None:  # fsspec asks ten times as long; a run asks for each shard
                found = os.stat(self._path(name))
                return found.st_size if stat.S_ISREG(found.st_mode) else None
            info = self._info(name)
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def put_file(self, local: Path, name: str) -> None:
        """Publish a finished local file once; present with the right size means done.

        Only for names made of the content's digest: equal name and size is equal content. What is
        found is renewed, so that gc takes it for as young as what was written now.
        """
        if self.size(name) == local.stat().st_size and self.renew(name):
            return
        if self._local is None:
            self._fs.put_file(str(local), self._path(name))
            return
        final = self._local / name
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            try:
                os.link(local, temporary)  # the same file system: no copy
            except OSError:
                shutil.copyfile(local, temporary)
            publish_file(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)

    def chunks(self, name: str, chunk_bytes: int = 8 << 20) -> Iterator[bytes]:
        """A file's bytes from start to end, one request a chunk; FileNotFoundError if absent."""
        if self._local is not None:
            file: Any = open(self._path(name), "rb", buffering=0)  # noqa: SIM115 -- closed below
        else:
            file = self._fs.open(self._path(name), "rb", block_size=chunk_bytes, cache_type="none")
        with file:
            while chunk := file.read(chunk_bytes):
                yield chunk

    def changed(self, name: str) -> float | None:
        """Seconds of the epoch when a file was last published or renewed; None if unknown.

        Locally the later of mtime and ctime: a link to an old file is a new name of it.
        """
        if self._local is not None:
            found = os.stat(self._path(name))
            return max(found.st_mtime, found.st_ctime)
        info = self._info(name)
        times = [info[key] for key in ("LastModified", "last_modified", "created") if key in info]
        return times[0].timestamp() if times and hasattr(times[0], "timestamp") else None

    def renew(self, name: str) -> bool:
        """Make a published file as young as now to gc; False where it has to be written anew."""
        try:
            if self._local is None:
                changed = self.changed(name)
                return changed is not None and time.time() - changed < RENEW_AFTER_S
            path = self._path(name)
            found = os.stat(path)
            # The same mtime, so that a verified shard stays verified; ctime becomes now.
            os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
        except OSError:
            return False  # gone meanwhile, or another user's
        return True

    def local_path(self, name: str) -> Path | None:
        """The file's path where the storage is a local folder, else None."""
        return None if self._local is None else self._local / name

    def folders(self) -> list[str]:
        """Names of the folders directly under the root, sorted; [] if it is absent."""
        return sorted(_last(item) for item in self._entries() if item["type"] == "directory")

    def sizes(self) -> dict[str, int]:
        """Bytes of the files directly under the root, by name; {} if it is absent."""
        return {_last(i): int(i["size"]) for i in self._entries() if i["type"] == "file"}

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Sequence[bytes]:
        """Bytes [start, end) of files, (name, start, end) each, fetched at once."""
        names, starts, ends = zip(*ranges, strict=True)
        paths = [self._path(name) for name in names]
        found = self._fs.cat_ranges(paths, list(starts), list(ends), on_error="return")
        for one in found:
            if isinstance(one, BaseException):
                raise one
        return list(found)

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file; fewer, or an error, where it ends before."""
        return bytes(self._fs.cat_file(self._path(name), start=start, end=end))

    def copy_range(self, name: str, start: int, end: int, take: Callable[[bytes], None]) -> None:
        """Hand over bytes [start, end) of a file piece by piece, in order; fewer, or an error,
        where it ends before."""
        if isinstance(self._fs, HttpFiles):
            self._fs.copy_range(self._path(name), start, end, take)
        else:
            take(self.read_range(name, start, end))

    @contextmanager
    def upload(self, name: str) -> Iterator[Any]:
        """A file to write from start to end; it is there when the block ends without an error."""
        file = self._fs.open(self._path(name), "wb")
        try:
            yield file
        except BaseException:
            # Closing would publish what there is, and so would the garbage collector.
            with suppress(Exception):
                file.discard()
            with suppress(Exception):
                file.closed = True
            raise
        file.close()

    def delete_folder(self) -> None:
        """Delete every file under the root."""
        self._fs.invalidate_cache()
        with suppress(FileNotFoundError):
            self._fs.rm(self._root, recursive=True)

    def _entries(self) -> list[dict[str, Any]]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            return []
        # A store may list the folder's own marker among its files.
        return [dict(item) for item in found if _last(item) and item["name"] != self._root]

    def list(self, prefix: str) -> list[str]:
        """Names of the files directly under a folder of the root, sorted; [] if it is absent."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._path(prefix), detail=True)
        except FileNotFoundError:
            return []
        names = [str(item["name"]).rsplit("/", 1)[-1] for item in found if item["type"] == "file"]
        folder = prefix.strip("/")
        return sorted(f"{folder}/{name}" if folder else name for name in names)

    def _path(self, name: str) -> str:
        parts = name.strip("/").split("/")
        if ".." in parts or name.startswith("/"):
            raise ConfigError(f"the name {name!r} leaves the folder {self.url}")
        return f"{self._root}/{name}" if name else self._root

    def _info(self, name: str) -> dict[str, Any]:
        # Object stores cache listings; another process may have written since.
        self._fs.invalidate_cache(self._fs._parent(self._path(name)))
        return dict(self._fs.info(self._path(name)))


def _last(item: dict[str, Any]) -> str:
    return str(item["name"]).rstrip("/").rsplit("/", 1)[-1]


def _is_local(fs: fsspec.AbstractFileSystem) -> bool:
    protocol = fs.protocol if isinstance(fs.protocol, (tuple, list)) else (fs.protocol,)
    return "file" in protocol
