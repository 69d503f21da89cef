"""Rows of a run that went on with derived versions, in the numbers of what it began with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dist.dataset import Dataset, MixedDataset, first_rows, open_dataset
from dist.errors import ConfigError
from dist.examples import ExampleDataset, as_rows, keep_rows
from dist.lineage import RowRef, rows_of_key
from dist.run_dir import RunDir
from dist.source_versions import MIXTURE, removed_of
from dist.stages import Stages, first_numbers, read_stages

TRAIN = "train"
Version = tuple[int, str, list[int]]
"""(source, reference, rows of the source's first version that this one lacks)"""


def rows_of_run_key(run: RunDir, first: Dataset, key: str, *, progress: bool) -> list[RowRef]:
    """Rows that a key names, in the numbers of the run's first dataset.

    A shard may be one of a version that the run switched to.
    """
    try:
        return rows_of_key(first, key, progress=progress, stamps=run.path / "verified")
    except ConfigError:
        names = getattr(first, "names", ("",))
        wanted, _, rest = key.partition("/")
        if wanted not in names:
            wanted, rest = "", key
        for source, reference, removed in _versions(run, first):
            if wanted and names[source] != wanted:
                continue
            derived = open_dataset(reference)
            prefix = rest.partition(":")[0]
            if any(shard.name.startswith(prefix) for shard in derived.manifest.shards):
                derived = as_rows_of(first, derived, removed)
                found = rows_of_key(derived, rest, progress=progress)
                return [_in_first(one, first, source, removed) for one in found]
        raise


def removed_rows(run: RunDir, first: Dataset) -> dict[int, str]:
    """Rows of train that the run left out in the end -> the first version that lacks each."""
    begins = first_rows(first, TRAIN)
    return {
        int(begins[source]) + row: reference.rpartition("@")[2]
        for source, reference, removed in _versions(run, first)
        for row in removed
    }


def _versions(run: RunDir, first: Dataset) -> Iterator[Version]:
    """The versions that a run switched to, the newest one first."""
    if not isinstance(first, MixedDataset):
        lines = read_stages(run).lines
        for number in reversed(range(len(lines))):
            yield 0, lines[number]["data"], Stages(lines=lines[: number + 1]).removed
        return
    seen = set()
    for line in reversed(run.read_lines(MIXTURE)):
        gone = removed_of(line["stages"])
        for source, entry in enumerate(line["sources"]):
            if "first" in entry and entry["data_digest"] not in seen:
                seen.add(entry["data_digest"])
                yield source, entry["data"], gone.get(source, [])


def as_rows_of(first: Dataset, derived: Dataset, removed: list[int]) -> Dataset:
    """A derived version as rows like the first one's: its packed examples lie where they lay."""
    if not isinstance(first, ExampleDataset):
        return derived
    return keep_rows(as_rows(derived, first.packing, first.seq_len), first, removed)


def _in_first(found: RowRef, first: Dataset, source: int, removed: list[int]) -> RowRef:
    row = first_numbers([found.row], removed)[0] if found.split == TRAIN else found.row
    if not isinstance(first, MixedDataset):
        return replace(found, row=row)
    begin = int(first_rows(first, found.split)[source])
    return replace(found, row=begin + row, source=first.names[source], source_row=row)
