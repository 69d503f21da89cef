"""The pack index: every example once, no row too long, the rows of plain best-fit decreasing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist.pack_index import one_a_row, pack_best_fit

LENGTHS = st.integers(1, 40).flatmap(
    lambda width: st.tuples(st.lists(st.integers(1, width), max_size=120), st.just(width))
)


def best_fit_decreasing(lengths: list[int], width: int) -> list[list[int]]:
    """The textbook: lengths of each row."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        room = [(width - sum(row), i) for i, row in enumerate(rows) if width - sum(row) >= length]
        if room:
            rows[min(room)[1]].append(length)
        else:
            rows.append([length])
    return rows


def first_fit(lengths: list[int], width: int) -> int:
    rows: list[int] = []
    for length in lengths:
        fits = [i for i, used in enumerate(rows) if used + length <= width]
        if fits:
            rows[fits[0]] += length
        else:
            rows.append(length)
    return len(rows)


@given(LENGTHS)
def test_rows_are_those_of_the_plain_algorithm(case: tuple[list[int], int]) -> None:
    """Classes handled at once must place each item where one at a time would; an example lost,
    twice, or in a row that it overfills, would show here."""
    lengths, width = case
    made = pack_best_fit(np.array(lengths, np.int64), width)
    assert sorted(made.examples.tolist()) == list(range(len(lengths)))
    rows = [made.examples_of(row).tolist() for row in range(made.num_rows)]
    assert all(rows) and all(row == sorted(row) for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    # Of rows with equal room either may get an item; how full the rows are does not change.
    found = sorted(sum(lengths[i] for i in row) for row in rows)
    assert found == sorted(map(sum, best_fit_decreasing(lengths, width))) and all(
        used <= width for used in found
    )
    # Johnson's bound, with first-fit's rows as no fewer than the fewest possible.
    assert made.num_rows <= 11 / 9 * first_fit(lengths, width) + 6 / 9 + 1e-9
    for example in range(len(lengths)):
        assert example in rows[int(made.rows_of(np.array([example]))[0])]


@given(LENGTHS, st.randoms())
def test_waste_is_that_of_the_lengths_alone(case: tuple[list[int], int], random: object) -> None:
    """An index that depends on the order of examples beyond their numbers."""
    lengths, width = case
    turned = lengths[::-1]
    one = pack_best_fit(np.array(lengths, np.int64), width)
    other = pack_best_fit(np.array(turned, np.int64), width)
    assert one.num_rows == other.num_rows


def test_the_index_is_frozen() -> None:
    """Another index for the same lengths would send a resumed run to other rows."""
    lengths = 1 + (np.arange(60) * 37) % 23
    made = pack_best_fit(lengths, 32)
    assert made.num_rows == 23
    assert made.examples[:12].tolist() == [0, 10, 15, 25, 33, 38, 43, 48, 1, 57, 2, 7]
    assert made.row_splits[:6].tolist() == [0, 8, 10, 15, 17, 19]


def test_wide_rows_and_what_does_not_fit() -> None:
    """Sort keys of 16 bits that wrap at 65,536; a length that no row can hold."""
    made = pack_best_fit(np.array([70_000, 2, 69_999, 1]), 70_001)
    assert [made.examples_of(i).tolist() for i in range(made.num_rows)] == [[0, 3], [1, 2]]
    for bad in ([5, 9], [0, 3]):
        with pytest.raises(ValueError, match="in rows of 8"):
            pack_best_fit(np.array(bad), 8)
    assert pack_best_fit(np.empty(0, np.int64), 8).num_rows == 0
    assert one_a_row(3).examples_of(2).tolist() == [2]
