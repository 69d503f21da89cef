"""Planning: which files, which splits, which bucket. Nothing here starts Spark."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist.errors import ConfigError, DataRefused, SetupError
from spark_jobs.sources import (
    InputFile,
    list_inputs,
    plan_tasks,
    record_keys,
    sample_splits,
    scale_hashes,
    split_bytes_for,
)
from spark_jobs.tokenize_tasks import num_buckets


def jsonl(name: str, size: int) -> InputFile:
    return InputFile(url=name, path=name, size=size, stamp="", format="jsonl", compression="")


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=1), st.integers(1, (1 << 31) - 1))
def test_bucket_is_exact(hashes: list[int], count: int) -> None:
    """Floats or an overflow in (h * S) >> 64 would put rows into other buckets at large S."""
    found = scale_hashes(np.array(hashes, np.uint64), count).tolist()
    assert found == [(h * count) >> 64 for h in hashes]


def test_number_of_buckets() -> None:
    """Rounding down would make shards of twice the size; a split without a bucket loses rows."""
    assert num_buckets(1.0, 1000, 100) == 10
    assert num_buckets(1.0, 1001, 100) == 11
    assert num_buckets(0.01, 1000, 100) == 1
    assert num_buckets(0.0, 1000, 100) == 0


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=8).filter(any),
    st.integers(1, 400),
)
def test_splits_cover_every_byte_once(sizes: list[int], split_bytes: int) -> None:
    """A gap would lose records without a word, an overlap would train on them twice."""
    files = [jsonl(f"{number}.jsonl", size) for number, size in enumerate(sizes)]
    covered = [np.zeros(size, int) for size in sizes]
    for task in plan_tasks(files, split_bytes):
        assert sum(split.length for split in task) <= split_bytes or len(task) == 1
        for split in task:
            covered[split.input][split.start : split.start + split.length] += 1
    assert all((one == 1).all() for one in covered)


def test_a_compressed_file_is_one_split() -> None:
    """A gzip stream cannot be entered in the middle."""
    file = InputFile(url="a", path="a", size=900, stamp="", format="jsonl", compression="gzip")
    assert [len(task) for task in plan_tasks([file], 100)] == [1]


def test_number_of_tasks() -> None:
    """The setting that a test of determinism turns must have an effect."""
    assert len(plan_tasks([jsonl("a", 700)], split_bytes_for(700, 2, 7))) == 7


def test_keys_tell_paths_and_offsets_apart() -> None:
    """Without the zero byte ("a1", 2) and ("a", ...) could meet; equal keys make ties."""
    keys = [*record_keys("a", [0, 1, 1 << 40]), *record_keys("a\x01", [0]), *record_keys("b", [0])]
    assert len(set(keys)) == 5
    assert all(len(key) == 16 for key in keys)


def test_keys_never_change() -> None:
    """Another key is another order of every dataset: it needs a new transform version."""
    assert record_keys("part/a.jsonl", [123])[0].hex() == "8bce254762b6917cc9e2e2f2748a8d32"


def test_sample_does_not_depend_on_the_cutting() -> None:
    """An engine chosen by a sample of the plan would differ between 2 and 200 cores."""
    files = [jsonl("a", 1000), jsonl("b", 3000)]
    splits = sample_splits(files, 4)
    assert [(split.input, split.start) for split in splits] == [
        (0, 0),
        (1, 0),
        (1, 1000),
        (1, 2000),
    ]


def test_folders_are_walked_in_order(tmp_path: Path) -> None:
    """An order by inode, or a hidden editor file taken for data, would change the digest."""
    for name in ("b/2.jsonl", "b/1.txt", "a.json.gz", ".git/x.jsonl", "b/.c.txt", "_SUCCESS"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    files = list_inputs([str(tmp_path)])
    assert [(file.path, file.format, file.compression) for file in files] == [
        ("a.json.gz", "jsonl", "gzip"),
        ("b/1.txt", "text", ""),
        ("b/2.jsonl", "jsonl", ""),
    ]
    assert [file.path for file in list_inputs([f"{tmp_path}/b/*.txt"])] == ["1.txt"]
    assert list_inputs([f"{tmp_path}/b/2.jsonl"])[0].path == "2.jsonl"


def test_bad_inputs_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these ended in a traceback, or in an empty dataset, in other tools."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd.xyz").write_text("x")
    (tmp_path / "zero.jsonl").write_text("")
    good = tmp_path / "good.jsonl"
    good.write_text("{}")
    with pytest.raises(ConfigError, match="no input is given"):
        list_inputs([])
    with pytest.raises(ConfigError, match=r"gone\.jsonl does not exist"):
        list_inputs([f"{tmp_path}/gone.jsonl"])
    with pytest.raises(DataRefused, match="holds no files"):
        list_inputs([f"{tmp_path}/empty"])
    with pytest.raises(DataRefused, match="no file matches"):
        list_inputs([f"{tmp_path}/*.parquet"])
    with pytest.raises(ConfigError, match=r"format of .*odd\.xyz"):
        list_inputs([f"{tmp_path}/odd.xyz"])
    assert list_inputs([f"{tmp_path}/odd.xyz"], "text")[0].format == "text"
    with pytest.raises(DataRefused, match="no bytes"):
        list_inputs([f"{tmp_path}/zero.jsonl"])
    with pytest.raises(ConfigError, match="given twice"):
        list_inputs([str(good), f"{tmp_path}/good*"])
    # The tests may run as root, who may read everything.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SetupError, match="may not be read"):
        list_inputs([str(good)])
