"""The loss of each source of a mixture: sums on the device, read when the log is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from dist.batch import Batch


class SourceLosses:
    """Sums of loss and of valid targets by source, over this rank's rows."""

    def __init__(self, names: Sequence[str], source_rows: NDArray[Any]) -> None:
        """source_rows: (sources + 1,) where the rows of each source begin."""
        self.names = tuple(names)
        # Rows from a border on are the next source's: the first border is that of source 1.
        self._borders = torch.from_numpy(source_rows[1:-1].copy())
        self._sums: Tensor | None = None

    def add(self, batch: Batch, losses_N: Tensor) -> None:
        """A micro-batch and its loss a target, (n * seq,) with 0 where there is none. No sync."""
        device = losses_N.device
        if self._sums is None or self._sums.device != device:
            self._sums = torch.zeros(2, len(self.names), dtype=torch.float64, device=device)
            self._borders = self._borders.to(device)
        rows = batch.rows.to(device)
        # Padding rows (-1) count as source 0's and weigh nothing.
        source = torch.bucketize(rows, self._borders, right=True)
        losses = losses_N.view(len(rows), -1).sum(1, dtype=torch.float64)
        sums = torch.stack((losses, batch.valid.sum(1).double()))
        self._sums.index_add_(1, source, sums)

    def take(self) -> Tensor:
        """(2, sources) sums of loss and targets since the last call, float64."""
        sums = self._sums
        self._sums = None
        return torch.zeros(2, len(self.names), dtype=torch.float64) if sums is None else sums

    def means(self, sums: Sequence[float], key: str) -> dict[str, float]:
        """`key/<source>` -> nats a target, of sums (2 * sources,) over all ranks; sources without
        targets are left out."""
        count = len(self.names)
        return {
            f"{key}/{name}": sums[i] / sums[count + i]
            for i, name in enumerate(self.names)
            if sums[count + i] > 0
        }
