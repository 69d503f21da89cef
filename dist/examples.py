"""A dataset of examples as rows of one width: packed by an index, or padded one by one.

`as_rows` gives the dataset the looks of packed tokens: its splits count rows, a shard is opened as
rows, and a row's pieces are its examples. So order, resume, who-saw and every rank count rows,
which follow from (data_digest, packing, seq_len) alone. A row's examples lie in one shard: shards
are packed one by one, which costs at most a part of a row each and keeps the order's locality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dist.checked_shards import checked_path
from dist.dataset import Dataset, MixedDataset, mix
from dist.errors import ConfigError, DataRefused
from dist.example_file import ExampleShard
from dist.example_gather import gather_examples
from dist.pack_index import PackIndex, one_a_row, pack_best_fit
from dist.row_gather import GatheredRows
from dist.split_table import SplitTable

Packing = Literal["packed", "padded"]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


class ExampleRows:
    """A shard of examples, opened as rows of `width` tokens; stands in for PackedShard.

    lengths: those that the index was made of, (examples,); DataRefused if the shard has others.
    """

    def __init__(
        self, path: Path, index: PackIndex, width: int, lengths: NDArray[np.integer]
    ) -> None:
        self._shard, self.index, self._width = ExampleShard(path), index, width
        self.num_rows, self.places = index.num_rows, self._shard.places
        if not np.array_equal(self._shard.lengths(), lengths):
            self._shard.close()
            raise DataRefused(
                f"the examples of {path} have other lengths than the dataset's table of lengths "
                "tells; run the prep job again"
            )

    def gather(self, rows: I64) -> GatheredRows:
        """Copies of rows (k,)."""
        return gather_examples([self], np.zeros_like(rows), rows, self._width)

    def trained_runs(self, row: int) -> I32:
        """(runs, 2) how many tokens of a row are left out, then trained; they sum to `width`."""
        runs = self.gather(np.array([row])).runs
        assert runs is not None
        return runs

    def tokens(self, start: int, stop: int) -> NDArray[np.uint32]:
        """Tokens of rows start to stop, (stop - start, width)."""
        return self.gather(np.arange(start, stop)).tokens

    def lineage(self, row: int) -> list[tuple[int, int, int]]:
        """(input index, offset, tokens) of each example of a row."""
        return [
            (*self._shard.origin(example), len(self._shard.example_tokens(example)))
            for example in self.index.examples_of(row).tolist()
        ]

    def close(self) -> None:
        """Drop the map."""
        self._shard.close()


@dataclass(frozen=True, kw_only=True)
class ExampleSplit(SplitTable):
    """A split whose rows are made of examples; row_start counts rows, not examples."""

    packs: tuple[PackIndex, ...]
    """Of each shard."""
    lengths: tuple[NDArray[np.integer], ...]
    """Of the examples of each shard, (examples,)."""
    width: int
    num_tokens: int

    def open_shard(self, number: int, path: Path) -> Any:
        """Shard `number`, which lies at `path`, as rows."""
        return ExampleRows(path, self.packs[number], self.width, self.lengths[number])

    def rows_of_records(self, number: int, records: NDArray[np.integer]) -> I64:
        """Rows of the split that hold the given examples of shard `number`, ascending."""
        return np.unique(self.row_start[number] + self.packs[number].rows_of(records))

    def records_of(self, number: int, rows: NDArray[np.integer]) -> I64:
        """Examples of shard `number` that make its rows (k,), counted in the shard; ascending."""
        of = self.packs[number].examples_of
        return np.unique(np.concatenate([of(row) for row in np.asarray(rows).tolist()]))

    @property
    def padding(self) -> float:
        """Share of all rows' tokens that is padding."""
        return 1 - self.num_tokens / max(self.num_rows * self.width, 1)


