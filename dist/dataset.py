"""Open a dataset version: resolve the reference once, check its identity, find rows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist.errors import ConfigError, DataRefused, SetupError
from dist.manifest import Manifest, Shard, parse_reference
from dist.shard_file import PackedShard
from dist.storage import Storage


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

    def open_shard(self, number: int, path: Path) -> Any:
        """Shard `number`, which lies at `path`, as rows."""
        return PackedShard(path)

    def rows_of_records(self, number: int, records: NDArray[np.integer]) -> NDArray[np.int64]:
        """Rows of the split that hold the given records of shard `number`, ascending."""
        return self.row_start[number] + np.unique(records)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset version, bound by its digest; nothing here changes when LATEST does."""

    storage: Storage
    manifest: Manifest
    data_digest: str

    @property
    def reference(self) -> str:
        """`URL@digest`, which names this version for ever."""
        return f"{self.storage.url}@{self.data_digest}"

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
        name = f"tokenizers/{digest}.json"
        try:
            data = self.storage.read(name)
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
        """Where a shard can be mapped from."""
        path = self.storage.local_path(f"shards/{shard.name}")
        if path is None:
            raise SetupError(
                f"{self.storage.url} is remote and this version trains from local folders only; "
                "copy the dataset's folder to a disk of the node and pass that"
            )
        return path

    def read_provenance(self) -> dict[str, Any] | None:
        """How this version was made: inputs, config, versions, counters; None if it is gone."""
        for name in self.storage.list("provenance"):
            record = json.loads(self.storage.read(name))
            if record.get("data_digest") == self.data_digest:
                return dict(record)
        return None


def open_dataset(reference: str) -> Dataset:
    """Open `URL` (its LATEST, resolved now) or `URL@hexprefix`.

    Raises ConfigError for a reference that names nothing or several versions, DataRefused for a
    manifest whose bytes do not match its name.
    """
    url, prefix = parse_reference(reference)
    storage = Storage(url)
    digest = _latest(storage) if prefix is None else _complete(storage, prefix)
    try:
        data = storage.read(f"manifests/{digest}.json")
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
    return Dataset(storage=storage, manifest=manifest, data_digest=digest)


def _latest(storage: Storage) -> str:
    try:
        text = storage.read("LATEST").decode("ascii", "replace").strip()
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
    what = "no version" if not found else f"{len(found)} versions"
    raise ConfigError(f"{what} of {storage.url} start with {prefix}; it has {have}")
