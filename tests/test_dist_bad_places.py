"""Wrong addresses, servers and caches of remote data: a clear end, its exit code, no traceback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from dist import transfer
from dist.dataset import Dataset
from dist.errors import describe
from launch import data as verb
from tests.make_dataset import write_dataset

PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("bad") / "data")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(transfer, "RETRIES", transfer.Retries(tries=3, first_pause_s=0.001))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


class Server(ThreadingHTTPServer):
    """Answers /KIND/NAME as a server of that kind would."""

    daemon_threads = True
    folder: Path

    def handle_error(self, request: object, client_address: object) -> None:
        pass


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        _, kind, name = self.path.split("/", 2)
        path, say = self.server.folder / name, self._say
        pages = ("page", f"page-{name.partition('/')[0]}")  # of all names, or of one folder
        if kind.isdigit():
            say(int(kind))
        elif kind in pages:
            say(200, PAGE)
        elif kind == "loop":
            say(302, b"", "Location", self.path)
        elif kind == "drop":
            self.close_connection = True
        elif kind == "other-range" and self.headers.get("Range"):
            say(206, b"x" * 10, "Content-Range", "bytes 5-14/100")
        elif not path.is_file():
            say(404)
        else:  # without ranges
            say(200, path.read_bytes())

    def _say(self, status: int, body: bytes = b"", *header: str) -> None:
        self.send_response(status)
        if header:
            self.send_header(*header)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def url(local: Dataset) -> Iterator[str]:
    server = Server(("127.0.0.1", 0), _Answers)
    server.folder = Path(local.storage.url)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def said(*arguments: str) -> tuple[str, int]:
    """Message and exit code of `leyden data ...`; an error that has none is a bug and is raised."""
    began = time.monotonic()
    try:
        found = "", verb.main(list(arguments))
    except Exception as error:
        described = describe(error)
        if described is None:
            raise
        found = described
    assert time.monotonic() - began < 60.0
    return found


@pytest.mark.parametrize("action", ["verify", "inspect"])
@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("404", 2, "no dataset at {url}/404: there is no LATEST; pass the folder"),
        ("403", 4, "no permission to read {url}/403/LATEST: HTTP 403"),
        ("401", 4, "no permission to read {url}/401/LATEST: HTTP 401"),
        ("400", 4, "{url}/400/LATEST cannot be read: HTTP 400 Bad Request; check the address"),
        ("500", 4, "{url}/500/LATEST cannot be read after 3 tries: HTTP 500"),
        ("page", 3, "{url}/page/LATEST holds '<!DOCTYPE html>"),
        ("page", 3, "it is a web page: is a log-in in the way"),
        ("page-manifests", 3, "it is a web page"),
        ("page-manifests", 3, "it is a web page: is a log-in in the way"),
        ("page-shards", 3, "{url}/page-shards"),
        ("loop", 4, "{url}/loop/LATEST cannot be read"),
        ("drop", 4, "{url}/drop/LATEST cannot be read after 3 tries"),
        ("other-range", 4, "cannot be read: HTTP 206 answers bytes=0-"),
    ],
)
def test_a_bad_server_is_named(action: str, kind: str, code: int, words: str, url: str) -> None:
    """A traceback, a page taken for data, or an error that does not say which address it means."""
    message, found = said(action, f"{url}/{kind}")
    assert found == code and words.format(url=url) in message


def test_a_server_without_ranges_serves(url: str) -> None:
    """A plain file server, refused though each of its answers holds what was asked for."""
    assert said("verify", f"{url}/plain") == ("", 0)
    assert said("inspect", f"{url}/plain") == ("", 0)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://", "names no host; write http://HOST/FOLDER"),
        ("http:/host/data", "names no host; write http://HOST/FOLDER"),
        ("http:///data", "names no host"),
        ("http://[::1/data", "is not a web address: Invalid IPv6"),
        ("http://host:port/data", "is not a web address: Port could not be cast"),
        ("http://:80/data", "names no host"),
        ("http://host/my data", "holds ' ', which a web address cannot; write %20 for it"),
        ("http://host/gr\u00fcn", "write %C3%BC for it"),
        ("http://host/data?token=1", "what follows ? would come before the names"),
        ("HTTP://host/data", "write http:// in small letters"),
        ("s3://", "names no bucket; write s3://BUCKET/FOLDER"),
        ("s3:///data", "names no bucket"),
        ("foo://host/data", "is not a URL that fsspec knows"),
    ],
)
def test_an_address_that_cannot_be_is_refused_at_once(
    address: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a minute of retries for a slip of the pen; or a local folder of that name."""
    monkeypatch.setattr(transfer, "RETRIES", transfer.Retries(tries=8, first_pause_s=60.0))
    message, code = said("verify", address)
    assert code == 2 and words in message


def test_a_cache_of_no_use_is_named(
    url: str, monkeypatch: pytest.MonkeyPatch, small_disk: Callable[[str], Path], tmp_path: Path
) -> None:
    """A traceback where shards cannot be kept: a disk that is read-only, full, or no folder."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    message, code = said("inspect", f"{url}/plain")
    assert code == 4 and f"{tmp_path}/file/leyden/shards cannot be used: Not a dir" in message
    disk = small_disk("16k")
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
    message, code = said("inspect", f"{url}/plain")
    assert code == 4 and "but a shard has 17" in message
    assert f"{disk}/leyden/shards may hold" in message and "data.cache_dir" in message


def test_a_disk_of_one_shard_is_enough_to_inspect(
    url: str, monkeypatch: pytest.MonkeyPatch, small_disk: Callable[[str], Path]
) -> None:
    """A minute of waiting for itself, then an end: paths that were lent and are of no more use."""
    disk = small_disk("36k")
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
    began = time.monotonic()
    assert said("inspect", f"{url}/plain") == ("", 0)
    assert time.monotonic() - began < 30.0
    assert len(list(disk.rglob("*.arrow"))) == 1


@pytest.mark.parametrize("action", ["verify", "inspect"])
def test_a_bucket_that_cannot_be_read_is_named(
    action: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback of botocore, or minutes, for a bucket that is not there or no credentials."""
    message, code = said(action, "s3://no-such-bucket/data")
    assert code == 2 and "no dataset at s3://no-such-bucket/data" in message
    message, code = said(action, "s3://leyden/no-such-folder")
    assert code == 2 and "no dataset at s3://leyden/no-such-folder" in message
