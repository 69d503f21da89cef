"""Open a dataset version: resolve the reference once, check its identity, find rows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist.cache import CacheConfig, Lease, NodeCache, node_cache
from dist.cached_file import read_cached
from dist.data_pin import is_pin, read_pin
from dist.errors import ConfigError, DataRefused
from dist.example_lengths import parse_lengths
from dist.manifest import Manifest, Shard, parse_reference
from dist.references import (
    MIXED,
    mixed_references,
    parse_provenance,
    read_manifest,
    version_at,
)
from dist.split_table import MixedSplit, SplitTable
from dist.storage import Storage
from dist.transfer import read_small
from dist.web_address import address_problem

_PATHS_KEPT = 2
_OPENED_AFTER_S = 10.0
"""Whoever asked for a path has opened it by then, and a map outlives the file's name."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset version, bound by its digest; nothing here changes when LATEST does."""

    storage: Storage
    manifest: Manifest
    data_digest: str
    cache_config: CacheConfig = CacheConfig()
    """Where shards are kept if the dataset is remote."""
    _lent: OrderedDict[str, tuple[Lease, float, int]] = field(
        default_factory=OrderedDict, repr=False, compare=False
    )
    """What shard_path() lent, when (monotonic) and to which thread."""

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

    @property
    def sources(self) -> tuple[Dataset, ...]:
        """What it is mixed of; itself alone for most."""
        return (self,)

    @property
    def schema(self) -> dict[str, Any]:
        """What a model and a loader need of the rows (of examples: dist/examples.py)."""
        return self.manifest.schema

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
        return self._read_named(f"tokenizers/{digest}.json", digest, "tokenizer")

    def read_template(self) -> str:
        """Chat template that made the text; DataRefused if it is missing or another."""
        digest = str(self.manifest.schema["template_digest"])
        return self._read_named(f"templates/{digest}.jinja", digest, "chat template").decode()

    def read_lengths(
        self, *, fresh: bool = False
    ) -> dict[str, list[NDArray[np.unsignedinteger]]] | None:
        """By split the tokens of each example, (rows,) of each shard; None if they were not kept.

        Those of a remote dataset come through the node's cache, unless `fresh`. DataRefused if the
        file is missing or damaged.
        """
        digest = self.manifest.lengths_digest
        if digest is None:
            return None
        name = f"lengths/{digest}.arrow"

        def fetch() -> bytes:
            return self._read_named(name, digest, "table of lengths")

        through = self.is_remote and not fresh
        data = read_cached(self.cache.folder, digest, fetch) if through else fetch()
        parts = parse_lengths(data, self.manifest.shards, f"{self.storage.url}/{name}")
        found: dict[str, list[NDArray[np.unsignedinteger]]] = {}
        for shard, lengths in zip(self.manifest.shards, parts, strict=True):
            found.setdefault(shard.split, []).append(lengths)
        return found

    def _read_named(self, name: str, digest: str, what: str) -> bytes:
        """A small file that is named by its SHA-256; DataRefused if it is missing or another.

        A remote one that is another is fetched once more, as shards are.
        """
        url, found = f"{self.storage.url}/{name}", ""
        for _ in range(2 if self.is_remote else 1):
            try:
                data = read_small(self.storage, name)
            except FileNotFoundError:
                raise DataRefused(
                    f"the {what} of the dataset is missing: {url}; restore it, or run the prep "
                    "job again"
                ) from None
            found = hashlib.sha256(data).hexdigest()
            if found == digest:
                return data
        raise DataRefused(
            f"{url} is another {what}: its SHA-256 is {found}; restore the file, or run the "
            "prep job again"
        )

    def shard_path(self, shard: Shard) -> Path:
        """Where a shard can be mapped from; a remote one is fetched and its bytes checked.

        It then stays in the node's cache until two others were asked for, or one where there is
        no room for another; open it at once.
        """
        path = self.storage.local_path(f"shards/{shard.name}")
        if path is not None:
            return path
        cache = self.cache
        if self._give_lent not in cache.holders:
            cache.holders.append(self._give_lent)
        lease = self.hold(shard)
        assert lease is not None
        if (before := self._lent.pop(shard.name, None)) is not None:
            before[0].release()
        self._lent[shard.name] = lease, time.monotonic(), threading.get_ident()
        while len(self._lent) > _PATHS_KEPT:
            self._lent.popitem(last=False)[1][0].release()
        return lease.path

    def _give_lent(self) -> bool:
        """Give the path back that was lent first, if it was opened by now; else False."""
        try:
            name, (lease, lent_at, thread) = next(iter(self._lent.items()))
            # A thread that asks for another has opened what it was lent before.
            if thread != threading.get_ident() and time.monotonic() - lent_at < _OPENED_AFTER_S:
                return False
            del self._lent[name]
        except (StopIteration, KeyError, RuntimeError):  # another thread gave it
            return False
        lease.release()
        return True

    def hold(self, shard: Shard, stop: threading.Event | None = None) -> Lease | None:
        """A remote shard in the node's cache, to be released after use; None where it is local.

        Waits until it is there: Cancelled after `stop`.
        """
        return self.cache.acquire(self.storage, shard, stop) if self.is_remote else None

    def remote_shards(self, split: SplitTable) -> list[bool]:
        """Which shards of a split come through the node's cache, in their order."""
        return [self.is_remote] * len(split.shards)

    def read_provenance(self) -> dict[str, Any] | None:
        """How this version was made: inputs, config, versions, counters; None if it is gone.

        DataRefused if a file is damaged that may have told it.
        """
        damaged = []
        for name in self.storage.list("provenance"):
            if Path(name).name.startswith("."):
                continue  # a torn write
            record = parse_provenance(self.storage.read(name), Path(name).stem)
            if record is None:
                damaged.append(name)
            elif record.get("data_digest") == self.data_digest:
                return record
        if damaged:
            raise DataRefused(
                f"{self.storage.url}/{damaged[0]} is damaged, and no other file of provenance/ "
                f"tells how the version {self.data_digest[:12]} was made; restore it, or delete "
                "it to give up what it told"
            )
        return None