@dataclass(frozen=True, kw_only=True)
class ExampleDataset(Dataset):
    """Examples as rows of seq_len + 1 tokens."""

    packing: Packing
    seq_len: int
    began: ExampleDataset | None = None
    """The version whose packed rows of train are kept, where the run began with another one."""
    gone: tuple[int, ...] = ()
    """Rows of train of `began` that this version lacks."""
    made: dict[str, ExampleSplit] = field(default_factory=dict, compare=False, repr=False)
    """Splits that were made already."""
    table: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The table of lengths, once it was read."""

    @property
    def schema(self) -> dict[str, Any]:
        """What a model and a loader need: the manifest's, and the rows' seq_len."""
        return {**self.manifest.schema, "seq_len": self.seq_len}

    def split(self, name: str) -> ExampleSplit:
        """The rows of one split; the first time, the length of every example of it is read.

        From the table of lengths, or where the dataset has none from every shard.
        """
        if name not in self.made:
            self.made[name] = self._make(name)
        return self.made[name]

    def _make(self, name: str) -> ExampleSplit:
        width = self.seq_len + 1
        shards = self.manifest.shards_of(name)
        packs, tokens = [], 0
        told = self.lengths_of(name)
        kept = self._kept_packs() if self.began is not None and name == "train" else []
        for number, (shard, lengths) in enumerate(zip(shards, told, strict=True)):
            if len(lengths) != shard.rows or lengths.min() < 1:
                raise DataRefused(
                    f"{shard.name} is damaged: it tells of {len(lengths)} examples, the shortest "
                    f"of {lengths.min(initial=0)} tokens; copy it anew, or run the prep job again"
                )
            if lengths.max() > width:
                longest = int(np.argmax(lengths))
                raise ConfigError(
                    f"{int((lengths > width).sum())} examples of {shard.name} are longer than "
                    f"data.seq_len + 1 = {width} tokens; the longest, row {longest}, has "
                    f"{lengths[longest]}: set data.seq_len to {self.manifest.schema['max_length']} "
                    "or more, or write the dataset anew with a smaller max_length, which truncates"
                )
            tokens += int(lengths.sum())
            if kept:
                packs.append(kept[number])
            elif self.packing == "padded":
                packs.append(one_a_row(len(lengths)))
            else:
                packs.append(pack_best_fit(lengths, width))
        if tokens != self.manifest.totals[name]["tokens"]:
            raise DataRefused(
                f"the shards of {name} tell of {tokens:,} tokens, the manifest of "
                f"{self.manifest.totals[name]['tokens']:,}: one is damaged (leyden data verify)"
            )
        row_start = np.concatenate(([0], np.cumsum([pack.num_rows for pack in packs])))
        return ExampleSplit(
            name=name, shards=shards, row_start=row_start.astype(np.int64), packs=tuple(packs),
            lengths=tuple(told), width=width, num_tokens=tokens,
        )  # fmt: skip

    def _kept_packs(self) -> list[PackIndex]:
        """The rows of `began` but those that are gone, of each shard that has any."""
        assert self.began is not None
        first = self.began.split("train")
        number, local = first.locate(np.array(self.gone, np.int64))
        kept = []
        for n, pack in enumerate(first.packs):
            lost = [pack.examples_of(row) for row in local[number == n].tolist()]
            kept.append(pack.without(np.concatenate([np.empty(0, np.int32), *lost]))[0])
        kept = [pack for pack in kept if pack.num_rows]
        shards = self.manifest.shards_of("train")
        if [len(pack.examples) for pack in kept] != [shard.rows for shard in shards]:
            raise DataRefused(
                f"{self.reference} is not {self.began.reference} without {len(self.gone)} of its "
                "packed rows; stages.jsonl of the run was edited"
            )
        return kept

    def lengths_of(self, name: str) -> Sequence[NDArray[np.integer]]:
        """Of the examples of each shard of a split, (examples,) each."""
        if self.manifest.lengths_digest is not None:
            if not self.table:
                self.table.update(self.read_lengths() or {})
            return self.table[name]
        found = []
        for shard in self.manifest.shards_of(name):
            opened = ExampleShard(checked_path(self, shard))  # a remote one is fetched
            found.append(opened.lengths())
            opened.close()
        return found

    def describe(self, name: str) -> str:
        """A split's rows in one line, with what padding costs."""
        split = self.split(name)
        return (
            f"{name}: {self.manifest.totals[name]['rows']:,} examples, {self.packing} into "
            f"{split.num_rows:,} rows of {self.seq_len} + 1 tokens, {split.padding:.2%} padding"
        )


