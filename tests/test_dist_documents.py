"""Documents come out of packed rows as they went in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dist.commit import commit_dataset
from dist.dataset import open_dataset
from dist.documents import Joiner, read_documents
from dist.packing import PackedRows, Packer
from dist.shard_file import slice_rows
from tests.make_dataset import write_dataset


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 23), max_size=25),
    seq_len=st.integers(1, 9),
    cuts=st.lists(st.integers(1, 5), max_size=20),
    flushed=st.integers(0, 25),
)
def test_joining_undoes_packing(
    lengths: list[int], seq_len: int, cuts: list[int], flushed: int
) -> None:
    """A document that ends where its row ends, glued to the next; or one that spans rows, torn."""
    tokens = np.arange(sum(lengths), dtype=np.uint32)
    numbers = np.arange(len(lengths))
    packer = Packer(seq_len)
    # A flush in between pads a row, as the end of a bucket does.
    middle = min(flushed, len(lengths))
    cut, sizes, offsets = sum(lengths[:middle]), np.array(lengths, int), 7 * numbers
    packed = [
        packer.add(tokens[:cut], sizes[:middle], numbers[:middle], offsets[:middle]),
        packer.flush(),
        packer.add(tokens[cut:], sizes[middle:], numbers[middle:], offsets[middle:]),
        packer.flush(),
    ]  # fmt: skip
    found: list[list[int]] = []
    joiner = Joiner()
    for rows in filter(None, packed):
        for part in pieces_of(rows, cuts):
            take(joiner.add(part), found)
    take(joiner.flush(), found)
    ends = np.cumsum(lengths)
    expected = [
        [number, 7 * number, *range(end - length, end)]
        for number, end, length in zip(numbers, ends, lengths, strict=True)
        if length
    ]
    assert found == expected


def pieces_of(rows: PackedRows, cuts: list[int]) -> list[PackedRows]:
    """Rows in record batches of the sizes `cuts`, and the rest in one."""
    parts, start = [], 0
    for size in [*cuts, len(rows)]:
        if start < len(rows):
            parts.append(slice_rows(rows, start, min(len(rows), start + size)))
        start += size
    return parts


def take(documents, found: list[list[int]]) -> None:
    if documents is not None:
        ends = np.cumsum(documents.lengths)
        for i, end in enumerate(ends.tolist()):
            text = documents.tokens[end - documents.lengths[i] : end].tolist()
            found.append([int(documents.inputs[i]), int(documents.offsets[i]), *text])


def test_the_books_of_a_dataset_balance(tmp_path: Path) -> None:
    """Padding read as tokens, or a document lost at a shard's end."""
    dataset = write_dataset(tmp_path / "data")
    for split in dataset.manifest.splits():
        parts = list(read_documents(dataset, split))
        totals = dataset.manifest.totals[split]
        assert sum(len(one.tokens) for one in parts) == totals["tokens"]
        assert sum(len(one.lengths) for one in parts) == totals["documents"]


def test_nothing_goes_on_over_rows_that_were_taken_out(tmp_path: Path) -> None:
    """A document whose middle was quarantined, exported as if the rest were one text."""
    dataset = write_dataset(tmp_path / "data", seq_len=4, longest=40, documents=20)
    before = sum(len(part.lengths) for part in read_documents(dataset, "train"))
    row = spanning_row(dataset)
    record = {**(dataset.read_provenance() or {}), "removed": {"split": "train", "rows": [row]}}
    for name in dataset.storage.list("provenance"):
        dataset.storage.delete(name)
    commit_dataset(dataset.storage, dataset.manifest, record, "1" * 64)
    after = sum(
        len(part.lengths) for part in read_documents(open_dataset(dataset.storage.url), "train")
    )
    assert after == before + 1


def spanning_row(dataset) -> int:
    """A row of train whose first piece goes on from the row before."""
    from dist.shard_file import PackedShard

    shard = PackedShard(dataset.shard_path(dataset.manifest.shards[0]))
    for row in range(1, shard.num_rows):
        last, first = shard.lineage(row - 1)[-1], shard.lineage(row)[0]
        if last[:2] == first[:2]:
            return row
    raise AssertionError("no document spans rows")
