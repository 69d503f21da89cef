"""From finished files to a dataset version, exactly once.

Tasks publish content-named files; the driver, which hears one attempt of each task, writes what
refers to them: manifest, provenance, jobs entry, and LATEST last. Whatever was published by an
attempt that lost is referred to by nothing.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist.errors import DataRefused, SetupError
from dist.lease import Lease
from dist.manifest import Manifest, digest_of
from dist.shard_file import file_digest
from dist.storage import Storage
from dist.tokenizer import tokenizer_digest
from dist.transfer import REQUESTS_AT_ONCE, retried

LISTED_ABOVE = 64
"""With more shards in a store, the folder is listed: a request each takes 20 s for 10,000."""


def publish_shard(storage: Storage, local: Path, digest: str, num_bytes: int) -> str:
    """Publish a finished shard file under its content's name; idempotent. Returns the name."""
    if local.stat().st_size != num_bytes:
        raise SetupError(
            f"{local} has {local.stat().st_size} bytes where {num_bytes} were written; is the "
            "scratch disk full?"
        )
    name = f"shards/{digest}.arrow"
    storage.put_file(local, name)
    return name


def publish_tokenizer(storage: Storage, tokenizer_json: bytes) -> str:
    """Keep the tokenizer beside the data; returns its digest."""
    digest = tokenizer_digest(tokenizer_json)
    name = f"tokenizers/{digest}.json"
    if storage.size(name) != len(tokenizer_json) or not storage.renew(name):
        storage.write_atomic(name, tokenizer_json)
    return digest


def publish_template(storage: Storage, template: str) -> str:
    """Keep the chat template beside the data; returns its digest, SHA-256 of its UTF-8."""
    data = template.encode()
    digest = hashlib.sha256(data).hexdigest()
    name = f"templates/{digest}.jinja"
    if storage.size(name) != len(data):
        storage.write_atomic(name, data)
    return digest


def publish_lengths(storage: Storage, lengths: bytes) -> str:
    """Keep the lengths of examples (dist/example_lengths.py); returns their digest."""
    digest = hashlib.sha256(lengths).hexdigest()
    name = f"lengths/{digest}.arrow"
    if storage.size(name) != len(lengths) or not storage.renew(name):
        storage.write_atomic(name, lengths)
    return digest


def publish_quarantine(storage: Storage, local: Path) -> str:
    """Publish a file of refused rows under its content's name; returns the name."""
    name = f"quarantine/{file_digest(local)}.parquet"
    storage.put_file(local, name)
    return name


def target_lease(storage: Storage) -> Lease:
    """One driver on a target at a time; a second raises SetupError naming the first."""
    return Lease(storage, "lease.json", what=f"the dataset folder {storage.url}")


def find_job(storage: Storage, job_digest: str) -> str | None:
    """data_digest that a job committed, if it did and every file of it is still there."""
    try:
        entry = json.loads(storage.read(f"jobs/{job_digest}.json"))
        digest = str(entry["data_digest"])
        manifest = Manifest.from_json(storage.read(f"manifests/{digest}.json"))
    except (FileNotFoundError, KeyError, ValueError):
        return None
    complete = manifest.data_digest == digest and not missing_files(storage, manifest)
    return digest if complete else None


def make_latest(storage: Storage, digest: str) -> None:
    """Let LATEST name a version; a job that was killed just before that left none, or an older."""
    with suppress(FileNotFoundError):
        if storage.read("LATEST").decode(errors="replace").strip() == digest:
            return
    storage.write_atomic("LATEST", digest.encode() + b"\n")


def missing_files(storage: Storage, manifest: Manifest) -> list[str]:
    """Which shards are missing or of another size, and whether the lengths are; a line each."""
    problems = []
    if (lengths := manifest.lengths_digest) is not None:
        name = f"lengths/{lengths}.arrow"
        if retried(lambda: storage.size(name), f"{storage.url}/{name}") is None:
            problems.append(f"{name} is missing")
    for shard, size in zip(manifest.shards, _sizes(storage, manifest), strict=True):
        if size is None:
            problems.append(f"shards/{shard.name} is missing")
        elif size != shard.bytes:
            problems.append(f"shards/{shard.name} has {size} bytes instead of {shard.bytes}")
    return problems


def _sizes(storage: Storage, manifest: Manifest) -> list[int | None]:
    """Bytes of each shard where it lies, None where it is missing."""
    names = [f"shards/{shard.name}" for shard in manifest.shards]
    if storage.is_local:
        return [storage.size(name) for name in names]
    if len(names) > LISTED_ABOVE:  # a store lists a thousand a request; a web server none
        folder = Storage(f"{storage.url}/shards")
        with suppress(SetupError):  # some may read, but not list
            found = retried(folder.sizes, folder.url)
            if found:
                return [found.get(shard.name) for shard in manifest.shards]
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:  # a request each
        return list(
            pool.map(lambda n: retried(lambda: storage.size(n), f"{storage.url}/{n}"), names)
        )


def commit_dataset(
    storage: Storage,
    manifest: Manifest,
    provenance: dict[str, Any],
    job_digest: str,
    lease: Lease | None = None,
) -> str:
    """Make a dataset version visible: all of it or nothing. Returns its data_digest."""
    # The lease first: gc under a newer lease may delete shards, and the check must come after that.
    if lease is not None:
        lease.check()
    problems = missing_files(storage, manifest)
    if problems:
        raise DataRefused("not committed, as published files are gone: " + "; ".join(problems[:5]))
    data, digest = manifest.to_json(), manifest.data_digest
    name = f"manifests/{digest}.json"
    if storage.size(name) != len(data):
        storage.write_atomic(name, data)
    record = {**provenance, "data_digest": digest, "job_digest": job_digest}
    provenance_digest = digest_of(record)
    _write_json(storage, f"provenance/{provenance_digest}.json", record)
    entry = {"data_digest": digest, "provenance": provenance_digest}
    _write_json(storage, f"jobs/{job_digest}.json", entry)
    storage.write_atomic("LATEST", digest.encode() + b"\n")
    return digest


def _write_json(storage: Storage, name: str, record: dict[str, Any]) -> None:
    storage.write_atomic(name, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
