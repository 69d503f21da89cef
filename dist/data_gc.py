"""Deletes what no version of a dataset refers to: shards, tokenizers, lengths, refused rows,
torn writes.

Never what a manifest in manifests/ names, never a file younger than the age, and never while a
job writes: gc holds the same lease as a job. A job that lost its lease is safe by the age, as
whatever it published or found in place was renewed then (Storage.put_file).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dist.commit import target_lease
from dist.errors import ConfigError, DataRefused
from dist.lease import holder_gone
from dist.manifest import Manifest
from dist.storage import Storage

OLDER_THAN = "7d"
FOLDERS = ("shards", "tokenizers", "lengths", "quarantine")
_TEMPORARY_IN = (*FOLDERS, "manifests", "provenance", "jobs", "")
_OURS = re.compile(
    r"shards/[0-9a-f]{32}\.arrow|tokenizers/[0-9a-f]{64}\.json|lengths/[0-9a-f]{64}\.arrow|"
    r"quarantine/[0-9a-f]{32}\.parquet"
)
# Those of the lease are other processes that ask for it, at any moment and without it.
_TEMPORARY = re.compile(r"(.*/)?\.(?!lease\.json)[^/]+\.[0-9a-f]{8}\.tmp")
TORN_AFTER_S = 3600.0
"""A temporary file that is younger may be a write in progress, whatever --older-than says."""
_AGE = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(kw_only=True)
class Collected:
    """What gc found, and deleted unless it was a dry run."""

    garbage: dict[str, int] = field(default_factory=dict)
    """Name -> bytes of what was (or would be) deleted."""
    young: dict[str, int] = field(default_factory=dict)
    """Unreferenced, but younger than the age, or of unknown age."""
    versions: int = 0
    kept: int = 0
    """Files that versions refer to."""
    foreign: list[str] = field(default_factory=list)
    """Names that are not Leyden's; left alone."""


def parse_age(text: str) -> float:
    """Seconds of `7d`, `12h`, `30m` or `90s`."""
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--older-than {text!r} is not a number with a unit, as 7d, 12h or 30m")
    return float(match[1]) * _UNITS[match[2]]


def collect(
    storage: Storage, older_than_s: float, *, dry_run: bool = False, now: float | None = None
) -> Collected:
    """Delete what nothing refers to and is older than the age; see the module.

    Raises SetupError while a job holds the lease, DataRefused where a manifest cannot be read,
    as what it refers to is not known then.
    """
    clock: Callable[[], float] = time.time if now is None else lambda: now
    if not storage.list("manifests"):
        _check_latest(storage, set())
        raise ConfigError(f"no dataset at {storage.url}: there is no manifest; pass its folder")
    if dry_run:
        return _collect(storage, older_than_s, clock, None)
    with target_lease(storage) as lease:
        return _collect(storage, older_than_s, clock, lease.check)


def _collect(
    storage: Storage, older_than_s: float, clock: Callable[[], float],
    check_lease: Callable[[], None] | None,
) -> Collected:  # fmt: skip
    """check_lease: None for a dry run."""
    found = Collected()
    referenced, found.versions = references(storage)
    for folder in _TEMPORARY_IN:
        for name in storage.list(folder):
            if name in referenced:
                found.kept += 1
                continue
            if not _OURS.fullmatch(name) and not _TEMPORARY.fullmatch(name):
                if folder in FOLDERS:
                    found.foreign.append(name)
                continue
            size = storage.size(name)
            if size is None:
                continue  # deleted by another meanwhile
            torn = _TEMPORARY.fullmatch(name) is not None
            age_s = max(older_than_s, TORN_AFTER_S) if torn else older_than_s
            if not _is_old(storage, name, age_s, clock):
                found.young[name] = size
                continue
            if check_lease is not None:
                check_lease()
                storage.delete(name)
            found.garbage[name] = size
    return found


def _is_old(storage: Storage, name: str, older_than_s: float, clock: Callable[[], float]) -> bool:
    """By its age at this moment, not when gc began."""
    try:
        changed = storage.changed(name)
    except FileNotFoundError:
        return False
    return changed is not None and clock() - changed >= older_than_s


def references(storage: Storage) -> tuple[set[str], int]:
    """Names of all files that a version refers to, and how many versions there are.

    DataRefused for a manifest that cannot be read, or a LATEST without its manifest.
    """
    names: set[str] = set()
    digests = set()
    for name in storage.list("manifests"):
        if _TEMPORARY.fullmatch(name):
            continue
        try:
            manifest = Manifest.from_json(storage.read(name))
        except DataRefused as error:
            raise DataRefused(
                f"{storage.url}/{name} cannot be read, so what it refers to is not known and "
                f"nothing is deleted: {error}"
            ) from None
        if name != f"manifests/{manifest.data_digest}.json":
            raise DataRefused(
                f"{storage.url}/{name} was changed: its SHA-256 is {manifest.data_digest}; restore "
                "it, nothing is deleted before"
            )
        digests.add(manifest.data_digest)
        names |= {name} | {f"shards/{shard.name}" for shard in manifest.shards}
        names.add(f"tokenizers/{manifest.tokenizer_digest}.json")
        names.add(f"lengths/{manifest.lengths_digest}.arrow")
    _check_latest(storage, digests)
    return names | _quarantine_files(storage, digests), len(digests)


def _check_latest(storage: Storage, digests: set[str]) -> None:
    try:
        latest = storage.read("LATEST").decode("ascii", "replace").strip()
    except FileNotFoundError:
        return
    if latest not in digests:
        raise DataRefused(
            f"{storage.url}/LATEST names the version {latest[:12]}, whose manifest is missing; "
            "restore it before anything is deleted"
        )


def _quarantine_files(storage: Storage, digests: set[str]) -> set[str]:
    """Files of refused rows that the provenance of a version names."""
    names = set()
    for name in storage.list("provenance"):
        if _TEMPORARY.fullmatch(name):
            continue
        try:
            record = json.loads(storage.read(name))
        except ValueError as error:
            raise DataRefused(
                f"{storage.url}/{name} is not JSON ({error}); restore or remove it, nothing is "
                "deleted before"
            ) from None
        quarantine = record.get("quarantine") if isinstance(record, dict) else None
        if quarantine and record.get("data_digest") in digests:
            names.add(str(quarantine["name"]))
    return names


def lease_note(storage: Storage) -> str:
    """Who holds the lease, for a dry run; '' if nobody alive does."""
    try:
        record = json.loads(storage.read("lease.json"))
    except (FileNotFoundError, ValueError):
        return ""
    if not isinstance(record, dict) or holder_gone(record, time.time()):
        return ""
    return f"process {record.get('pid')} on host {record.get('host')} writes there now"
