"""Connections that stay open between requests: used again, never mixed up, never relied on."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from dist.errors import SetupError
from dist.http_connections import _has_proxy
from dist.http_files import HttpError, ShortRead
from dist.storage import Storage
from dist.transfer import read_small

BODY = bytes(range(256)) * 400


class Server(ThreadingHTTPServer):
    """Serves BODY under any name, and counts connections."""

    daemon_threads = True
    connections = 0
    hangs_up = False
    """Close each connection after its answer, without a word."""
    ranges = True

    def get_request(self) -> Any:
        self.connections += 1
        return super().get_request()

    @property
    def storage(self) -> Storage:
        return Storage(f"http://127.0.0.1:{self.server_address[1]}/data")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.close_connection = self.server.hangs_up
        if "gone" in self.path or "moved" in self.path:
            self.send_response(404 if "gone" in self.path else 302)
            here = self.path if "circle" in self.path else self.path.replace("moved", "here")
            self.send_header("Location", here)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        asked = self.headers.get("Range") if self.server.ranges else None
        start, end = 0, len(BODY)
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            start, end = int(first), min(len(BODY), int(last) + 1)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(BODY)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(BODY[start:end])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), _Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def read_all(storage: Storage) -> None:
    for number in range(20):
        assert storage.size(f"{number}") == len(BODY)
        assert (
            storage.read_range("x", 100 * number, 300 * number + 1)
            == (BODY[100 * number : 300 * number + 1])
        )
    assert storage.read("x") == BODY
    assert storage.size("gone") is None
    assert storage.read_range("x", 5, 9) == BODY[5:9]


def test_a_connection_is_used_again(server: Server) -> None:
    """A handshake for each of 10,000 shards stands between a run and its first batch."""
    read_all(server.storage)
    assert server.connections <= 2  # an answer that is an error ends one


def test_a_server_that_hangs_up_is_asked_anew(server: Server) -> None:
    """A connection that the server closed meanwhile is no failure of the file."""
    server.hangs_up = True
    read_all(server.storage)
    assert server.connections > 40


def test_what_was_not_read_does_not_answer_the_next_request(server: Server) -> None:
    """The rest of an answer taken for the next one's: bytes of another shard."""
    server.ranges = False  # the whole file comes, of which a part is read
    storage = server.storage
    for start in (7, 1000, 3):
        assert storage.read_range("x", start, start + 50) == BODY[start : start + 50]
    server.ranges = True
    with pytest.raises((ShortRead, ValueError)):
        storage.read_range("x", len(BODY) - 10, len(BODY) + 10)
    read_all(storage)


def test_redirects_are_followed_and_circles_end(server: Server) -> None:
    """Data behind a moved address cannot be read, or is asked for without end."""
    assert server.storage.read("moved") == BODY
    with pytest.raises(HttpError, match="302"):
        server.storage.read("moved-circle")
    with pytest.raises(SetupError, match="check the address"):
        read_small(server.storage, "moved-circle")


def test_a_forked_process_has_connections_of_its_own(server: Server) -> None:
    """Two processes on one connection read each other's answers."""
    storage = server.storage
    read_all(storage)
    child = os.fork()
    if child == 0:
        try:
            read_all(storage)
            os._exit(0)
        finally:
            os._exit(1)
    read_all(storage)
    assert os.waitpid(child, 0)[1] == 0


def test_proxies_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster whose only way out is a proxy, passed by."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    there = urllib.parse.urlsplit("https://data.example/x")
    assert not _has_proxy(there)
    monkeypatch.setenv("HTTPS_PROXY", "http://10.0.0.1:3128")
    assert _has_proxy(there) and not _has_proxy(urllib.parse.urlsplit("http://data.example/x"))
    monkeypatch.setenv("no_proxy", "data.example")
    assert not _has_proxy(there)
