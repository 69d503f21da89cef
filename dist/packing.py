"""Documents into rows of seq_len + 1 tokens, in order, nothing dropped.

A document may span rows; a row holds pieces of documents, and the pieces' lengths (`doc_lens`)
are all that attention, positions and the loss need: a target never crosses a piece's border.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PAD_TOKEN = 0


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """n rows. The pieces of row i are entries row_splits[i] to row_splits[i + 1]."""

    tokens: NDArray[np.unsignedinteger]
    """(n, seq_len + 1)"""
    row_splits: NDArray[np.int64]
    """(n + 1,)"""
    doc_lens: NDArray[np.int32]
    """(pieces,) tokens of each piece; a row's pieces may fill less than the row: padding."""
    doc_input: NDArray[np.int32]
    """(pieces,) index of the input file the document came from."""
    doc_offset: NDArray[np.int64]
    """(pieces,) where in that file its document starts."""

    def __len__(self) -> int:
        return len(self.tokens)


def num_targets(doc_lens: NDArray[np.int32], row_splits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Valid targets of each row, (n,): a piece of k tokens has k - 1."""
    # total: (pieces + 1,), so that rows without pieces come out as 0.
    total = np.concatenate(([0], np.cumsum(np.maximum(doc_lens.astype(np.int64) - 1, 0))))
    return total[row_splits[1:]] - total[row_splits[:-1]]


class Packer:
    """Packs a stream of documents; its only state is the open row."""

    def __init__(self, seq_len: int, dtype: np.dtype | type = np.uint32) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}; a row needs at least one input token")
        self._row = seq_len + 1
        self._dtype = np.dtype(dtype)
        self._reset()

    def _reset(self) -> None:
        self._tokens: NDArray[np.unsignedinteger] = np.empty(0, self._dtype)
        self._pieces = np.empty((3, 0), np.int64)  # lengths, inputs, offsets of the open row

    def add(
        self,
        tokens: NDArray[np.unsignedinteger],
        lengths: NDArray[np.integer],
        inputs: NDArray[np.integer],
        offsets: NDArray[np.integer],
    ) -> PackedRows | None:
        """Append documents; returns the rows that they completed, or None.

        tokens: (sum(lengths),) of all documents one after the other; the others: (documents,).
        """
        if int(np.sum(lengths)) != len(tokens):
            raise ValueError(f"lengths sum to {int(np.sum(lengths))} for {len(tokens)} tokens")
        # An empty document would make a piece of length 0; the open row's pieces come first.
        keep = np.asarray(lengths) > 0
        documents = np.stack(
            [np.asarray(column, np.int64)[keep] for column in (lengths, inputs, offsets)]
        )
        documents = np.concatenate((self._pieces, documents), axis=1)
        flat = np.concatenate((self._tokens, tokens.astype(self._dtype, copy=False)))
        num_rows = len(flat) // self._row
        full = num_rows * self._row
        ends = np.cumsum(documents[0])
        # Pieces are cut where a document ends and where a row ends.
        cuts = np.union1d(ends, np.arange(1, num_rows + 1) * self._row)
        starts = np.concatenate(([0], cuts[:-1])) if len(cuts) else cuts
        owner = np.searchsorted(ends, starts, side="right")
        pieces = np.stack((cuts - starts, documents[1][owner], documents[2][owner]))
        done = int(np.searchsorted(starts, full, side="left"))
        self._tokens, self._pieces = flat[full:], pieces[:, done:]
        if num_rows == 0:
            return None
        row_splits = np.searchsorted(starts[:done], np.arange(num_rows + 1) * self._row)
        return _rows(flat[:full].reshape(num_rows, self._row), row_splits, pieces[:, :done])

    def flush(self) -> PackedRows | None:
        """The open row padded to its length, or None if it is empty; the packer is new again."""
        used = len(self._tokens)
        if used == 0:
            return None
        row = np.full((1, self._row), PAD_TOKEN, self._dtype)
        row[0, :used] = self._tokens
        pieces = self._pieces
        self._reset()
        return _rows(row, np.array([0, pieces.shape[1]]), pieces)


def _rows(
    tokens: NDArray[np.unsignedinteger], row_splits: NDArray[np.int64], pieces: NDArray[np.int64]
) -> PackedRows:
    return PackedRows(
        tokens=tokens,
        row_splits=row_splits.astype(np.int64),
        doc_lens=pieces[0].astype(np.int32),
        doc_input=pieces[1].astype(np.int32),
        doc_offset=pieces[2].copy(),
    )
