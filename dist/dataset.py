"""Open a dataset version: resolve the reference once, check its identity, find rows."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist.cache import CacheConfig, Lease, NodeCache, node_cache
from dist.data_pin import is_pin, read_pin
from dist.errors import ConfigError, DataRefused
from dist.manifest import Manifest, Shard, parse_reference
from dist.storage import Storage
from dist.transfer import retried

_PATHS_KEPT = 2


@dataclass(frozen=True, kw_only=True)
class SplitTable:
    """The shards of one split and where their rows start in it."""

    name: str
    shards: tuple[Shard, ...]
    row_start: NDArray[np.int64]
    """(shards + 1,) cumulative rows."""

    @property
    def num_rows(self) -> int:
        return int(self.row_start[-1])

    def locate(self, rows: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(shard index, row in that shard) of rows of the split, two (k,) arrays."""
        rows = np.asarray(rows, np.int64)
        shard = np.searchsorted(self.row_start, rows, side="right") - 1
        return shard, rows - self.row_start[shard]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset version, bound by its digest; nothing here changes when LATEST does."""

    storage: Storage
    manifest: Manifest
    data_digest: str
    cache_config: CacheConfig = CacheConfig()
    """Where shards are kept if the dataset is remote."""
    _lent: OrderedDict[str, Lease] = field(default_factory=OrderedDict, repr=False, compare=False)

    @property
    def is_remote(self) -> bool:
        """Whether shards have to be fetched before they can be mapped."""
        return not self.storage.is_local

    @property
    def cache(self) -> NodeCache:
        """The node's cache of remote shards."""
        return node_cache(self.cache_config)

    @property
    def reference(self) -> str:
        """`URL@digest`, which names this version for ever."""
        return f"{self.storage.url}@{self.data_digest}"

    def split(self, name: str) -> SplitTable:
        """The rows of one split."""
        shards = self.manifest.shards_of(name)
        row_start = np.concatenate(([0], np.cumsum([shard.rows for shard in shards])))
        return SplitTable(name=name, shards=shards, row_start=row_start.astype(np.int64))

    def read_tokenizer(self) -> bytes:
        """tokenizer.json that made the tokens; DataRefused if it is missing or another."""
        digest = self.manifest.tokenizer_digest
        if digest is None:
            raise DataRefused(f"the dataset {self.storage.url} was written without a tokenizer")
        name = f"tokenizers/{digest}.json"
        try:
            data = _read(self.storage, name)
        except FileNotFoundError:
            raise DataRefused(
                f"the tokenizer of the dataset is missing: {self.storage.url}/{name}"
            ) from None
        found = hashlib.sha256(data).hexdigest()
        if found != digest:
            raise DataRefused(
                f"{self.storage.url}/{name} is another tokenizer: its SHA-256 is {found}; "
                "restore the file, or run the prep job again"
            )
        return data

    def shard_path(self, shard: Shard) -> Path:
        """Where a shard can be mapped from; a remote one is fetched and its bytes checked.

        It then stays in the node's cache until two others were asked for.
        """
        path = self.storage.local_path(f"shards/{shard.name}")
        if path is not None:
            return path
        lease = self.hold(shard)
        assert lease is not None
        if (before := self._lent.pop(shard.name, None)) is not None:
            before.release()
        self._lent[shard.name] = lease
        while len(self._lent) > _PATHS_KEPT:
            self._lent.popitem(last=False)[1].release()
        return lease.path

    def hold(self, shard: Shard, stop: threading.Event | None = None) -> Lease | None:
        """A remote shard in the node's cache, to be released after use; None where it is local.

        Waits until it is there: Cancelled after `stop`.
        """
        return self.cache.acquire(self.storage, shard, stop) if self.is_remote else None

    def read_provenance(self) -> dict[str, Any] | None:
        """How this version was made: inputs, config, versions, counters; None if it is gone."""
        for name in self.storage.list("provenance"):
            record = json.loads(self.storage.read(name))
            if record.get("data_digest") == self.data_digest:
                return dict(record)
        return None


def open_dataset(reference: str, cache: CacheConfig | None = None) -> Dataset:
    """Open `URL` (its LATEST, resolved now), `URL@hexprefix`, or a pin file; `cache` for a remote
    one.

    Raises ConfigError for a reference that names nothing or several versions, DataRefused for a
    manifest whose bytes do not match its name.
    """
    url, prefix = parse_reference(reference)
    if is_pin(url):
        return _open_pin(url, prefix, cache)
    storage = Storage(url)
    digest = _latest(storage) if prefix is None else _complete(storage, prefix)
    try:
        data = _read(storage, f"manifests/{digest}.json")
    except FileNotFoundError:
        raise DataRefused(
            f"{url} names the version {digest[:12]} but manifests/{digest}.json is missing; "
            "restore it, or run the prep job again"
        ) from None
    manifest = Manifest.from_json(data)
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise DataRefused(
            f"{url}/manifests/{digest}.json was changed: its SHA-256 is {found}; restore it, "
            "or run the prep job again"
        )
    return Dataset(
        storage=storage, manifest=manifest, data_digest=digest, cache_config=cache or CacheConfig()
    )


def _read(storage: Storage, name: str) -> bytes:
    """A small file; from a store, with retries and errors that say what to do."""
    if storage.is_local:
        return storage.read(name)
    return retried(functools.partial(storage.read, name), f"{storage.url}/{name}")


def _open_pin(path: str, prefix: str | None, cache: CacheConfig | None) -> Dataset:
    reference = read_pin(Path(path.removeprefix("file://")))
    url, digest = reference.rsplit("@", 1)
    if prefix is not None and not digest.startswith(prefix):
        raise ConfigError(f"{path} pins the version {digest[:12]}, not one that starts {prefix}")
    try:
        return open_dataset(reference, cache)
    except DataRefused as error:
        if Storage(url).exists("LATEST"):
            raise
        raise ConfigError(
            f"{path} names {url}, and there is no dataset ({error}); where it lies now, pass its "
            f"place with @{digest[:12]} in place of the pin, as in --data.url PLACE@{digest[:12]}"
        ) from None


def _latest(storage: Storage) -> str:
    try:
        text = _read(storage, "LATEST").decode("ascii", "replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"no dataset at {storage.url}: there is no LATEST; pass the folder that a prep job "
            "wrote (its `output`)"
        ) from None
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise DataRefused(f"{storage.url}/LATEST holds {text[:80]!r}, not a data digest")
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
    what = "no version" if not found else f"{len(found)} versions"
    raise ConfigError(f"{what} of {storage.url} start with {prefix}; it has {have}")