def as_rows(dataset: Dataset, packing: str = "packed", seq_len: int = 0) -> Dataset:
    """The dataset as rows to train on: examples are packed or padded, packed tokens stay.

    seq_len 0 is the dataset's own (of examples: max_length). Raises ConfigError for settings that
    do not fit the kind.
    """
    schema = dataset.manifest.schema
    if dataset.manifest.kind != "examples":
        if packing != "packed" or seq_len not in (0, schema["seq_len"]):
            raise ConfigError(
                f"data.packing {packing!r} and data.seq_len {seq_len} are for datasets of "
                f"examples; {dataset.storage.url} was packed into rows of {schema['seq_len']} "
                "tokens when it was written: leave them out"
            )
        return dataset
    if packing not in ("packed", "padded"):
        raise ConfigError(f"data.packing {packing!r} is not packed or padded")
    if isinstance(dataset, MixedDataset):
        return mix(dataset.names, [as_rows(part, packing, seq_len) for part in dataset.parts])
    if seq_len < 0:
        raise ConfigError(f"data.seq_len is {seq_len}; give 0 (as long as the examples) or more")
    return ExampleDataset(
        storage=dataset.storage, manifest=dataset.manifest, data_digest=dataset.data_digest,
        cache_config=dataset.cache_config,
        packing="padded" if packing == "padded" else "packed",
        seq_len=seq_len or int(schema["max_length"]),
    )  # fmt: skip


def keep_rows(dataset: Dataset, first: Dataset, gone: Sequence[int]) -> Dataset:
    """Packed rows of `first` without `gone` of train, read from the version that lacks them.

    dataset: of as_rows; all but packed examples stays as it is: it has the same rows anyway.
    """
    if not isinstance(dataset, ExampleDataset) or dataset.packing == "padded" or not gone:
        return dataset
    began = as_rows(first, dataset.packing, dataset.seq_len)
    assert isinstance(began, ExampleDataset)
    return replace(dataset, began=began, gone=tuple(gone), made={}, table={})


def rows_of_records(split: SplitTable, records: Sequence[int]) -> list[int]:
    """Rows of a split that these records of its files make up, ascending; ValueError if they are
    some examples only of a packed row."""
    if not isinstance(split, ExampleSplit):
        return sorted(records)
    starts = np.cumsum([0, *(shard.rows for shard in split.shards)])
    number = np.searchsorted(starts, records, side="right") - 1
    found: list[int] = []
    for n in np.unique(number).tolist():
        local = np.array(records, np.int64)[number == n] - starts[n]
        found += (split.row_start[n] + split.packs[n].without(local)[1]).tolist()
    return found


def records_of_rows(split: SplitTable, rows: Sequence[int]) -> list[int]:
    """The inverse: records of a split's files, numbered through its shards, ascending."""
    if not isinstance(split, ExampleSplit):
        return sorted(rows)
    starts = np.cumsum([0, *(shard.rows for shard in split.shards)])
    number, local = split.locate(np.array(rows, np.int64))
    found: list[int] = []
    for n, row in zip(number.tolist(), local.tolist(), strict=True):
        found += (starts[n] + split.packs[n].examples_of(row)).tolist()
    return sorted(found)


def rows_as_trained(dataset: Dataset, config: dict[str, Any]) -> Dataset:
    """The dataset as a run with this resolved config (run.json's) trains on it.

    A dataset of another kind than the run's is taken as it is.
    """
    if dataset.manifest.kind != "examples":
        return dataset
    data = config.get("data") or {}
    return as_rows(dataset, data.get("packing") or "packed", int(data.get("seq_len") or 0))
