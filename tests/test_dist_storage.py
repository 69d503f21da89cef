"""Storage by URL: the same promises on local folders, memory and a real S3 server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist.errors import ConfigError, SetupError
from dist.storage import Storage


@pytest.fixture(params=["file", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "file":
        return Storage(str(tmp_path / "root"))
    if request.param == "memory":
        return Storage(f"memory://{tmp_path.name}")
    request.getfixturevalue("s3_server")
    return Storage(f"s3://leyden/{tmp_path.name}")


def test_files_appear_whole_and_are_found(storage: Storage) -> None:
    """A stale listing, or a size read from a cache, would hide what another process wrote."""
    assert storage.size("a/b") is None and not storage.exists("a/b") and storage.list("a") == []
    storage.write_atomic("a/b", b"one")
    assert storage.read("a/b") == b"one" and storage.size("a/b") == 3
    storage.write_atomic("a/b", b"second")
    assert storage.read("a/b") == b"second" and storage.size("a/b") == 6
    storage.write_atomic("a/c", b"")
    assert storage.list("a") == ["a/b", "a/c"]
    storage.delete("a/b")
    storage.delete("a/b")
    assert storage.list("a") == ["a/c"] and storage.size("a") is None


def test_one_of_two_creators_wins(storage: Storage) -> None:
    """Two drivers that both think they hold the target would both commit."""
    assert storage.create_exclusive("lease", b"first")
    assert not storage.create_exclusive("lease", b"second")
    assert storage.read("lease") == b"first"


def test_put_is_idempotent(storage: Storage, tmp_path: Path) -> None:
    """A retried task must find its own file and leave it alone."""
    local = tmp_path / "made"
    local.write_bytes(b"x" * 1000)
    for _ in range(2):
        storage.put_file(local, "shards/d.arrow")
        assert storage.size("shards/d.arrow") == 1000
    assert storage.list("shards") == ["shards/d.arrow"]


def test_a_missing_file_is_named_in_full(storage: Storage) -> None:
    """'No such file' without the URL sends the user searching."""
    with pytest.raises(FileNotFoundError) as caught:
        storage.read("manifests/x.json")
    assert caught.value.filename == f"{storage.url}/manifests/x.json"


def test_names_cannot_leave_the_root(storage: Storage) -> None:
    """A crafted manifest could otherwise read or write any file."""
    with pytest.raises(ConfigError, match="leaves the folder"):
        storage.read("../secret")


def test_unknown_schemes_say_what_to_do() -> None:
    """fsspec's own words do not tell the user what was wrong with the URL."""
    with pytest.raises(ConfigError, match="nosuch://"):
        Storage("nosuch://bucket/x")


def test_a_reader_never_sees_a_half_written_file(tmp_path: Path) -> None:
    """A plain open-and-write would show an empty or short LATEST now and then."""
    storage, stop = Storage(str(tmp_path)), threading.Event()
    storage.write_atomic("LATEST", b"a" * 4096)

    def write() -> None:
        while not stop.is_set():
            for letter in b"ab":
                storage.write_atomic("LATEST", bytes([letter]) * 4096)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {(len(data := storage.read("LATEST")), len(set(data))) for _ in range(2000)}
    finally:
        stop.set()
        writer.join()
    assert seen == {(4096, 1)}
    assert os.listdir(tmp_path) == ["LATEST"], "temporary files left behind"


def test_no_permission_is_said(tmp_path: Path) -> None:
    """A read-only target must fail with its name and exit code 4, without a traceback."""
    tmp_path.chmod(0o755)
    code = (
        "import os, sys\n"
        "from dist.errors import run_main\n"
        "from dist.storage import Storage\n"
        "target = Storage(sys.argv[1])\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "else: os.chmod(sys.argv[1], 0o500)\n"
        "run_main(lambda: target.write_atomic('LATEST', b'x'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4
    assert done.stderr.startswith("error: no permission: ") and str(tmp_path) in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """s3:// without s3fs must name the package, not raise ImportError."""
    import fsspec

    def absent(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(SetupError, match="pip install s3fs"):
        Storage("s3://bucket/x")


def test_object_store_leases_are_exclusive_under_contention(
    s3_server: str,
) -> None:
    """A check followed by a write lets two drivers in; the conditional PUT does not."""
    wins: list[int] = []

    def attempt(number: int) -> None:
        if Storage("s3://leyden/race").create_exclusive("lease", str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=attempt, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert Storage("s3://leyden/race").read("lease") == str(wins[0]).encode()


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    import fsspec

    yield
    fsspec.filesystem("memory").store.clear()
