"""Whole documents of a packed dataset again, in the order in which they were packed.

The Packer cuts a document only where its row is full. So the first piece of a row goes on with
the last piece of the row before if that row is full and both name the same document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist.arrow_view import numpy_view
from dist.checked_shards import checked_path
from dist.dataset import Dataset, open_dataset
from dist.errors import ConfigError, DataRefused
from dist.example_file import ExampleShard
from dist.packing import PackedRows

I64 = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Some documents one after the other."""

    tokens: NDArray[np.integer]
    """(sum(lengths),)"""
    lengths: I64
    """(documents,)"""
    inputs: I64
    """(documents,) index into the provenance's inputs."""
    offsets: I64
    """(documents,) where in that input the document starts."""
    trained: NDArray[np.bool_] | None = None
    """(sum(lengths),) of examples: which tokens are trained as targets."""


def shard_rows(path: Path | str) -> Iterator[PackedRows]:
    """Rows of a shard by record batch, zero-copy views of the map."""
    with pa.memory_map(str(path), "r") as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            yield rows_of_batch(reader.get_batch(number))


def rows_of_batch(batch: pa.RecordBatch) -> PackedRows:
    """A record batch as rows; the inverse of shard_file.packed_batch."""
    tokens, lens = batch.column("tokens"), batch.column("doc_lens")
    return PackedRows(
        tokens=numpy_view(tokens.values).reshape(len(batch), -1),
        row_splits=numpy_view(lens.offsets).astype(np.int64),
        doc_lens=numpy_view(lens.values),
        doc_input=numpy_view(batch.column("doc_input").values),
        doc_offset=numpy_view(batch.column("doc_offset").values),
    )


def used_tokens(rows: PackedRows) -> I64:
    """(n,) tokens of each row that are not padding."""
    total = np.concatenate(([0], np.cumsum(rows.doc_lens, dtype=np.int64)))
    return total[rows.row_splits[1:]] - total[rows.row_splits[:-1]]


def read_documents(dataset: Dataset, split: str) -> Iterator[Documents]:
    """Every document of a split, a few thousand at a time; DataRefused for a damaged shard."""
    joiner = Joiner(breaks_of(dataset, split))
    for shard in dataset.manifest.shards_of(split):
        for rows in shard_rows(checked_path(dataset, shard)):
            found = joiner.add(rows)
            if found is not None:
                yield found
    last = joiner.flush()
    if last is not None:
        yield last


def read_examples(dataset: Dataset, split: str) -> Iterator[Documents]:
    """Every example of a split as a document, a record batch's rows at a time."""
    rows_at_once = dataset.manifest.schema["rows_per_batch"]
    for entry in dataset.manifest.shards_of(split):
        shard = ExampleShard(checked_path(dataset, entry))
        for start in range(0, shard.num_rows, rows_at_once):
            stop = min(start + rows_at_once, shard.num_rows)
            rows = [shard.read(row) for row in range(start, stop)]
            lengths = np.array([len(one.tokens) for one in rows], np.int64)
            trained = np.zeros(int(lengths.sum()), bool)
            for one, at in zip(rows, (np.cumsum(lengths) - lengths).tolist(), strict=True):
                for first, last in one.spans.tolist():
                    trained[at + first : at + last] = True
            yield Documents(
                tokens=np.concatenate([one.tokens for one in rows]), lengths=lengths,
                inputs=np.array([one.input for one in rows], np.int64),
                offsets=np.array([one.offset for one in rows], np.int64), trained=trained,
            )  # fmt: skip
        shard.close()


def breaks_of(dataset: Dataset, split: str) -> list[int]:
    """Rows of a derived version before which rows were taken out: nothing goes on over those."""
    record = dataset.read_provenance() or {}
    removed = record.get("removed") or {}
    if "breaks" in record or removed.get("split") != split:
        return list((record.get("breaks") or {}).get(split, []))
    # Derived before 2026-11-29: it tells its own step, and its parents theirs.
    try:
        parent = open_dataset(f"{dataset.storage.url}@{record['parent']}")
    except (ConfigError, DataRefused):
        return breaks_after([], removed["rows"])
    return breaks_after(breaks_of(parent, split), removed["rows"])


def breaks_after(breaks: Sequence[int], removed: Sequence[int]) -> list[int]:
    """Such rows of a version, where those of its parent are `breaks` and it lacks rows `removed`
    (ascending) of that one: in this version's numbers, ascending."""
    known = np.array([*breaks, *removed], np.int64)
    return np.unique(known - np.searchsorted(np.array(removed, np.int64), known)).tolist()


class Joiner:
    """Joins the pieces of successive rows; its state is the last document, which may go on."""

    def __init__(self, breaks: Iterable[int] = (), row: int = 0) -> None:
        """breaks: of breaks_of(); row: number of the first row to come."""
        self._breaks = set(breaks)
        self._row = row
        self._full = False
        self._tokens: NDArray[np.integer] = np.empty(0, np.uint16)
        self._open = np.empty((3, 0), np.int64)  # length, input, offset of the open document

    def add(self, rows: PackedRows) -> Documents | None:
        """Take rows in order; returns the documents that are complete, or None."""
        if not len(rows):
            return None
        width = rows.tokens.shape[1]
        used = used_tokens(rows)
        flat = rows.tokens[np.arange(width) < used[:, None]]
        pieces = np.stack(
            [np.asarray(c, np.int64) for c in (rows.doc_lens, rows.doc_input, rows.doc_offset)]
        )
        held = self._open.shape[1]
        pieces = np.concatenate((self._open, pieces), axis=1)
        goes_on = self._goes_on(rows, used == width, pieces, held)
        starts = np.flatnonzero(~goes_on)
        tokens = np.concatenate((self._tokens, flat)) if held else flat
        self._row += len(rows)
        self._full = bool(used[-1] == width)
        if not len(starts):
            return None
        lengths = np.add.reduceat(pieces[0], starts)
        last = int(lengths[-1])
        self._tokens = tokens[len(tokens) - last :]
        self._open = np.array([[last], [pieces[1, starts[-1]]], [pieces[2, starts[-1]]]])
        if len(starts) == 1:
            return None
        return Documents(
            tokens=tokens[: len(tokens) - last], lengths=lengths[:-1],
            inputs=pieces[1, starts[:-1]], offsets=pieces[2, starts[:-1]],
        )  # fmt: skip

    def flush(self) -> Documents | None:
        """The last document, or None if there was none."""
        if not self._open.shape[1]:
            return None
        length, number, offset = self._open
        return Documents(tokens=self._tokens, lengths=length, inputs=number, offsets=offset)

    def _goes_on(
        self, rows: PackedRows, full: NDArray[np.bool_], pieces: I64, held: int
    ) -> NDArray[np.bool_]:
        """(held + pieces,) whether a piece goes on with the one before it."""
        found = np.zeros(pieces.shape[1], bool)
        first = rows.row_splits[:-1] + held
        # A row without pieces has no first piece of its own.
        filled = rows.row_splits[1:] > rows.row_splits[:-1]
        before_full = np.concatenate(([self._full], full[:-1]))
        broken = [self._row + i in self._breaks for i in range(len(rows))] if self._breaks else []
        may = filled & before_full & ~np.array(broken or [False] * len(rows))
        at = first[may]
        at = at[at > 0]
        same = (pieces[1, at] == pieces[1, at - 1]) & (pieces[2, at] == pieces[2, at - 1])
        found[at[same]] = True
        return found
