"""A folder on a plain web server, read-only: whole files and ranges of them; nothing is listed.

Standard library alone, so a dataset behind http(s):// needs no further package. Proxies are those
of the environment (http_proxy, no_proxy), redirects are followed.
"""

from __future__ import annotations

import errno
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fsspec import AbstractFileSystem

from dist.http_connections import kept_response

_READ_BYTES = 64 << 10
"""Small enough that its memory is used again at once: new pages cost more than the copy."""


class HttpError(OSError):
    """A status that is neither success nor one that Python has an error for; `status` holds it."""

    def __init__(self, status: int, reason: str, url: str) -> None:
        super().__init__(errno.EREMOTEIO, f"HTTP {status} {reason}", url)
        self.status = status


class ShortRead(OSError):
    """The file ends before the bytes that were asked for."""


class HttpFiles(AbstractFileSystem):
    """The part of fsspec's interface that dist.storage asks of a store that it only reads."""

    protocol = ("http", "https")
    timeout_s = 30.0
    """Without a byte for this long, a request has failed."""
    slowest_bytes_s = 50_000.0
    """A request that is slower than this on the whole, beyond timeout_s, has failed too."""

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return path.rstrip("/") if isinstance(path, str) else [one.rstrip("/") for one in path]

    @classmethod
    def _parent(cls, path: str) -> str:
        return path.rpartition("/")[0]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        try:
            with self._open_url(path, {}, "HEAD") as response:
                length = response.headers.get("Content-Length")
                if length is not None:
                    return {"name": path, "size": int(length), "type": "file"}
        except HttpError as error:
            if error.status not in (405, 501):  # a server that knows no HEAD
                raise
        with self._open_url(path, {"Range": "bytes=0-0"}) as response:
            total = _total(response)
            if total is None:
                total = self._copy(response, None, lambda _: None)
        return {"name": path, "size": total, "type": "file"}

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        """Bytes [start, end), both not negative; ShortRead where the file has fewer."""
        found: list[bytes] = []
        if start is None and end is None:
            with self._open_url(path, {}) as response:
                self._copy(response, None, found.append)
        else:
            self.copy_range(path, start or 0, end, found.append)
        return b"".join(found)

    def copy_range(
        self, path: str, start: int, end: int | None, take: Callable[[bytes], None]
    ) -> None:
        """Hand over bytes [start, end) as they come; ShortRead where the file has fewer."""
        ask = f"bytes={start}-" if end is None else f"bytes={start}-{end - 1}"
        wanted = None if end is None else end - start
        with self._open_url(path, {"Range": ask}) as response:
            if response.status == 206:
                said = response.headers.get("Content-Range", "")
                if not said.startswith(f"bytes {start}-"):
                    raise HttpError(206, f"answers {ask} with {said!r}", path)
            else:  # a server without ranges sends the file from its start
                self._copy(response, start, lambda _: None)
            self._copy(response, wanted, take)

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        raise FileNotFoundError(errno.ENOENT, "a web server lists no folders", path)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    def _rm(self, path: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    @contextmanager
    def _open_url(self, url: str, headers: dict[str, str], method: str = "GET") -> Iterator[Any]:
        # Without this, a server may compress, and ranges would be of the compressed bytes.
        headers = {"Accept-Encoding": "identity", "User-Agent": "leyden", **headers}
        try:
            with kept_response(url, headers, method, self.timeout_s) as response:
                if response is not None:
                    if response.status >= 400:
                        raise _as_os_error(response.status, response.reason, url)
                    yield response
                    return
            request = urllib.request.Request(url, headers=headers, method=method)
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                yield response
        except urllib.error.HTTPError as error:
            error.close()
            raise _as_os_error(error.code, str(error.reason), url) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, OSError):
                raise error.reason from None
            raise ConnectionError(f"{url}: {error.reason}") from None
        except http.client.HTTPException as error:
            raise ConnectionError(f"{url}: {error!r}") from None

    def _copy(self, response: Any, count: int | None, take: Callable[[bytes], None]) -> int:
        """Hand over `count` bytes, or all that come, and say how many; a slow or short answer
        raises."""
        got = 0
        started = time.monotonic()
        try:
            while count is None or got < count:
                data = response.read1(
                    _READ_BYTES if count is None else min(_READ_BYTES, count - got)
                )
                if not data:
                    break
                got += len(data)
                take(data)
                if time.monotonic() - started > self.timeout_s + got / self.slowest_bytes_s:
                    raise TimeoutError(f"{got} bytes in {time.monotonic() - started:.0f} s")
        except http.client.IncompleteRead as error:
            raise ConnectionError(f"the answer broke off: {error!r}") from None
        except http.client.HTTPException as error:
            raise ConnectionError(repr(error)) from None
        if (count is None or got < count) and response.length:
            # Promised, and did not come: that is the connection's end and not the file's.
            raise ConnectionError(f"the answer broke off {response.length} bytes before its end")
        if count is not None and got < count:
            raise ShortRead(errno.EIO, f"{count - got} bytes are missing after {got}")
        return got


def _total(response: Any) -> int | None:
    found = re.fullmatch(r"bytes 0-0/(\d+)", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _as_os_error(status: int, reason: str, url: str) -> OSError:
    if status in (404, 410):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    if status in (401, 403, 407):
        return PermissionError(errno.EACCES, f"HTTP {status} {reason}", url)
    if status == 416:
        return ShortRead(errno.EIO, "the file ends before the bytes that were asked for", url)
    return HttpError(status, reason, url)
