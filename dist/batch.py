"""A micro-batch: its tokens, where its documents lie, and where it stands in the run.

Documents travel as piece lengths, a few numbers a row; what the model needs of them a token
(document ids, positions, valid targets) is expanded on the device that uses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

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


class Documents(NamedTuple):
    """Where the documents of a micro-batch lie; fields as in Batch."""

    pieces: Tensor
    cu_seqlens: Tensor
    max_len: int
    num_targets: int


def documents_of(
    doc_lens: NDArray[np.int32], row_splits: NDArray[np.int64], width: int, micro_batch: int
) -> list[Documents]:
    """Of each micro-batch of `micro_batch` rows of `width` tokens.

    doc_lens: (pieces,) of all rows, row_splits: (n + 1,), n a multiple of micro_batch. A row
    without pieces is all padding.
    """
    num_rows, seq_len = len(row_splits) - 1, width - 1
    # Every row's pieces, then its padding (maybe 0 long): sums to width a row.
    piece_splits = row_splits + np.arange(num_rows + 1)
    last = piece_splits[1:] - 1
    used = _sums(doc_lens)[row_splits]
    padding = width - np.diff(used)
    pieces = np.ones((2, len(doc_lens) + num_rows), np.int32)
    lens, is_document = pieces
    is_document[last] = 0
    lens[is_document == 1] = doc_lens
    lens[last] = padding
    # A row's last token is a target only: the piece that holds it is one shorter as an input.
    inputs = lens.copy()
    inputs[last - (padding == 0)] -= 1
    kept = np.compress(inputs > 0, inputs)
    # borders: (documents + 1,) of all flattened inputs; a row's end is always one of them.
    borders = _sums(kept)
    begins = np.arange(0, num_rows + 1, micro_batch) * seq_len
    border_at = np.searchsorted(borders, begins)
    longest = np.maximum.reduceat(kept, border_at[:-1])
    targets = np.diff((used - row_splits)[::micro_batch])  # every piece of k tokens has k - 1
    # cu_seqlens: of all micro-batches, one after the other; a border between two is in both.
    counts = np.diff(border_at) + 1
    at = np.arange(counts.sum()) - np.repeat(np.arange(len(counts)), counts)
    cu_seqlens = (borders[at] - np.repeat(begins[:-1], counts)).astype(np.int32)
    num_pieces = np.diff(piece_splits[::micro_batch]).tolist()
    cut = zip(
        torch.from_numpy(pieces).split_with_sizes(num_pieces, 1),
        torch.from_numpy(cu_seqlens).split_with_sizes(counts.tolist()),
        longest.tolist(), targets.tolist(), strict=True,
    )  # fmt: skip
    return [Documents(*one) for one in cut]


def _sums(lens: NDArray[np.int32]) -> NDArray[np.int64]:
    """Of the first 0, 1, ... of k lengths: (k + 1,)."""
    sums = np.zeros(len(lens) + 1, np.int64)
    np.cumsum(lens, out=sums[1:])
    return sums


def make_batches(
    tokens: NDArray[np.unsignedinteger], rows: NDArray[np.int64], documents: list[Documents],
    steps: Sequence[tuple[int, int, int]] = ((0, 0, 0),),
) -> list[Batch]:  # fmt: skip
    """Micro-batches of equally many rows, for each of the steps (step, t0, t1).

    tokens: (n, seq + 1); rows: (n,).
    """
    micro_batch, num_micro = len(rows) // len(documents), len(documents) // len(steps)
    # (micro-batches, micro_batch, ...) taken apart by torch: faster than as many arrays that
    # become tensors.
    each_tokens = torch.from_numpy(tokens.reshape(len(documents), micro_batch, -1)).unbind()
    each_rows = torch.from_numpy(rows.reshape(len(documents), micro_batch)).unbind()
    places = ((*step, micro) for step in steps for micro in range(num_micro))
    return [
        Batch(
            tokens=own_tokens, rows=own_rows, pieces=pieces, cu_seqlens=cu_seqlens,
            max_len=max_len, num_targets=num_targets, step=step, t0=t0, t1=t1, micro=micro,
            num_micro=num_micro,
        )
        for own_tokens, own_rows, (pieces, cu_seqlens, max_len, num_targets), (step, t0, t1, micro)
        in zip(each_tokens, each_rows, documents, places, strict=True)
    ]  # fmt: skip


def mark_trained(
    batches: list[Batch], runs: NDArray[np.int32], run_splits: NDArray[np.int64]
) -> None:
    """Say which targets of micro-batches of examples are trained (in place).

    runs: (runs, 2) tokens left out and trained, which sum to the row; run_splits: (n + 1,) of all
    rows of the micro-batches.
    """
    edges = run_splits[np.cumsum([0, *(len(batch.rows) for batch in batches)])]
    trained = np.concatenate(([0], np.cumsum(runs[:, 1], dtype=np.int64)))[edges]
    parts = torch.from_numpy(runs).split(np.diff(edges).tolist())
    for batch, part, targets in zip(batches, parts, np.diff(trained).tolist(), strict=True):
        batch.trained, batch.num_targets = part, targets
