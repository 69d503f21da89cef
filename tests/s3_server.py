"""A real S3 server (moto, over HTTP on loopback) with a bucket `leyden`: conftest's `s3_server`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

SERVERS: list[Any] = []


def watched_puts(
    refuse: Callable[[int, str], bool],
) -> AbstractContextManager[list[str]]:
    """The server answers 403 to PUTs and POSTs for which refuse(number from 1, path) says so.

    Yields the paths of all of them, as they come.
    """
    return _watched(("PUT", "POST"), refuse)


def watched_gets(
    refuse: Callable[[int, str], bool],
) -> AbstractContextManager[list[str]]:
    """As watched_puts, for GETs."""
    return _watched(("GET",), refuse)


@contextmanager
def _watched(methods: tuple[str, ...], refuse: Callable[[int, str], bool]) -> Iterator[list[str]]:
    server, seen = SERVERS[-1]._server, []
    original = server.app

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] in methods and "delete" not in environ["QUERY_STRING"]:
            seen.append(environ["PATH_INFO"])
            if refuse(len(seen), environ["PATH_INFO"]):
                start_response("403 FORBIDDEN", [("Content-Type", "application/xml")])
                return [b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"]
        return original(environ, start_response)

    server.app = app
    try:
        yield seen
    finally:
        server.app = original


@contextmanager
def running_server() -> Iterator[str]:
    """Starts the server and points botocore's own variables at it; yields its URL."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    SERVERS.append(server)
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    settings = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with mock.patch.dict(os.environ, settings):
        boto3.client("s3").create_bucket(Bucket="leyden")
        yield url
    server.stop()
