"""Documents come out of packed rows as they went in."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dist.data_inspect import scan
from dist.dataset import Dataset, open_dataset
from dist.documents import Joiner, breaks_after, breaks_of, read_documents
from dist.manifest import digest_of
from dist.packing import PackedRows, Packer
from dist.shard_file import slice_rows
from tests.derive import derive
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


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_nothing_goes_on_over_rows_that_were_taken_out(data: st.DataObject) -> None:
    """A document whose middle was quarantined, exported as if the rest were one text; of several
    quarantines only the newest remembered."""
    with tempfile.TemporaryDirectory() as folder:
        version = write_dataset(Path(folder) / "data", seq_len=4, longest=40, documents=8)
        original = documents_in(version)
        for number in range(data.draw(st.integers(1, 3))):
            rows = version.split("train").num_rows
            gone = data.draw(st.sets(st.integers(0, rows - 1), min_size=1, max_size=3))
            version = derive(version, sorted(gone), Path(folder) / f"bundle-{number}")
        for document in documents_in(version):
            assert any(is_within(document, whole) for whole in original)
        inspected = scan(version, 10**6).document_lengths.tolist()
        told = [one for name in version.manifest.splits() for one in documents_in(version, name)]
        assert sorted(inspected) == sorted(len(one) - 2 for one in told)


def test_older_versions_are_followed_to_their_parents(tmp_path: Path) -> None:
    """Derived versions of before `breaks`, exported as if nothing had been taken out."""
    first = write_dataset(tmp_path / "data", seq_len=4, longest=40, documents=8)
    second = derive(first, [3, 7], tmp_path / "b1")
    third = derive(second, [1], tmp_path / "b2")
    wanted = [documents_in(one) for one in (second, third)]
    assert breaks_of(third, "train") == [1, 2, 5]
    for path in list((tmp_path / "data" / "provenance").iterdir()):
        record = json.loads(path.read_bytes())
        if record.pop("breaks", None) is not None:
            path.unlink()
            text = json.dumps(record, indent=1, sort_keys=True) + "\n"
            path.with_name(f"{digest_of(record)}.json").write_text(text)
    again = [open_dataset(one.reference) for one in (second, third)]
    assert all("breaks" not in (one.read_provenance() or {}) for one in again)
    assert [documents_in(one) for one in again] == wanted
    second.storage.delete(f"manifests/{second.data_digest}.json")
    assert breaks_of(again[1], "train") == [1]


def test_a_rerun_of_an_older_quarantine_changes_nothing(tmp_path: Path) -> None:
    """LATEST that goes back to a version with bad rows; or that stays behind after a kill."""
    first = write_dataset(tmp_path / "data", documents=20)
    second = derive(first, [3], tmp_path / "b1")
    third = derive(second, [1], tmp_path / "b2")
    derive(first, [3], tmp_path / "b1")
    assert open_dataset(first.storage.url).data_digest == third.data_digest
    for left in (second.data_digest.encode(), None):
        if left is None:
            first.storage.delete("LATEST")
        else:
            first.storage.write_atomic("LATEST", left)
        derive(second, [1], tmp_path / "b2")
        assert open_dataset(first.storage.url).data_digest == third.data_digest


def documents_in(dataset: Dataset, split: str = "train") -> list[list[int]]:
    """[input, offset, tokens...] of each."""
    found: list[list[int]] = []
    for part in read_documents(dataset, split):
        take(part, found)
    return found


def is_within(piece: list[int], whole: list[int]) -> bool:
    """Whether a piece of a document is a run of its tokens."""
    size = len(piece) - 2
    runs = (whole[2:][at : at + size] for at in range(len(whole) - 1 - size))
    return piece[:2] == whole[:2] and any(run == piece[2:] for run in runs)


@given(breaks=st.sets(st.integers(0, 30)), steps=st.lists(st.sets(st.integers(0, 20)), max_size=4))
def test_breaks_of_versions_in_turn_are_those_of_one(
    breaks: set[int], steps: list[set[int]]
) -> None:
    """Rows of a version taken for rows of its parent."""
    left, found = list(range(40)), sorted(breaks)
    for removed in steps:
        removed &= set(range(len(left)))
        found = breaks_after(found, sorted(removed))
        left = [row for at, row in enumerate(left) if at not in removed]
    cut = sorted(set(range(40)) - set(left))
    # Where the rows that are left stood beside others, or where there was a break before.
    wanted = {sum(row < at for row in left) for at in [*breaks, *(row + 1 for row in cut)]}
    assert set(found) == wanted
