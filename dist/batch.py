"""A micro-batch: its tokens, where its documents lie, and where it stands in the run.

Documents travel as piece lengths, a few numbers a row; what the model needs of them a token
(document ids, positions, valid targets) is expanded on the device that uses it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(kw_only=True)
class Batch:
    """One micro-batch of one rank. n rows of seq inputs and seq targets."""

    tokens: Tensor
    """(n, seq + 1) in the shards' dtype: inputs [:, :-1], targets [:, 1:]."""
    pieces: Tensor
    """(2, pieces) int32 of the flattened rows: lengths of documents' pieces and of padding, which
    sum to n * (seq + 1); and 1 for a document, 0 for padding."""
    cu_seqlens: Tensor
    """(documents + 1,) int32, document borders in the flattened inputs."""
    rows: Tensor
    """(n,) int64, row of the split; -1 for padding rows."""
    max_len: int
    """Longest document of the micro-batch, in input tokens."""
    num_targets: int
    """Valid targets of the micro-batch."""
    step: int = 0
    """Optimizer step, from 0, that this micro-batch is part of."""
    t0: int = 0
    """The step's first sample."""
    t1: int = 0
    """One past the step's last sample."""
    micro: int = 0
    """Number of the micro-batch in its step."""
    num_micro: int = 1
    """Micro-batches of the step."""
    step_targets: int = 0
    """Valid targets of the whole step on all ranks."""
    trained: Tensor | None = None
    """(runs, 2) int32 of the flattened rows, for examples: how many tokens are left out, then
    trained as targets; None where every target within a document is trained."""
    stop: bool = False
    """All ranks agreed to stop after this step."""

    @property
    def ends_step(self) -> bool:
        return self.micro == self.num_micro - 1

    @property
    def doc_ids(self) -> Tensor:
        """(n, seq) int64, equal for input tokens of one piece and for no others."""
        return self._per_token[0]

    @property
    def position_ids(self) -> Tensor:
        """(n, seq) int64, restarts at each piece."""
        return self._per_token[1]

    @property
    def valid(self) -> Tensor:
        """(n, seq) bool, True where the target is the next token of the same document."""
        return self._per_token[2]

    @cached_property
    def _per_token(self) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, width = self.tokens.shape
        lens = self.pieces[0].long()
        ends = lens.cumsum(0)
        # output_size is known, so a GPU need not be asked for it. number: (n * width,)
        number = torch.repeat_interleave(lens, output_size=num_rows * width)
        position = torch.arange(num_rows * width, device=lens.device) - (ends - lens)[number]
        valid = self.pieces[1].bool()[number]
        valid[ends - 1] = False  # a piece's last token has no target in the piece
        if self.trained is not None:
            run = torch.repeat_interleave(self.trained.view(-1), output_size=num_rows * width)
            # Token p is the target of input p - 1. The last one's next is a row's first: no target.
            valid &= (run % 2 == 1).roll(-1)
        per_token = (number, position, valid)
        first, second, third = (one.view(num_rows, width)[:, :-1].contiguous() for one in per_token)
        return first, second, third

    def to(self, device: torch.device, non_blocking: bool = True) -> Batch:
        """The batch on a device; tokens travel in their narrow dtype."""
        tensors = self._tensors()
        moved = {k: v.to(device, non_blocking=non_blocking) for k, v in tensors.items()}
        return dataclasses.replace(self, **moved)

    def pin(self) -> Batch:
        """The batch in page-locked memory, for copies to a GPU that nothing waits for."""
        pinned = {name: tensor.pin_memory() for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, **pinned)

    def _tensors(self) -> dict[str, Tensor]:
        found = {
            "tokens": self.tokens,
            "pieces": self.pieces,
            "cu_seqlens": self.cu_seqlens,
            "rows": self.rows,
        }
        return found if self.trained is None else found | {"trained": self.trained}


def make_batches(
    tokens: NDArray[np.unsignedinteger],
    rows: NDArray[np.int64],
    doc_lens: NDArray[np.int32],
    row_splits: NDArray[np.int64],
    micro_batch: int,
) -> list[Batch]:
    """Cut rows into micro-batches of `micro_batch` rows.

    tokens: (n, seq + 1), n a multiple of micro_batch; rows: (n,); doc_lens: (pieces,) of all
    rows, row_splits: (n + 1,). A row without pieces is all padding.
    """
    num_rows, width = tokens.shape
    seq_len = width - 1
    # Every row's pieces, then its padding (maybe 0 long): sums to width a row.
    counts = np.diff(row_splits) + 1
    piece_splits = np.concatenate(([0], np.cumsum(counts)))
    last = piece_splits[1:] - 1
    used = np.concatenate(([0], np.cumsum(doc_lens, dtype=np.int64)))[row_splits]
    pieces = np.ones((2, len(doc_lens) + num_rows), np.int32)
    pieces[1, last] = 0
    pieces[0, pieces[1] == 1] = doc_lens
    pieces[0, last] = width - np.diff(used)
    # A row's last token is a target only: its piece is one shorter as an input.
    row_of = np.repeat(np.arange(num_rows), counts)
    ends = np.cumsum(pieces[0], dtype=np.int64) - row_of * width
    input_ends = np.minimum(ends, seq_len) + row_of * seq_len
    targets = used - row_splits  # every piece of k tokens has k - 1
    batches = []
    for micro, first in enumerate(range(0, num_rows, micro_batch)):
        after = first + micro_batch
        here = slice(piece_splits[first], piece_splits[after])
        borders = np.concatenate(([0], input_ends[here] - first * seq_len))
        lengths = np.diff(borders)
        keep = np.concatenate(([True], lengths > 0))
        batches.append(
            Batch(
                tokens=torch.from_numpy(tokens[first:after]),
                pieces=torch.from_numpy(pieces[:, here]),
                cu_seqlens=torch.from_numpy(borders[keep].astype(np.int32)),
                rows=torch.from_numpy(rows[first:after]),
                max_len=int(lengths.max()),
                num_targets=int(targets[after] - targets[first]),
                micro=micro,
                num_micro=num_rows // micro_batch,
            )
        )
    return batches


def mark_trained(batches: list[Batch], runs: list[NDArray[np.int32]]) -> None:
    """Say which targets of micro-batches of examples are trained (in place).

    runs: of each row but padding, (k, 2) tokens left out and trained, which sum to the row.
    """
    first = 0
    for batch in batches:
        num_rows, width = batch.tokens.shape
        here = runs[first : first + num_rows]
        missing = [[width, 0]] * (num_rows - len(here))
        made = np.concatenate([*here, np.array(missing, np.int32).reshape(-1, 2)])
        batch.trained = torch.from_numpy(made)
        batch.num_targets = int(made[:, 1].sum())
        first += num_rows
