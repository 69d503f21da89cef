"""Examples into published shards, one process: shard file and publication."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist.commit import publish_shard
from dist.errors import DataRefused
from dist.example_file import Example, ExampleShardWriter
from dist.manifest import TOTALS, Shard
from dist.shard_file import ShardFile
from dist.storage import Storage
from dist.token_source import Block


@dataclass(frozen=True, kw_only=True)
class ExamplesMade:
    """A shard that was published, and what is in it."""

    file: ShardFile
    lengths: NDArray[np.uint32]
    """(rows,) tokens of each example."""
    targets: int
    """Trained tokens."""

    @property
    def name(self) -> str:
        return f"{self.file.xxh3_128}.arrow"


class ExampleShards:
    """Publishes shards of examples in order; its state is the open one."""

    def __init__(
        self, storage: Storage, path: Path, *, rows_per_batch: int, max_tokens: int
    ) -> None:
        """path: scratch file; max_tokens: a shard holds no more, unless one example does."""
        self._storage, self._path = storage, path
        self._rows_per_batch, self._max_tokens = rows_per_batch, max_tokens
        self._writer: ExampleShardWriter | None = None
        self._lengths: list[int] = []
        self._targets = 0

    def add(self, example: Example) -> ExamplesMade | None:
        """Append one; the shard that is published since it had no room, if so."""
        made, held = None, self._writer.num_tokens if self._writer is not None else 0
        if held and held + len(example.tokens) > self._max_tokens:
            made = self.close()
        if self._writer is None:
            self._writer = ExampleShardWriter(
                self._path, metadata={}, rows_per_batch=self._rows_per_batch
            )
        self._writer.write(example)
        self._lengths.append(len(example.tokens))
        self._targets += example.num_targets
        return made

    def close(self) -> ExamplesMade | None:
        """Publish the open shard; None if there is none."""
        if self._writer is None:
            return None
        file = self._writer.close()
        publish_shard(self._storage, self._path, file.xxh3_128, file.bytes)
        self._path.unlink()
        made = ExamplesMade(
            file=file, lengths=np.array(self._lengths, np.uint32), targets=self._targets
        )
        self._writer, self._lengths, self._targets = None, [], 0
        return made


class ExampleSplitWriter:
    """Makes examples of the documents of one split, and shards of them."""

    def __init__(
        self, split: str, storage: Storage, scratch: Path, *, max_length: int,
        rows_per_batch: int, max_bytes: float,
    ) -> None:  # fmt: skip
        self._split, self._max_length = split, max_length
        self._open = ExampleShards(
            storage, scratch / f"{split}.arrow", rows_per_batch=rows_per_batch,
            max_tokens=max(1, int(max_bytes) // 4),
        )  # fmt: skip
        self._shards: list[Shard] = []
        self.lengths: list[NDArray[np.uint32]] = []
        """(rows,) of each shard."""
        self.totals = dict.fromkeys(TOTALS, 0)

    def add(
        self, block: Block, offsets: NDArray[np.int64], number: int, mine: NDArray[np.bool_]
    ) -> int:
        """Append the documents `mine` (documents,) of a block of input `number`, but for those that
        train nothing; how many. DataRefused for one that is too long, without the input's name."""
        taken = 0
        for document, place, spans in trained_documents(block):
            if not mine[document]:
                continue
            length = place.stop - place.start
            if length > self._max_length:
                raise DataRefused(
                    f"record {offsets[document]} has {length:,} tokens, max_length is "
                    f"{self._max_length:,}; raise it, or cut that record"
                )
            example = Example(
                tokens=block.tokens[place].astype(np.uint32), spans=spans,
                segments=np.array([length], np.int32), input=number, offset=int(offsets[document]),
            )  # fmt: skip
            self._take(self._open.add(example))
            taken += 1
        return taken

    def close(self) -> list[Shard]:
        """Publish the last shard; all shards in order."""
        self._take(self._open.close())
        return self._shards

    def _take(self, made: ExamplesMade | None) -> None:
        if made is None:
            return
        self._shards.append(
            Shard(
                name=made.name,
                rows=made.file.rows,
                bytes=made.file.bytes,
                xxh3_128=made.file.xxh3_128,
                split=self._split,
            )  # fmt: skip
        )
        self.lengths.append(made.lengths)
        sums = (made.file.rows, made.file.rows, int(made.lengths.sum(dtype=np.int64)), made.targets)
        for name, count in zip(("rows", "documents", "tokens", "targets"), sums, strict=True):
            self.totals[name] += count


def trained_documents(block: Block) -> Iterator[tuple[int, slice, NDArray[np.int32]]]:
    """Each document of a block that trains a token: its number, where its tokens stand, and the
    spans (spans, 2) of its trained ones. A first token, which nothing precedes, is not trained."""
    if block.trained is None:
        raise ValueError("a block without labels")
    ends = np.cumsum(block.lengths)
    starts = ends - block.lengths
    trained = block.trained.copy()
    trained[starts[block.lengths > 0]] = False  # so that no span goes over a border
    change = np.diff(np.concatenate(([False], trained, [False])).astype(np.int8))
    spans = np.stack((np.flatnonzero(change == 1), np.flatnonzero(change == -1)), axis=1)
    owner = np.searchsorted(ends, spans[:, 0], side="right")
    splits = np.searchsorted(owner, np.arange(len(ends) + 1))
    for document in np.unique(owner).tolist():
        own = spans[splits[document] : splits[document + 1]] - starts[document]
        place = slice(int(starts[document]), int(ends[document]))
        yield document, place, own.astype(np.int32)
