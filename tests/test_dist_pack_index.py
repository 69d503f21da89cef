"""The pack index: every example once, no row too long, the rows of plain best-fit decreasing."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist.example_file import ExampleShard
from dist.examples import ExampleRows
from dist.pack_index import one_a_row, pack_best_fit

GOLDEN = Path(__file__).parent / "golden" / "pack_index_v1.json"

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


def golden_values() -> dict[str, Any]:
    """Whole indices of lengths that need no random generator, and rows that a run makes of them."""
    found: dict[str, Any] = {}
    for width, count, most in ((32, 60, 23), (7, 40, 7), (70_000, 50, 23_000), (5, 0, 5)):
        lengths = 1 + (np.arange(count) * 37) % most
        made = pack_best_fit(lengths, width)
        found[f"{count} of width {width}"] = {
            "examples": made.examples.tolist(), "row_splits": made.row_splits.tolist(),
        }  # fmt: skip
    shard, width = GOLDEN.parent / "examples_v1.arrow", 17
    lengths = ExampleShard(shard).lengths()
    for name, index in (
        ("packed", pack_best_fit(lengths, width)), ("padded", one_a_row(len(lengths))),
    ):  # fmt: skip
        rows = ExampleRows(shard, index, width, lengths)
        found[f"rows of examples_v1.arrow, {name}"] = {
            "rows": index.num_rows,
            "tokens_sha256": sha256(rows.tokens(0, index.num_rows).tobytes()).hexdigest(),
            "trained_runs": [rows.trained_runs(row).tolist() for row in range(index.num_rows)],
            "lineage": [rows.lineage(row) for row in range(index.num_rows)],
        }
    return found


def test_the_index_is_frozen() -> None:
    """Another index for the same lengths, or another row made of it, would send a resumed run to
    other rows: both are part of what a run's order counts."""
    if os.environ.get("LEYDEN_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(golden_values()) + "\n")
    assert json.loads(GOLDEN.read_text()) == json.loads(json.dumps(golden_values()))


def test_wide_rows_and_what_does_not_fit() -> None:
    """Sort keys of 16 bits that wrap at 65,536; a length that no row can hold."""
    made = pack_best_fit(np.array([70_000, 2, 69_999, 1]), 70_001)
    assert [made.examples_of(i).tolist() for i in range(made.num_rows)] == [[0, 3], [1, 2]]
    for bad in ([5, 9], [0, 3]):
        with pytest.raises(ValueError, match="in rows of 8"):
            pack_best_fit(np.array(bad), 8)
    assert pack_best_fit(np.empty(0, np.int64), 8).num_rows == 0
    assert one_a_row(3).examples_of(2).tolist() == [2]
