"""A web server with ranges on loopback for tests; it counts what it sends and fails on request.

with serve(folder) as server:
    server.url, server.sent_bytes, server.requests
    server.fault = lambda request: "503" or "cut" or "flip" or "slow" or "403" or None
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """A GET or HEAD as the server met it."""

    number: int
    """From 1, GETs only; 0 for a HEAD."""
    path: str
    start: int
    end: int


class FolderServer(ThreadingHTTPServer):
    """Serves the files of one folder."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.fault: Callable[[Request], str | None] = lambda _: None
        self.ranges = True
        self.bytes_per_s = 0.0
        """0: as fast as it can."""
        self.gets: list[Request] = []
        self.sent_bytes = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def gets_of(self, ending: str) -> list[Request]:
        """GETs of files whose names end so."""
        return [one for one in self.gets if one.path.endswith(ending)]

    def note(self, path: str, start: int, end: int, is_get: bool) -> Request:
        with self._lock:
            request = Request(len(self.gets) + 1 if is_get else 0, path, start, end)
            if is_get:
                self.gets.append(request)
            return request

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that are killed


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FolderServer

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, *, send: bool) -> None:
        path = self.server.folder / self.path.lstrip("/")
        size = path.stat().st_size if path.is_file() else 0
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, end = 0, size
        if found and self.server.ranges:
            start = int(found[1])
            end = min(size, int(found[2]) + 1 if found[2] else size)
        request = self.server.note(self.path, start, end, send)
        fault = self.server.fault(request)
        if fault in ("403", "429", "503"):
            return self._refuse(int(fault))
        if not path.is_file():
            return self._refuse(404)
        if start >= end and size:
            return self._refuse(416)
        ranged = bool(found and self.server.ranges)
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", str(end - start))
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        if send:
            self._send(path, start, end, fault)

    def _send(self, path: Path, start: int, end: int, fault: str | None) -> None:
        with open(path, "rb") as file:
            file.seek(start)
            began, sent = time.monotonic(), 0
            while sent < end - start:
                data = file.read(min(1 << 20, end - start - sent))
                if fault == "flip" and sent == 0:
                    data = bytes([data[0] ^ 0x10]) + data[1:]
                if fault == "cut":
                    data = data[: len(data) // 2]
                if fault == "slow":
                    for byte in data:
                        self.wfile.write(bytes([byte]))
                        time.sleep(0.2)
                self.wfile.write(data)
                sent += len(data)
                with self.server._lock:
                    self.server.sent_bytes += len(data)
                if fault == "cut":
                    self.close_connection = True
                    return
                if self.server.bytes_per_s:
                    ahead_s = sent / self.server.bytes_per_s - (time.monotonic() - began)
                    time.sleep(max(0.0, ahead_s))

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serve(folder: Path | str) -> Iterator[FolderServer]:
    """A server in a thread of this process."""
    server = FolderServer(Path(folder))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        with suppress(Exception):
            server.shutdown()
        thread.join()
        server.server_close()
