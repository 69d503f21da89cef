"""Rows gathered by address are those of the file, whatever shards and batches they lie in."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dist.row_gather
from dist.packing import PackedRows
from dist.row_gather import GatheredRows, gather_rows, join_rows_at
from dist.shard_file import PackedShard, PackedShardWriter
from dist.side_thread import SideThread

SEQ_LEN = 6
SIZES = ((1, 1), (7, 4), (64, 16), (5, 8))  # rows and rows of a batch of each shard


@pytest.fixture(scope="module", params=["uint16", "uint32"])
def paths(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(3)
    found = []
    for number, (rows, per_batch) in enumerate(SIZES):
        counts = rng.integers(0, 4, rows)  # rows without a piece too
        splits = np.concatenate(([0], np.cumsum(counts)))
        pieces = int(splits[-1])
        writer = PackedShardWriter(
            folder / f"{number}.arrow", seq_len=SEQ_LEN, token_dtype=request.param, metadata={},
            rows_per_batch=per_batch,
        )  # fmt: skip
        writer.write(
            PackedRows(
                tokens=rng.integers(0, 60_000, (rows, SEQ_LEN + 1)).astype(request.param),
                row_splits=splits, doc_lens=rng.integers(1, 3, pieces).astype(np.int32),
                doc_input=np.zeros(pieces, np.int32), doc_offset=np.arange(pieces),
            )
        )  # fmt: skip
        writer.close()
        found.append(writer._path)
    return found


def plainly(paths: list[Path], which: list[int], rows: list[int]) -> list[tuple[list, list]]:
    """(tokens, doc_lens) of rows, as any Arrow reader has them."""
    tables = [pa.ipc.open_file(str(path)).read_all() for path in paths]
    columns = [(table["tokens"].to_pylist(), table["doc_lens"].to_pylist()) for table in tables]
    return [(columns[s][0][row], columns[s][1][row]) for s, row in zip(which, rows, strict=True)]


def gathered(shards: list[PackedShard], which: list[int], rows: list[int]) -> list:
    found = gather_rows(
        [shard.places for shard in shards], np.array(which, np.int64), np.array(rows, np.int64),
        SEQ_LEN + 1, shards[0].dtype,
    )  # fmt: skip
    return listed(found)


def listed(found: GatheredRows) -> list:
    tokens, lens, splits = found.tokens, found.lengths, found.row_splits
    assert tokens.flags.owndata and splits[-1] == len(lens)
    borders = zip(splits[:-1], splits[1:], strict=True)
    return [(t.tolist(), lens[a:b].tolist()) for t, (a, b) in zip(tokens, borders, strict=True)]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_are_those_of_the_files(paths: list[Path], data: st.DataObject) -> None:
    """An address of another batch, shard, width or unit; pieces that slip by a row."""
    shards = [PackedShard(path) for path in paths]
    which = data.draw(st.lists(st.integers(0, len(SIZES) - 1), max_size=40))
    rows = [data.draw(st.integers(0, SIZES[s][0] - 1)) for s in which]
    assert gathered(shards, which, rows) == plainly(paths, which, rows)
    assert gathered(shards, which[::-1], rows[::-1]) == plainly(paths, which[::-1], rows[::-1])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_gathered_in_groups_are_those_gathered_at_once(
    paths: list[Path], data: st.DataObject
) -> None:
    """Rows, pieces or runs that land at another row's place where a step is read in parts."""
    count = data.draw(st.integers(1, 20))
    which = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    rows = [data.draw(st.integers(0, SIZES[s][0] - 1)) for s in which]
    group = np.array(data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
    shards = [PackedShard(path) for path in paths]
    parts, places = [], []
    for number in range(3):
        at = np.flatnonzero(group == number)
        part = gather_rows(
            [shard.places for shard in shards], np.array(which)[at], np.array(rows)[at],
            SEQ_LEN + 1, shards[0].dtype,
        )  # fmt: skip
        # As runs, each row's number in the step, as often as the row has pieces, and one more.
        counts = np.diff(part.row_splits) + 1
        runs = np.repeat(np.stack((at, at), axis=1), counts, axis=0).astype(np.int32)
        splits = np.concatenate(([0], np.cumsum(counts)))
        parts.append(replace(part, runs=runs, run_splits=splits))
        places.append(at)
    joined = join_rows_at(parts, places)
    assert listed(joined) == plainly(paths, which, rows)
    assert joined.runs is not None and joined.run_splits is not None
    counts = np.diff(joined.run_splits)
    assert counts.tolist() == (np.diff(joined.row_splits) + 1).tolist()
    assert joined.runs[:, 0].tolist() == np.repeat(np.arange(count), counts).tolist()


def test_a_row_that_is_not_there_is_no_memory_of_something_else(paths: list[Path]) -> None:
    """An index past a shard's end would read whatever lies behind it, or crash the process."""
    shards = [PackedShard(path) for path in paths]
    for which, row in ((0, 1), (1, 7), (3, 5), (2, -1)):
        with pytest.raises(IndexError, match="rows"):
            gathered(shards, [2, which], [0, row])


def test_memory_too_far_apart_for_one_array(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """numpy refuses a shape of 2**63 bytes: long rows in maps far apart would end the run."""
    monkeypatch.setattr(dist.row_gather, "_LARGEST_ARRAY", 1)
    shards = [PackedShard(path) for path in paths]
    which, rows = [2, 1, 2, 0], [63, 6, 0, 0]
    assert gathered(shards, which, rows) == plainly(paths, which, rows)


def test_a_shard_closed_by_another_thread_can_still_be_read(paths: list[Path]) -> None:
    """The loader closes the coldest shard while a step that needs it is gathered: a read of
    memory that was unmapped kills the process."""
    shard = PackedShard(paths[2])
    places = shard.places
    shard.close()
    del shard
    which, rows = np.zeros(2, np.int64), np.array([40, 3])
    found = gather_rows([places], which, rows, SEQ_LEN + 1, PackedShard(paths[2]).dtype)
    assert found.tokens.tolist() == [one for one, _ in plainly([paths[2]], [0, 0], [40, 3])]


@pytest.mark.parametrize("part_rows", [0, 1, 3, 50])
def test_parts_that_a_thread_copies_make_the_whole(
    paths: list[Path], part_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that begins a row late, or a last one that is left out: a step with another's rows."""
    monkeypatch.setattr(dist.row_gather, "_BYTES_ASIDE", 0)
    shards, side = [PackedShard(path) for path in paths], SideThread("copy")
    which, rows = np.array([2, 1, 2, 0, 3, 2, 1]), np.array([63, 6, 0, 0, 4, 17, 2])
    found = gather_rows(
        [shard.places for shard in shards], which, rows, SEQ_LEN + 1, shards[0].dtype, side,
        part_rows,
    )  # fmt: skip
    parts = [len(part) for part in found.parts()]
    assert parts == {0: [7], 1: [1] * 7, 3: [3, 3, 1], 50: [7]}[part_rows]
    expected = plainly(paths, which.tolist(), rows.tolist())
    assert found.tokens.tolist() == [tokens for tokens, _ in expected]
    side.close()


def test_a_shard_stays_mapped_until_a_thread_has_copied(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is closed while its rows are copied beside: the process dies of a read of
    memory that was unmapped."""
    monkeypatch.setattr(dist.row_gather, "_BYTES_ASIDE", 0)

    def mapped() -> bool:
        return str(paths[2]) in Path("/proc/self/maps").read_text()

    side, gate = SideThread("copy"), threading.Event()
    side.start(lambda: gate.wait(20))
    shard = PackedShard(paths[2])
    width, dtype = SEQ_LEN + 1, shard.dtype
    rows = np.array([40, 3])
    found = gather_rows([shard.places], np.zeros(2, np.int64), rows, width, dtype, side)
    shard.close()
    del shard
    assert mapped() and isinstance(found.copied, list)
    gate.set()
    deadline = time.monotonic() + 10
    while mapped() and time.monotonic() < deadline:  # the thread does it, and lets go of it
        time.sleep(0.01)
    assert not mapped() and all(work.is_done for work in found.copied)
    assert found.tokens.tolist() == [one for one, _ in plainly([paths[2]], [0, 0], [40, 3])]
    side.close()


def test_other_threads_run_while_rows_are_copied(tmp_path: Path) -> None:
    """A copy that holds the interpreter's lock would stop the training thread for as long."""
    rows, width = 4096, 2049
    writer = PackedShardWriter(
        tmp_path / "x", seq_len=width - 1, token_dtype="uint16", metadata={}, rows_per_batch=1024
    )
    none = np.empty(0, np.int32)
    writer.write(
        PackedRows(
            tokens=np.zeros((rows, width), np.uint16), row_splits=np.zeros(rows + 1, np.int64),
            doc_lens=none, doc_input=none, doc_offset=none.astype(np.int64),
        )
    )  # fmt: skip
    writer.close()
    shard = PackedShard(tmp_path / "x")
    every = np.tile(np.arange(rows), 16)  # some 0.1 s
    copying = threading.Thread(target=shard.gather, args=(every,))
    copying.start()
    turns = 0
    while copying.is_alive():
        turns += 1
    # With the lock held this thread gets a turn before the copy and one after it.
    assert turns > 1000
