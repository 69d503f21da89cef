"""Where the rows of a split lie: which shard, and which row of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist.manifest import Shard
from dist.shard_file import PackedShard


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

    def records_of(self, number: int, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        """Records of shard `number` that make its rows (k,), counted in the shard; ascending."""
        return np.unique(np.asarray(rows, np.int64))


@dataclass(frozen=True, kw_only=True)
class MixedSplit(SplitTable):
    """The splits of several datasets, end to end."""

    tables: tuple[SplitTable, ...]

    def open_shard(self, number: int, path: Path) -> Any:
        """Shard `number` of all, which lies at `path`, by the source that holds it."""
        for table in self.tables:
            if number < len(table.shards):
                return table.open_shard(number, path)
            number -= len(table.shards)
        raise IndexError(f"split {self.name} has {len(self.shards)} shards")
