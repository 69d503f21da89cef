"""What a dataset reference names: one version at a place, or several as a mixture; and what is
told of a version."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dist.errors import ConfigError, DataRefused
from dist.manifest import Manifest, digest_of
from dist.storage import Storage
from dist.transfer import read_small

MIXED = "mix:"
"""How the reference of several datasets begins."""
_AT_DIGEST = ", and for one version @ and 6 to 64 hex digits of its digest"


def mixed_references(reference: str) -> list[tuple[str, str]]:
    """(name, reference) of each source that a MixedDataset's reference lists."""
    listed, _, _ = reference.removeprefix(MIXED).rpartition("@")
    try:
        found = [(str(name), str(one)) for name, one in json.loads(listed)]
    except (ValueError, TypeError):
        found = []
    if not found:
        raise ConfigError(
            f"{reference[:80]!r} is not the reference of a mixture, as `mixture.jsonl` and "
            "`run.json` of a run hold it"
        )
    return found


def version_at(storage: Storage, prefix: str | None) -> str:
    """The data_digest that starts with `prefix`; without one that of LATEST. ConfigError if there
    is none, or several."""
    return _latest(storage) if prefix is None else _complete(storage, prefix)


def read_manifest(storage: Storage, digest: str) -> Manifest:
    """The manifest of a version; DataRefused if it is missing, or its bytes do not match its
    name."""
    url = storage.url
    try:
        data = read_small(storage, f"manifests/{digest}.json")
    except FileNotFoundError:
        raise DataRefused(
            f"{url} names the version {digest[:12]} but manifests/{digest}.json is missing; "
            "restore it, or run the prep job again"
        ) from None
    try:  # first: of a newer version's file it is to be said that Leyden is too old
        manifest = Manifest.from_json(data)
    except DataRefused as error:
        raise DataRefused(f"{url}/manifests/{digest}.json: {error}{_as_page(data)}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise DataRefused(
            f"{url}/manifests/{digest}.json was changed: its SHA-256 is {found}; restore it, or "
            "run the prep job again"
        )
    return manifest


def parse_provenance(data: bytes, digest: str) -> dict[str, Any] | None:
    """A file of provenance/, which is named by the digest of its record; None if it is another."""
    try:
        record = json.loads(data)
        return record if digest_of(record) == digest else None
    except (ValueError, RecursionError):
        return None


def _latest(storage: Storage) -> str:
    try:
        text = read_small(storage, "LATEST").decode("ascii", "replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"no dataset at {storage.url}: there is no LATEST; pass the folder that a prep job "
            f"wrote (its `output`){_AT_DIGEST if '@' in storage.url.rpartition('/')[2] else ''}"
        ) from None
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise DataRefused(
            f"{storage.url}/LATEST holds {text[:80]!r}, not a data digest"
            f"{_as_page(text.encode())}; pass the folder that a prep job wrote (its `output`)"
        )
    return text


def _complete(storage: Storage, prefix: str) -> str:
    """The one version whose digest starts with `prefix`."""
    if len(prefix) == 64:
        return prefix
    stems = [Path(name).stem for name in storage.list("manifests") if name.endswith(".json")]
    found = [stem for stem in stems if stem.startswith(prefix)]
    if len(found) == 1:
        return found[0]
    have = ", ".join(stem[:12] for stem in stems) or "none"
    if not stems and storage.url.startswith(("http://", "https://")):
        raise ConfigError(
            f"{storage.url}@{prefix}: a web server lists no versions; give all 64 digits of the "
            "digest, or the URL alone for its newest version"
        )
    what = f"{len(found)} versions of {storage.url} start" if found else (
        f"no version of {storage.url} starts"
    )  # fmt: skip
    raise ConfigError(f"{what} with {prefix}; it has {have}")


def _as_page(data: bytes) -> str:
    """A hint where a server answered with a page, as those behind a log-in do."""
    start = data[:200].lstrip().lower()
    page = start.startswith((b"<!doctype html", b"<html"))
    return " (it is a web page: is a log-in in the way, or is the address wrong?)" if page else ""
