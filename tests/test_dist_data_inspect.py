"""What inspect counts is what is in the shards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dist.commit import commit_dataset
from dist.data_inspect import _batches, facts_of, scan, scan_facts, unread
from dist.data_page import page_of
from dist.data_samples import sample_rows
from dist.dataset import Dataset, open_dataset
from dist.documents import read_documents
from dist.example_file import ExampleShard
from dist.manifest import Manifest
from dist.shard_file import PackedShard
from dist.tokenizer import TextTokenizer
from launch import data
from tests.http_server import serve
from tests.make_dataset import write_dataset
from tests.make_examples import write_examples


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data") / "corpus", documents=200)


def test_a_whole_scan_counts_everything(dataset: Dataset) -> None:
    """Padding counted as the token 0, or a document that spans rows counted as two."""
    found = scan(dataset)
    assert found.complete
    expected: Counter[int] = Counter()
    lengths: list[int] = []
    for split in dataset.manifest.splits():
        for part in read_documents(dataset, split):
            expected.update(part.tokens.tolist())
            lengths += part.lengths.tolist()
    assert {i: int(n) for i, n in enumerate(found.counts) if n} == dict(expected)
    assert sorted(found.document_lengths.tolist()) == sorted(lengths)
    totals = dataset.manifest.totals["train"]
    assert found.padding["train"] == pytest.approx(1 - totals["tokens"] / (17 * totals["rows"]))


def test_a_sample_is_a_sample_and_always_the_same(dataset: Dataset) -> None:
    """A part scan that says it is whole, or pieces of documents counted as short documents."""
    found, again = scan(dataset, 100), scan(dataset, 100)
    assert not found.complete and 60 <= found.rows <= 140 < found.of_rows
    assert np.array_equal(found.counts, again.counts)
    whole = {
        int(n)
        for s in dataset.manifest.splits()
        for p in read_documents(dataset, s)
        for n in p.lengths
    }
    assert set(found.document_lengths.tolist()) <= whole
    assert len(found.document_lengths) > 20


def test_part_scans_never_see_a_cut_document(tmp_path: Path) -> None:
    """Documents of 40 tokens, seen as pieces of every length by a scan with gaps."""
    dataset = write_dataset(tmp_path / "data", longest=1, documents=200)
    dataset = write_dataset(tmp_path / "long", documents=300, longest=40, rows_per_batch=2)
    lengths = Counter(
        int(n)
        for s in dataset.manifest.splits()
        for p in read_documents(dataset, s)
        for n in p.lengths
    )
    found = Counter(scan(dataset, 400).document_lengths.tolist())
    assert not found - lengths
    # All of one length, so that a piece cannot pass for another document.
    dataset = write_dataset(tmp_path / "one", shortest=12, longest=12, documents=300)
    pieces = scan(dataset, 400).document_lengths
    assert len(pieces) > 20 and set(pieces.tolist()) == {12}


def test_a_sample_is_spread_over_the_split(dataset: Dataset) -> None:
    """The first record batches only: of a corpus in the order of its sources, one source."""
    whole = [number for number, _, _, _ in _batches(dataset, "train", 10**9)]
    chosen = [number for number, _, _, _ in _batches(dataset, "train", 100)]
    assert whole == list(range(len(whole))) and 20 < len(chosen) < len(whole) / 3
    gaps = np.diff([*chosen, len(whole)])
    assert chosen[0] == 0 and gaps.max() - gaps.min() <= 1


def test_facts_hold_counters_and_the_chain_of_parents(tmp_path: Path) -> None:
    """Refused rows that nobody is told of; a derived version without its parent."""
    first = write_dataset(tmp_path / "data")
    counters = {"documents_in": 9, "documents_out": 7, "quarantined.empty": 2, "quarantined": 2}
    shards = first.manifest.shards[1:]
    totals = {s: dict(t) for s, t in first.manifest.totals.items()}
    totals["train"]["rows"] -= first.manifest.shards[0].rows
    manifest = Manifest(
        kind="packed_tokens", schema=first.manifest.schema, shards=shards, totals=totals,
        tokenizer_digest=first.manifest.tokenizer_digest,
    )  # fmt: skip
    record = {
        "inputs": [{"path": "a.txt", "url": "/a.txt", "size": 5}], "counters": counters,
        "parent": first.data_digest, "parent_reference": first.reference, "job": "quarantine",
        "removed": {"split": "train", "rows": [1, 2]},
    }  # fmt: skip
    commit_dataset(first.storage, manifest, record, "6" * 64)
    facts = facts_of(open_dataset(first.storage.url))
    assert facts["counters"]["quarantined_by_reason"] == {"empty": 2}
    assert facts["origin"]["parents"] == [
        {"data_digest": first.data_digest, "by": "quarantine", "removed": 2}
    ]
    assert facts["splits"]["train"]["shard_bytes"]["max"] == max(
        s.bytes for s in shards if s.split == "train"
    )


def test_samples_show_where_documents_end(dataset: Dataset) -> None:
    """Borders one token off."""
    for row in sample_rows(dataset, "train", 5):
        split = dataset.split("train")
        index, local = split.locate(np.array([row["row"]]))
        shard = PackedShard(dataset.shard_path(split.shards[int(index[0])]))
        pieces = [(p["input"], p["offset"], p["tokens"]) for p in row["pieces"]]
        assert pieces == shard.lineage(int(local[0]))
        assert row["padding"] == 17 - sum(p["tokens"] for p in row["pieces"])
    rows = [row["row"] for row in sample_rows(dataset, "train", 5)]
    assert (
        rows[0] == 0 and len(set(rows)) == 5 and max(rows) > 0.7 * dataset.split("train").num_rows
    )


def test_the_page_asks_nothing_of_anybody(dataset: Dataset) -> None:
    """A page that loads a script or a font, or that shows markup of the data as markup."""
    found = scan(dataset)
    said = scan_facts(found, dataset.read_tokenizer())
    samples = {"train": sample_rows(dataset, "train", 2)}
    samples["train"][0]["pieces"][0]["text"] = "<script>alert(1)</script>"
    page = page_of(facts_of(dataset), found, said, samples, "")
    assert "default-src 'none'" in page and "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<svg") == 2 and page.count('class="piece"') >= 2
    assert dataset.data_digest in page


def test_the_page_marks_what_is_trained(tmp_path: Path) -> None:
    """A page of chats that does not tell a mask; that claims a padding which a run decides; a mark
    that lets markup of the data through."""
    dataset = write_examples(tmp_path / "data", num_examples=5)
    samples = {"train": sample_rows(dataset, "train", 3)}
    row = samples["train"][0]
    assert row["targets"] and row["padding"] == 0
    (trained, *_) = (run for run in row["runs"] if run["trained"])
    trained["text"] = "<b>so</b>"
    said = scan_facts(scan(dataset), dataset.read_tokenizer())
    page = page_of(facts_of(dataset), scan(dataset), said, samples, "")
    assert "<mark>&lt;b&gt;so&lt;/b&gt;</mark>" in page and "<b>so" not in page
    assert f"{row['targets']} of them trained" in page
    assert "<span>padding</span>" not in page and "of padding" not in page


def test_rows_that_are_not_read_are_said_so() -> None:
    """A traceback for a remote dataset, or for a kind that came later."""
    local = write_dataset("memory://inspect/data")
    assert "remote" in unread(local)
    page = page_of(facts_of(local), None, None, {"train": []}, unread(local))
    assert "remote" in page and "<svg" not in page


def test_examples_are_scanned_and_sampled(tmp_path: Path) -> None:
    """Examples counted twice or not at all, a sample of the first ones only, or a mask moved."""
    dataset = write_examples(tmp_path / "data", num_examples=50)
    counts, lengths = np.zeros(300, np.int64), []
    trained: dict[tuple[int, int], list[str]] = {}
    tokenizer = TextTokenizer(dataset.read_tokenizer())
    for entry in dataset.manifest.shards:
        shard = ExampleShard(dataset.shard_path(entry))
        for row in range(shard.num_rows):
            one = shard.read(row)
            counts += np.bincount(one.tokens, minlength=300)
            lengths.append(len(one.tokens))
            spans = [one.tokens[a:b] for a, b in one.spans.tolist()]
            trained[shard.origin(row)] = [tokenizer.decode(span) for span in spans]
        shard.close()
    found = scan(dataset)
    assert found.complete and np.array_equal(found.counts, counts)
    assert found.document_lengths.tolist() == lengths
    part = scan(dataset, 30)
    assert part.rows == 30 and not part.complete
    assert part.document_lengths.tolist() == lengths[::5]
    for split in ("train", "validation"):
        rows = sample_rows(dataset, split, 4)
        assert [row["row"] for row in rows] == ([0, 25, 50, 75], [0, 12, 25, 37])[
            split == "validation"
        ]
        for row in rows:
            (piece,) = row["pieces"]
            assert row["trained"] == trained[piece["input"], piece["offset"]]
            assert row["targets"] > 0 and row["turns"] > 1
            assert sum(run["tokens"] for run in row["runs"]) == piece["tokens"]
            assert row["targets"] == sum(run["tokens"] for run in row["runs"] if run["trained"])


@pytest.mark.parametrize("kind", ["packed_tokens", "examples"])
def test_a_remote_dataset_is_told_of_by_its_manifest(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], kind: str,
) -> None:  # fmt: skip
    """A look at a terabyte that fetches the terabyte; rows or totals that are left out for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    local = dataset
    if kind == "examples":
        local = write_examples(tmp_path / "data", num_train_shards=5)
    with serve(local.storage.url) as server:
        assert data.main(["inspect", server.url, "--samples", "0"]) == 0
        out = capsys.readouterr().out
        for counts in local.manifest.totals.values():
            assert all(f"{count:,}" in out for count in counts.values())
        assert "rows and tokens are the manifest's" in out and "--samples 0" not in out
        assert not [one for one in server.gets if one.path.startswith("/shards/")]
        assert data.main(["inspect", server.url, "--samples", "1"]) == 0
        assert "sample     train row 0" in capsys.readouterr().out
        fetched = {one.path for one in server.gets if one.path.startswith("/shards/")}
        assert len(fetched) == len(local.manifest.splits()) == 2
        assert data.main(["diff", server.url, local.storage.url]) == 0
        other = write_dataset(tmp_path / "other", seed=8)
        assert data.main(["diff", server.url, other.storage.url]) == 1
        said = capsys.readouterr().out
        rows = local.manifest.totals["train"]["rows"], other.manifest.totals["train"]["rows"]
        assert f"rows {rows[0]:,} -> {rows[1]:,}" in said
        assert "is remote, and its rows are not read" in said
        assert fetched == {one.path for one in server.gets if one.path.startswith("/shards/")}
    old = write_examples(tmp_path / "old", with_lengths=False, seed=5)
    with serve(old.storage.url) as server:  # without a table of lengths
        assert data.main(["inspect", server.url, "--samples", "1"]) == 0
        assert len({one.path for one in server.gets if one.path.startswith("/shards/")}) == 2
