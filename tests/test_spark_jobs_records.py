"""Reading records: newline alignment, strict decoding, reasons. Nothing here starts Spark."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist.errors import DataRefused
from spark_jobs.records import Rules, iter_lines, read_chunks
from spark_jobs.sources import list_inputs, plan_tasks

RULES = Rules("text", 1000)


def read(path: Path, rules: Rules = RULES, split_bytes: int = 1 << 20) -> tuple[list, list]:
    """([(offset, text)], [(offset, reason, raw)]) of all splits of a file or folder."""
    files = list_inputs([str(path)])
    texts, refused = [], []
    for task in plan_tasks(files, split_bytes):
        for chunk in read_chunks(files, task, rules):
            texts += zip(chunk.offsets, chunk.texts, strict=True)
            refused += [(one.offset, one.reason, one.raw) for one in chunk.refused]
    return texts, refused


@given(
    st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=30),
    st.booleans(),
    st.lists(st.integers(0, 400), max_size=6),
    st.integers(1, 20),
)
def test_any_cutting_gives_each_line_once(
    lines: list[bytes], last_newline: bool, cuts: list[int], block: int
) -> None:
    """A line that ends or begins just at a cut was lost, or came twice, in the naive reader."""
    data = b"\n".join(lines) + (b"\n" if last_newline and lines else b"")
    expected, offset = [], 0
    for line in data.split(b"\n"):
        expected.append((offset, line))
        offset += len(line) + 1
    if expected[-1][1] == b"":
        expected.pop()
    borders = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    found = []
    for start, end in zip(borders, borders[1:], strict=False):
        found += iter_lines(io.BytesIO(data), start, end, 1000, block)
    assert found == expected
    assert list(iter_lines(io.BytesIO(data), 0, None, 1000, block)) == expected


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 12))
def test_a_huge_line_is_cut_and_the_next_is_whole(size: int, limit: int, block: int) -> None:
    """A line of 100 GB must not be held; what follows it must keep its offset."""
    data = b"a" * size + b"\n" + b"next\nz"
    found = list(iter_lines(io.BytesIO(data), 0, None, limit, block))
    expected = [(0, b"a" * size), (size + 1, b"next"), (size + 6, b"z")]
    assert found == [(offset, line[: limit + 1]) for offset, line in expected]


def test_reasons(tmp_path: Path) -> None:
    """A bad row that is skipped without a word is data lost; one kept is garbage trained on."""
    lines = [
        b'{"text": "good"}',
        b'{"text": "caf\xe9"}',
        b"{not json",
        b"[1]",
        b'{"texts": "x"}',
        b'{"text": 5}',
        b'{"text": " \\n "}',
        b'{"text": "' + b"x" * 1001 + b'"}',
        b'{"text": "\\ud800"}',
        b"",
        b'{"text": "caf\xc3\xa9"}\r',
        b"x" * (6 * 1000 + (1 << 20) + 1),
        b'{"text": "last"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    for split_bytes in (1 << 22, 50_000, 100):
        texts, refused = read(path, split_bytes=split_bytes)
        assert [text for _, text in texts] == ["good", "café", "last"]
        assert [reason for _, reason, _ in refused] == [
            "undecodable",
            "not_json",
            "not_json",
            "field_missing",
            "field_missing",
            "empty",
            "over_long",
            "undecodable",
            "over_long",
        ]
        assert refused[0][2] == lines[1]
        assert max(len(raw) for _, _, raw in refused) == 64 << 10
        assert texts[-1][0] == path.stat().st_size - len(lines[-1])


def test_compressed_equals_plain(tmp_path: Path) -> None:
    """Second gzip members and zstd frames are dropped by readers that stop at the first."""
    rows = [json.dumps({"text": f"row {number}"}).encode() + b"\n" for number in range(100)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows))
    (tmp_path / "b.jsonl.gz").write_bytes(
        gzip.compress(b"".join(rows[:50])) + gzip.compress(b"".join(rows[50:]))
    )
    frames = [pa.compress(b"".join(part), "zstd", asbytes=True) for part in (rows[:9], rows[9:])]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))
    plain = read(tmp_path / "a.jsonl")
    assert len(plain[0]) == 100
    assert read(tmp_path / "b.jsonl.gz") == plain
    assert read(tmp_path / "c.jsonl.zst") == plain


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    """A truncated .gz read as its first half would lose data without a word."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n' * 5000)[:-20])
    with pytest.raises(DataRefused, match=r"a\.jsonl\.gz cannot be read"):
        read(path)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(DataRefused, match=r"b\.parquet cannot be read"):
        read(tmp_path / "b.parquet")


def test_parquet_by_row_group(tmp_path: Path) -> None:
    """A row group read by two splits, or offsets that restart in each, would break the keys."""
    path = tmp_path / "a.parquet"
    texts = [f"text {number}" for number in range(100)]
    table = pa.table({"id": list(range(100)), "text": [None, *texts[1:]]})
    pq.write_table(table, path, row_group_size=7)
    for split_bytes in (1 << 20, 300, 1):
        found, refused = read(path, split_bytes=split_bytes)
        assert found == list(enumerate(texts))[1:]
        assert refused == [(0, "field_missing", b"")]
    found, refused = read(path, Rules("other", 1000))
    assert not found and len(refused) == 100
    assert len(read(path, Rules("id", 1000))[1]) == 100


def test_parquet_strings_are_checked(tmp_path: Path) -> None:
    """Arrow stores any bytes in a string column; U+FFFD or a crash would be the result."""
    bad = pa.array([b"good", b"\xff\xfe"]).cast(pa.binary())
    column = pa.StringArray.from_buffers(2, bad.buffers()[1], bad.buffers()[2])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    found, refused = read(tmp_path / "a.parquet")
    assert found == [(0, "good")]
    assert refused == [(1, "undecodable", b"\xff\xfe")]


def test_text_files(tmp_path: Path) -> None:
    """A file is a document: newlines stay, too long is refused without reading it all."""
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    (tmp_path / "c.txt").write_bytes("é".encode() * 501)
    (tmp_path / "d.txt").write_bytes(b"")
    found, refused = read(tmp_path)
    assert found == [(0, "one\ntwo\n")]
    assert [reason for _, reason, _ in refused] == ["undecodable", "over_long", "empty"]
