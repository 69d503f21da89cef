"""Packing: every token once, in order, and pieces that say what belongs together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist.baselines import valid_targets
from dist.packing import PackedRows, Packer, num_targets
from dist.shard_file import join_rows, slice_rows


def pack(seq_len: int, calls: list[list[int]]) -> tuple[list[PackedRows], list[np.ndarray]]:
    """Pack documents of these lengths, several a call; tokens are their document's number."""
    packer, parts, docs, number = Packer(seq_len), [], [], 0
    for lengths in calls:
        made = []
        for length in lengths:
            made.append(np.arange(length, dtype=np.uint32) + 1000 * (number + len(made)))
        numbers = np.arange(number, number + len(lengths))
        number += len(lengths)
        docs += made
        flat = np.concatenate(made) if made else np.empty(0, np.uint32)
        parts.append(packer.add(flat, np.array(lengths, np.int64), numbers, numbers * 10))
    parts.append(packer.flush())
    assert packer.flush() is None
    return [part for part in parts if part is not None], docs


calls = st.lists(st.lists(st.integers(0, 25), max_size=8), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(seq_len=st.integers(1, 12), lengths=calls)
def test_unpacking_gives_the_documents_back(seq_len: int, lengths: list[list[int]]) -> None:
    """A token lost, doubled or moved at a row's or a call's border would show here."""
    parts, docs = pack(seq_len, lengths)
    if not parts:
        assert not any(len(doc) for doc in docs)
        return
    rows = join_rows(parts)
    pieces: dict[int, list[int]] = {}
    for r in range(len(rows)):
        start = 0
        for p in range(rows.row_splits[r], rows.row_splits[r + 1]):
            length = int(rows.doc_lens[p])
            assert length > 0 and rows.doc_offset[p] == 10 * rows.doc_input[p]
            pieces.setdefault(int(rows.doc_input[p]), []).extend(
                rows.tokens[r, start : start + length]
            )
            start += length
        assert start <= seq_len + 1 and not rows.tokens[r, start:].any()
        assert start == seq_len + 1 or r == len(rows) - 1, "only the last row is padded"
    assert pieces == {i: doc.tolist() for i, doc in enumerate(docs) if len(doc)}


@settings(max_examples=60, deadline=None)
@given(seq_len=st.integers(1, 9), lengths=calls)
def test_calls_do_not_matter(seq_len: int, lengths: list[list[int]]) -> None:
    """Rows that depend on Arrow's batch borders would give another digest on other executors."""
    parts, _ = pack(seq_len, lengths)
    whole, _ = pack(seq_len, [[length for call in lengths for length in call]])
    assert bool(parts) == bool(whole)
    if parts:
        one, other = join_rows(parts), join_rows(whole)
        for name in ("tokens", "row_splits", "doc_lens", "doc_input", "doc_offset"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name


@settings(max_examples=60, deadline=None)
@given(seq_len=st.integers(1, 9), lengths=calls)
def test_targets_never_cross_documents(seq_len: int, lengths: list[list[int]]) -> None:
    """A target in another document than its input would train on a false continuation."""
    parts, _ = pack(seq_len, lengths)
    for rows in parts:
        valid = valid_targets(rows.doc_lens, rows.row_splits, seq_len)
        assert np.array_equal(valid.sum(axis=1), num_targets(rows.doc_lens, rows.row_splits))
        left, right = rows.tokens[:, :-1][valid], rows.tokens[:, 1:][valid]
        assert np.array_equal(left + 1, right)


def test_slices_of_rows_keep_their_pieces() -> None:
    """A slice that forgot to shift its splits would read another row's documents."""
    parts, _ = pack(4, [[3, 9, 1, 14]])
    rows = join_rows(parts)
    again = join_rows([slice_rows(rows, 0, 2), slice_rows(rows, 2, len(rows))])
    assert np.array_equal(again.row_splits, rows.row_splits)
    assert np.array_equal(again.doc_lens, rows.doc_lens)


def test_lengths_that_do_not_add_up_are_refused() -> None:
    """Documents shifted by a token would be packed without a sound."""
    with pytest.raises(ValueError, match="sum to 3 for 4 tokens"):
        Packer(4).add(np.zeros(4, np.uint32), np.array([3]), np.array([0]), np.array([0]))
