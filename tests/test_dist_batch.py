"""dist/batch.py: documents of a micro-batch, against a loop over its tokens."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist.batch import documents_of, make_batches


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    """(seq_len, piece lengths of each row); rows may be padded, or hold nothing at all."""
    seq_len = draw(st.integers(1, 12))
    rows = []
    for _ in range(2 * draw(st.integers(1, 3))):
        left, pieces = seq_len + 1, []
        while left and draw(st.booleans()):
            pieces.append(draw(st.integers(1, left)))
            left -= pieces[-1]
        rows.append(pieces)
    return seq_len, rows


@settings(max_examples=150, deadline=None)
@given(packed_rows())
def test_documents_equal_a_loop_over_tokens(packed: tuple[int, list[list[int]]]) -> None:
    """An off-by-one at a document's or a row's border would train across documents."""
    seq_len, rows = packed
    tokens = np.arange(len(rows) * (seq_len + 1), dtype=np.uint16).reshape(len(rows), -1)
    lens = np.array([n for pieces in rows for n in pieces], np.int32)
    splits = np.cumsum([0, *map(len, rows)])
    documents = documents_of(lens, splits, seq_len + 1, 2)
    batches = make_batches(tokens, np.arange(len(rows)), documents)
    assert torch.equal(torch.cat([b.tokens for b in batches]), torch.from_numpy(tokens))
    assert [row for b in batches for row in b.rows.tolist()] == list(range(len(rows)))
    for number, batch in enumerate(batches):
        borders, targets = {2 * seq_len}, 0
        for i, pieces in enumerate(rows[2 * number : 2 * number + 2]):
            doc = [d for d, n in enumerate(pieces) for _ in range(n)]
            doc += [len(pieces)] * (seq_len + 1 - len(doc))
            position = [doc[:j].count(doc[j]) for j in range(seq_len)]
            valid = [doc[j] == doc[j + 1] < len(pieces) for j in range(seq_len)]
            borders |= {i * seq_len + j for j in range(seq_len) if j == 0 or doc[j] != doc[j - 1]}
            targets += sum(valid)
            ids = batch.doc_ids[i].tolist()
            assert [ids.index(one) for one in ids] == [doc.index(one) for one in doc[:-1]]
            assert batch.position_ids[i].tolist() == position
            assert batch.valid[i].tolist() == valid
        assert batch.cu_seqlens.tolist() == sorted(borders)
        assert batch.max_len == np.diff(sorted(borders)).max()
        assert batch.num_targets == targets
        assert not set(batch.doc_ids[0].tolist()) & set(batch.doc_ids[1].tolist())
