"""Documents of one split into published shards, one process: packer, shard file, publication."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist.commit import publish_shard
from dist.manifest import TOTALS, Shard
from dist.packing import PackedRows, Packer, num_targets
from dist.shard_file import PackedShardWriter, rows_per_batch, slice_rows
from dist.storage import Storage
from dist.token_source import Block


class SplitWriter:
    """Packs the documents of one split; its state is the open row and the open shard."""

    def __init__(
        self, split: str, storage: Storage, scratch: Path, *, seq_len: int, dtype: str,
        max_bytes: float,
    ) -> None:  # fmt: skip
        self._split, self._storage, self._scratch = split, storage, scratch
        self._seq_len, self._dtype = seq_len, dtype
        self._max_rows = max(1, int(max_bytes) // ((seq_len + 1) * np.dtype(dtype).itemsize))
        self._packer = Packer(seq_len, np.dtype(dtype))
        self._writer: PackedShardWriter | None = None
        self._shards: list[Shard] = []
        self.totals = dict.fromkeys(TOTALS, 0)

    def add(
        self, block: Block, offsets: NDArray[np.int64], number: int, mine: NDArray[np.bool_]
    ) -> int:
        """Append the documents `mine` (documents,) of a block of input `number`, but for empty
        ones; how many. Its ids fit the dtype."""
        tokens, lengths = block.tokens, block.lengths
        if not mine.all():
            tokens = tokens[np.repeat(mine, lengths)]
        lengths = lengths[mine]
        taken = int((lengths > 0).sum())
        self.totals["documents"] += taken
        inputs = np.full(len(lengths), number, np.int64)
        flat = tokens.astype(self._dtype, copy=False)
        self._write(self._packer.add(flat, lengths, inputs, offsets[mine]))
        return taken

    def close(self) -> list[Shard]:
        """Pad the last row and publish the last shard; all shards in order."""
        self._write(self._packer.flush())
        self._publish()
        return self._shards

    def _write(self, packed: PackedRows | None) -> None:
        start = 0
        while packed is not None and start < len(packed):
            if self._writer is None:
                self._writer = PackedShardWriter(
                    self._scratch / f"{self._split}.arrow", seq_len=self._seq_len,
                    token_dtype=self._dtype, metadata={},
                    rows_per_batch=rows_per_batch(self._seq_len, self._dtype),
                )  # fmt: skip
            stop = min(len(packed), start + self._max_rows - self._writer.num_rows)
            rows = slice_rows(packed, start, stop)
            self._writer.write(rows)
            self.totals["rows"] += len(rows)
            self.totals["tokens"] += int(rows.doc_lens.sum(dtype=np.int64))
            self.totals["targets"] += int(num_targets(rows.doc_lens, rows.row_splits).sum())
            start = stop
            if self._writer.num_rows == self._max_rows:
                self._publish()

    def _publish(self) -> None:
        if self._writer is None:
            return
        made = self._writer.close()
        path = self._scratch / f"{self._split}.arrow"
        publish_shard(self._storage, path, made.xxh3_128, made.bytes)
        path.unlink()
        self._shards.append(
            Shard(
                name=f"{made.xxh3_128}.arrow",
                rows=made.rows,
                bytes=made.bytes,
                xxh3_128=made.xxh3_128,
                split=self._split,
            )  # fmt: skip
        )
        self._writer = None
