"""Which rows a key names: a row of a split, a row of a shard, or every row of a source file.

A source is found by the lineage columns that each row carries (doc_input, doc_offset), scanned
in all shards; nothing else is read of them.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist.arrow_view import numpy_view
from dist.checked_shards import checked_path
from dist.dataset import Dataset, MixedDataset, first_rows
from dist.errors import ConfigError
from dist.progress import Progress
from dist.split_table import SplitTable

I64 = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RowRef:
    """A row of a dataset: by its split, and by its shard's digest."""

    split: str
    row: int
    shard: str
    row_in_shard: int
    source: str = ""
    """Of a mixture, whose rows are numbered from one source on to the next."""
    source_row: int = -1
    """Row of that source's split."""

    @property
    def name(self) -> str:
        """As a key."""
        if self.source:
            return f"{self.source}/{self.split}:{self.source_row}"
        return f"{self.split}:{self.row}"


def rows_of_key(
    dataset: Dataset, key: str, *, progress: bool = True, stamps: Path | None = None
) -> list[RowRef]:
    """Rows that a key names; see who_saw. A source is looked for in all shards of all splits.

    stamps: see checked_path.
    """
    if isinstance(dataset, MixedDataset):
        return _rows_of_mixture(dataset, key, progress, stamps)
    paths = input_paths(dataset)
    if (number := _input_number(paths, key)) is not None:
        return rows_of_source(dataset, number, None, progress=progress, stamps=stamps)
    if match := re.fullmatch(r"([^:]+):(\d+)", key):
        name, row = match[1], int(match[2])
        if name in dataset.manifest.splits():
            split = dataset.split(name)
            if row >= split.num_rows:
                raise ConfigError(f"row {row}: the split {name} has rows 0 to {split.num_rows - 1}")
            return refs_of(split, np.array([row]))
        if re.fullmatch(r"[0-9a-f]{4,32}(\.arrow)?", name):
            return [_row_of_shard(dataset, name.removesuffix(".arrow"), row)]
    path, at, offset = key.rpartition("@")
    if at and offset.isdigit() and (number := _input_number(paths, path)) is not None:
        return rows_of_source(dataset, number, int(offset), progress=progress, stamps=stamps)
    close = difflib.get_close_matches(key, [one for pair in paths for one in pair], n=1)
    raise ConfigError(
        f"{key!r} names nothing in {dataset.storage.url}"
        + (f"; did you mean {close[0]!r}? " if close else "; ")
        + f"pass SPLIT:ROW (splits: {', '.join(dataset.manifest.splits())}), SHARD_DIGEST:ROW, "
        f"or the path of one of its {len(paths)} inputs, also as PATH@OFFSET"
    )


def _rows_of_mixture(
    dataset: MixedDataset, key: str, progress: bool, stamps: Path | None
) -> list[RowRef]:
    """SOURCE/KEY in that source; a shard's row or an input also without SOURCE, in all of them."""
    name, _, rest = key.partition("/")
    chosen = [name] if name in dataset.names and rest else list(dataset.names)
    if len(chosen) > 1:
        split, _, row = key.rpartition(":")
        if split in dataset.manifest.splits() and row.isdigit():
            raise ConfigError(
                f"{key} names a row of each source; say which: "
                + ", ".join(f"{one}/{key}" for one in dataset.names)
            )
        rest = key
    found: list[RowRef] = []
    problems = []
    for one in chosen:
        part = dataset.parts[dataset.names.index(one)]
        try:
            rows = rows_of_key(part, rest, progress=progress, stamps=stamps)
        except ConfigError as error:
            problems.append(f"{one}: {error}")
            continue
        for split in dict.fromkeys(ref.split for ref in rows):
            own = np.array([ref.row for ref in rows if ref.split == split], np.int64)
            first = int(first_rows(dataset, split)[dataset.names.index(one)])
            found += refs_of(dataset.split(split), first + own, dataset)
    if not found:
        raise ConfigError("; ".join(problems))
    return found


def input_paths(dataset: Dataset) -> list[tuple[str, str]]:
    """(path, URL) of each input, as the provenance lists them; [] if the provenance is gone."""
    record = dataset.read_provenance() or {}
    listed = record.get("inputs") or []
    return [
        (str(item.get("path", "")), str(item.get("url", "")))
        if isinstance(item, dict)
        else (str(item), str(item))
        for item in listed
    ]


