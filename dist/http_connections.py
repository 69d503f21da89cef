"""Connections to web servers that stay open from one request to the next, one a thread and server.

A new one costs a round trip, with TLS three; 10,000 sizes or parts of shards would pay it each.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

_threads = threading.local()
_LOST = (http.client.RemoteDisconnected, ConnectionError)


@contextlib.contextmanager
def kept_response(
    url: str, headers: dict[str, str], method: str, timeout_s: float
) -> Iterator[Any | None]:
    """The answer to a request, over the connection of the last one where it is still open.

    None where it takes more than one request or another server: a proxy, a redirect. What was read
    whole leaves the connection open; everything else closes it.
    """
    parts = urllib.parse.urlsplit(url)
    if _has_proxy(parts):
        yield None
        return
    key = (os.getpid(), parts.scheme, parts.netloc)  # a forked process has none yet
    connection, response = _ask(key, parts, headers, method, timeout_s)
    try:
        if 300 <= response.status < 400:
            yield None
            return
        yield response
        if response.length == 0:
            response.read()  # ends it: only then may the connection be asked again
        if response.isclosed() and not response.will_close:
            _kept()[key] = connection
            return
    except BaseException:
        connection.close()
        raise
    connection.close()


def _ask(
    key: tuple[int, str, str], parts: urllib.parse.SplitResult, headers: dict[str, str],
    method: str, timeout_s: float,
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:  # fmt: skip
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    while True:
        connection = _kept().pop(key, None)
        is_new = connection is None
        if connection is None:
            is_secure = parts.scheme == "https"
            kind = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
            connection = kind(parts.netloc, timeout=timeout_s)
        try:
            connection.request(method, target, headers=headers)
            return connection, connection.getresponse()
        except BaseException as error:
            connection.close()
            # The server has closed it since: a new one is no second try.
            if is_new or not isinstance(error, _LOST):
                raise


def _kept() -> dict[tuple[int, str, str], http.client.HTTPConnection]:
    if not hasattr(_threads, "kept"):
        _threads.kept = {}
    found: dict[tuple[int, str, str], http.client.HTTPConnection] = _threads.kept
    return found


def _has_proxy(parts: urllib.parse.SplitResult) -> bool:
    """Whether the environment names a proxy for a server."""
    named = (f"{parts.scheme}_proxy", "all_proxy")
    if not any(os.environ.get(name) or os.environ.get(name.upper()) for name in named):
        return False  # getproxies() goes through all of the environment
    proxies = urllib.request.getproxies()
    if parts.scheme not in proxies and "all" not in proxies:
        return False
    return not urllib.request.proxy_bypass(parts.netloc)
