"""How two dataset versions differ: shards, totals, config, inputs, and documents of one alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from dist.arrow_view import numpy_view
from dist.checked_shards import checked_path
from dist.dataset import Dataset
from dist.lineage import input_paths
from dist.manifest import TOTALS, Shard
from dist.progress import Progress

LISTED = 20
Change = tuple[Any, Any]
_FACTS = ("size", "stamp", "format")


@dataclass(kw_only=True)
class Difference:
    """What A has and B has not, and the other way round; all empty if they are equal."""

    a: str
    b: str
    shared: int = 0
    shared_bytes: int = 0
    added: list[str] = field(default_factory=list)
    """Shards of B alone, by name."""
    gone: list[str] = field(default_factory=list)
    totals: dict[str, dict[str, Change]] = field(default_factory=dict)
    """Per split the totals that differ."""
    identity: dict[str, Change] = field(default_factory=dict)
    """Kind, tokenizer and keys of the schema that differ."""
    config: dict[str, Change] = field(default_factory=dict)
    inputs: dict[str, list[str]] = field(default_factory=dict)
    """added, gone and changed: paths of inputs."""
    documents: dict[str, Any] = field(default_factory=dict)
    """only_a and only_b (counts), listed_a and listed_b (`PATH@OFFSET`), or unknown (why)."""

    @property
    def equal(self) -> bool:
        return self.a.rpartition("@")[2] == self.b.rpartition("@")[2]


def diff_datasets(a: Dataset, b: Dataset, *, progress: bool = True) -> Difference:
    """Compare two versions; lineage is read of the shards that they do not share."""
    found = Difference(a=a.reference, b=b.reference)
    if found.equal:
        found.shared = len(a.manifest.shards)
        found.shared_bytes = sum(shard.bytes for shard in a.manifest.shards)
        return found
    ours, theirs = ({s.name: s for s in one.manifest.shards} for one in (a, b))
    shared = ours.keys() & theirs.keys()
    found.shared = len(shared)
    found.shared_bytes = sum(ours[name].bytes for name in shared)
    found.added = [name for name in theirs if name not in shared]
    found.gone = [name for name in ours if name not in shared]
    found.totals = _totals(a, b)
    found.identity = _changed(_identity(a), _identity(b))
    first, second = a.read_provenance() or {}, b.read_provenance() or {}
    found.config = _changed(
        {**_plain(first.get("config")), "job": first.get("job"), "code": first.get("code")},
        {**_plain(second.get("config")), "job": second.get("job"), "code": second.get("code")},
    )
    found.inputs = _inputs(first, second)
    found.documents = _documents(a, b, shared, progress)
    return found


def _plain(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _identity(dataset: Dataset) -> dict[str, Any]:
    manifest = dataset.manifest
    schema = {f"schema.{key}": value for key, value in manifest.schema.items()}
    return {"kind": manifest.kind, "tokenizer": manifest.tokenizer_digest, **schema}


def _changed(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Change]:
    keys = sorted(first.keys() | second.keys())
    pairs = {key: (first.get(key), second.get(key)) for key in keys}
    # A key that one job lacks and the other leaves empty says nothing.
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b and (a or b)}


def _totals(a: Dataset, b: Dataset) -> dict[str, dict[str, Change]]:
    found = {}
    for split in dict.fromkeys([*a.manifest.splits(), *b.manifest.splits()]):
        pair = [one.manifest.totals.get(split, dict.fromkeys(TOTALS, 0)) for one in (a, b)]
        if changed := _changed(*pair):
            found[split] = changed
    return found


def _inputs(first: dict[str, Any], second: dict[str, Any]) -> dict[str, list[str]]:
    """Paths that were added, are gone, or name other bytes; {} if nothing or nothing is known."""
    ours, theirs = (_facts_by_path(record) for record in (first, second))
    found = {
        "added": sorted(theirs.keys() - ours.keys()),
        "gone": sorted(ours.keys() - theirs.keys()),
        "changed": sorted(p for p in ours.keys() & theirs.keys() if ours[p] != theirs[p]),
    }
    return {key: paths for key, paths in found.items() if paths}


def _facts_by_path(record: dict[str, Any]) -> dict[str, list[Any]]:
    listed = [one if isinstance(one, dict) else {"path": one} for one in record.get("inputs", [])]
    return {str(one.get("path")): [one.get(key) for key in _FACTS] for one in listed}


def _documents(a: Dataset, b: Dataset, shared: set[str], progress: bool) -> dict[str, Any]:
    """Documents, by (split, input path, offset), that only one of the two holds."""
    for one in (a, b):
        if one.storage.local_path("") is None:
            return {"unknown": f"{one.storage.url} is remote, and its rows are not read"}
    # Input numbers of two versions mean the same only where the lists of inputs are equal.
    same_inputs = input_paths(a) == input_paths(b)
    left_out = shared if same_inputs else set()
    total = sum(s.bytes for one in (a, b) for s in one.manifest.shards if s.name not in left_out)
    with Progress("read lineage", total / 1e6, "MB", enabled=progress) as bar:
        ours, theirs = (_lineage(one, left_out, bar, keep=False) for one in (a, b))
        only_a, only_b = _minus(ours, theirs), _minus(theirs, ours)
        if left_out and (only_a.num_rows or only_b.num_rows):
            # A document may reach over a row's end into a shard that both have.
            both = _lineage(a, left_out, bar, keep=True)
            only_a, only_b = _minus(only_a, both), _minus(only_b, both)
    return {
        "only_a": only_a.num_rows, "only_b": only_b.num_rows,
        "listed_a": _listed(only_a), "listed_b": _listed(only_b),
    }  # fmt: skip


_KEYS = ["split", "path", "offset"]


def _lineage(dataset: Dataset, names: set[str], bar: Progress, *, keep: bool) -> pa.Table:
    """Distinct documents of the shards in `names` (keep) or of the others, as a table of _KEYS."""
    listed = input_paths(dataset)
    tables = [_empty()]
    for shard in dataset.manifest.shards:
        if (shard.name in names) == keep:
            tables.append(_of_shard(dataset, shard, listed))
            bar.update(shard.bytes / 1e6)
    return pa.concat_tables(tables).group_by(_KEYS).aggregate([])


def _empty() -> pa.Table:
    types = (pa.string(), pa.string(), pa.int64())
    return pa.table({k: pa.array([], t) for k, t in zip(_KEYS, types, strict=True)})


def _of_shard(dataset: Dataset, shard: Shard, listed: list[tuple[str, str]]) -> pa.Table:
    path = checked_path(dataset, shard)
    inputs, offsets = [], []
    with pa.memory_map(str(path), "r") as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            numbers, places = batch.column("doc_input"), batch.column("doc_offset")
            if pa.types.is_list(numbers.type):  # of examples one origin a row
                numbers, places = numbers.values, places.values
            inputs.append(numpy_view(numbers))
            offsets.append(numpy_view(places))
        pairs = np.unique(np.stack([np.concatenate(inputs), np.concatenate(offsets)]), axis=1)
        del inputs, offsets, numbers, places, batch, reader
    names = [listed[i][0] if i < len(listed) else f"input {i}" for i in pairs[0].tolist()]
    splits = pa.array([shard.split] * len(names), pa.string())
    return pa.table(
        {"split": splits, "path": pa.array(names, pa.string()), "offset": pa.array(pairs[1])}
    )


def _minus(ours: pa.Table, theirs: pa.Table) -> pa.Table:
    return ours.join(theirs, _KEYS, join_type="left anti")


def _listed(table: pa.Table) -> list[str]:
    """The first LISTED documents as `split PATH@OFFSET`."""
    order = [(key, "ascending") for key in _KEYS]
    rows = table.sort_by(order).slice(0, LISTED).to_pylist() if table.num_rows else []
    return [f"{row['split']} {row['path']}@{row['offset']}" for row in rows]