def rows_of_source(
    dataset: Dataset, number: int, offset: int | None, *, progress: bool = True,
    stamps: Path | None = None,
) -> list[RowRef]:  # fmt: skip
    """Rows that hold a piece of input `number`, or of its document at `offset`."""
    found: list[RowRef] = []
    starts: list[NDArray[np.int64]] = []
    total = sum(shard.bytes for shard in dataset.manifest.shards)
    with Progress("scan lineage", total / 1e6, "MB", enabled=progress) as bar:
        for name in dataset.manifest.splits():
            split = dataset.split(name)
            for index, shard in enumerate(split.shards):
                rows, offsets = lineage_hits(checked_path(dataset, shard, stamps), number)
                starts.append(offsets)
                if offset is not None:
                    rows = rows[offsets == offset]
                found += refs_of(split, split.rows_of_records(index, rows))
                bar.update(shard.bytes / 1e6, f"{len(found):,} rows found")
    if not found and offset is not None:
        have = np.unique(np.concatenate(starts))
        near = have[np.argsort(np.abs(have - offset))[:3]].tolist()
        raise ConfigError(
            f"no document of that input starts at {offset}; the nearest that do: "
            f"{', '.join(map(str, sorted(near))) or 'none, as none of it is in the data'}"
        )
    return found


def lineage_hits(path: Path, number: int) -> tuple[I64, I64]:
    """(record, document offset) of each piece of input `number` in a shard, two (k,) arrays.

    A record is a row of the file: of examples one example. Only the lineage columns are read from
    the map.
    """
    rows: list[I64] = []
    offsets: list[I64] = []
    start = 0
    with pa.memory_map(str(path), "r") as source:
        reader = pa.ipc.open_file(source)
        for i in range(reader.num_record_batches):
            batch = reader.get_batch(i)
            inputs, places = batch.column("doc_input"), batch.column("doc_offset")
            if pa.types.is_list(inputs.type):
                hits = np.flatnonzero(numpy_view(inputs.values) == number)
                # Rows without pieces share their border with the next row: the last one owns it.
                row = np.searchsorted(numpy_view(inputs.offsets), hits, side="right") - 1
                places = places.values
            else:  # examples: one origin a row
                row = hits = np.flatnonzero(numpy_view(inputs) == number)
            rows.append(start + row)
            offsets.append(numpy_view(places)[hits].astype(np.int64))
            start += batch.num_rows
            del batch, inputs, places
    empty = np.empty(0, np.int64)
    return np.concatenate([empty, *rows]), np.concatenate([empty, *offsets])


def _input_number(paths: list[tuple[str, str]], name: str) -> int | None:
    """Index of the input called `name`: its path, its URL, or an ending of one URL alone."""
    exact = [i for i, pair in enumerate(paths) if name in pair]
    found = exact or [i for i, (_, url) in enumerate(paths) if url.endswith(f"/{name}")]
    if len(found) > 1:
        urls = ", ".join(paths[i][1] for i in found[:5])
        raise ConfigError(f"{name!r} names {len(found)} inputs: {urls}; pass the whole path")
    return found[0] if found else None


def _row_of_shard(dataset: Dataset, prefix: str, row: int) -> RowRef:
    found = [shard for shard in dataset.manifest.shards if shard.name.startswith(prefix)]
    if len(found) != 1:
        raise ConfigError(
            f"{len(found) or 'no'} shards of {dataset.storage.url} start with {prefix}"
            + (f" ({', '.join(shard.name for shard in found[:3])})" if found else "")
        )
    shard = found[0]
    if row >= shard.rows:
        raise ConfigError(f"row {row}: the shard {shard.name} has rows 0 to {shard.rows - 1}")
    split = dataset.split(shard.split)
    return refs_of(split, split.rows_of_records(split.shards.index(shard), np.array([row])))[0]


def refs_of(split: SplitTable, rows: I64, dataset: Dataset | None = None) -> list[RowRef]:
    """Rows (k,) of a split with their shards, and of a mixture with their sources."""
    shard, local = split.locate(rows)
    refs = [
        RowRef(split=split.name, row=row, shard=split.shards[s].name, row_in_shard=i)
        for row, s, i in zip(rows.tolist(), shard.tolist(), local.tolist(), strict=True)
    ]
    if not isinstance(dataset, MixedDataset):
        return refs
    first = first_rows(dataset, split.name)
    source = np.searchsorted(first, rows, side="right") - 1
    return [
        replace(ref, source=dataset.names[s], source_row=ref.row - int(first[s]))
        for ref, s in zip(refs, source.tolist(), strict=True)
    ]