@dataclass(frozen=True, kw_only=True)
class MixedDataset(Dataset):
    """Several datasets with one tokenizer and one length of rows, laid end to end.

    Row and shard numbers of a split run on from one source to the next, so one number names a row.
    `storage` and `manifest.schema` are the first one's; the manifest lists all shards.
    """

    names: tuple[str, ...]
    parts: tuple[Dataset, ...]

    @property
    def reference(self) -> str:
        listed = [[name, part.reference] for name, part in zip(self.names, self.parts, strict=True)]
        return f"{MIXED}{json.dumps(listed, separators=(',', ':'))}@{self.data_digest}"

    @property
    def sources(self) -> tuple[Dataset, ...]:
        return self.parts

    @property
    def schema(self) -> dict[str, Any]:
        return self.parts[0].schema

    def split(self, name: str) -> SplitTable:
        tables = [part.split(name) for part in self.parts if name in part.manifest.splits()]
        rows = [np.diff(table.row_start) for table in tables]
        return MixedSplit(
            name=name,
            shards=tuple(shard for table in tables for shard in table.shards),
            row_start=np.concatenate([np.zeros(1, np.int64), *rows]).cumsum(),
            tables=tuple(tables),
        )

    def remote_shards(self, split: SplitTable) -> list[bool]:
        return [self._owner(shard).is_remote for shard in split.shards]

    def shard_path(self, shard: Shard) -> Path:
        return self._owner(shard).shard_path(shard)

    @cached_property
    def _owners(self) -> dict[str, Dataset]:
        # Names are digests, so of several any will do; a local one costs least.
        parts = sorted(self.parts, key=lambda part: not part.is_remote)
        return {shard.name: part for part in parts for shard in part.manifest.shards}

    def _owner(self, shard: Shard) -> Dataset:
        """A source that holds a shard."""
        try:
            return self._owners[shard.name]
        except KeyError:
            names = ", ".join(self.names)
            raise ValueError(f"{shard.name} is of none of the sources {names}") from None

    @property
    def is_remote(self) -> bool:
        return any(part.is_remote for part in self.parts)

    def hold(self, shard: Shard, stop: threading.Event | None = None) -> Lease | None:
        return self._owner(shard).hold(shard, stop)


def first_rows(dataset: Dataset, split: str) -> NDArray[np.int64]:
    """Where the rows of each source begin in a split, (sources + 1,); [0, N] for one dataset."""
    rows = [
        one.split(split).num_rows if split in one.manifest.splits() else 0
        for one in dataset.sources
    ]
    return np.cumsum([0, *rows], dtype=np.int64)


def mix(names: Sequence[str], parts: Sequence[Dataset]) -> MixedDataset:
    """Datasets as one; ConfigError names two of them that cannot be trained on together."""
    first = parts[0].manifest
    for name, part in zip(names, parts, strict=True):
        theirs = part.manifest
        pairs: dict[str, tuple[Any, Any]] = {"kind": (first.kind, theirs.kind)}
        pairs["tokenizer"] = (first.tokenizer_digest, theirs.tokenizer_digest)
        for key in ("seq_len", "token_dtype", "vocab_size", "bos_id", "eos_id"):
            pairs[key] = (parts[0].schema.get(key), part.schema.get(key))
        for what, (one, other) in pairs.items():
            if one != other:
                raise ConfigError(
                    f"the sources {names[0]} and {name} differ in {what}: {one} and {other}; write "
                    "them with one tokenizer, seq_len and ends of documents"
                )
    totals: dict[str, dict[str, int]] = {}
    for part in parts:
        for split, counts in part.manifest.totals.items():
            into = totals.setdefault(split, dict.fromkeys(counts, 0))
            for key, count in counts.items():
                into[key] += count
    manifest = dataclasses.replace(
        first, shards=tuple(s for part in parts for s in part.manifest.shards), totals=totals,
        lengths_digest=None,  # of each part alone
    )  # fmt: skip
    listed = [[name, part.data_digest] for name, part in zip(names, parts, strict=True)]
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return MixedDataset(
        storage=parts[0].storage, manifest=manifest, data_digest=digest,
        cache_config=parts[0].cache_config, names=tuple(names), parts=tuple(parts),
    )  # fmt: skip


def open_one(reference: str, cache: CacheConfig | None = None) -> Dataset:
    """As open_dataset, where a mixture says nothing; ConfigError lists its datasets."""
    dataset = open_dataset(reference, cache)
    if not isinstance(dataset, MixedDataset):
        return dataset
    listed = ", ".join(
        f"{name}: {part.reference}"
        for name, part in zip(dataset.names, dataset.parts, strict=True)
    )  # fmt: skip
    raise ConfigError(
        f"that names a mixture of {len(dataset.parts)} datasets; pass one of them: {listed}"
    )


def _open_mixed(reference: str, cache: CacheConfig | None) -> MixedDataset:
    listed = mixed_references(reference)
    made = mix([name for name, _ in listed], [open_dataset(one, cache) for _, one in listed])
    if made.data_digest != reference.rpartition("@")[2]:
        raise DataRefused(f"the sources of {reference[:80]}... are other versions than it names")
    return made


def open_dataset(reference: str, cache: CacheConfig | None = None) -> Dataset:
    """Open `URL` (its LATEST, resolved now), `URL@hexprefix`, or a pin file; `cache` for a remote
    one.

    Or several of them, by the reference of a MixedDataset. Raises ConfigError for a reference that
    names nothing or several versions, DataRefused for a manifest whose bytes do not match its name.
    """
    if reference.startswith(MIXED):
        return _open_mixed(reference, cache)
    url, prefix = parse_reference(reference)
    if problem := address_problem(url):
        raise ConfigError(problem)
    if is_pin(url):
        return _open_pin(url, prefix, cache)
    storage = Storage(url)
    digest = version_at(storage, prefix)
    manifest = read_manifest(storage, digest)
    return Dataset(
        storage=storage, manifest=manifest, data_digest=digest, cache_config=cache or CacheConfig()
    )


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
