"""Shards belong to the user: pandas, polars, DuckDB and HF datasets open them without Leyden."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dist.dataset import Dataset
from dist.example_file import ExampleShard
from dist.shard_file import PackedShard
from tests.make_dataset import write_dataset
from tests.make_examples import write_examples

READERS = {
    "pandas": "import pandas; rows = pandas.read_feather(path).tokens.tolist()",
    "polars": "import polars; rows = polars.read_ipc(path)['tokens'].to_list()",
    "duckdb": (
        "import duckdb, pyarrow.ipc; shard = pyarrow.ipc.open_file(path).read_all()\n"
        "rows = [r[0] for r in duckdb.sql('select tokens from shard').fetchall()]"
    ),
    "datasets": (
        "import datasets; rows = list(datasets.load_dataset('arrow', data_files=path,"
        " split='train', cache_dir=cache)['tokens'])"
    ),
}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_examples(tmp_path_factory.mktemp("chats"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("kind", ["packed_tokens", "examples"])
@pytest.mark.parametrize("reader", READERS)
def test_rows_are_read_without_leyden(
    reader: str, kind: str, dataset: Dataset, chats: Dataset, tmp_path: Path
) -> None:
    """A format that needs our code to be read would hold its users' data hostage."""
    pytest.importorskip(reader)
    chosen = dataset if kind == "packed_tokens" else chats
    path = chosen.shard_path(chosen.manifest.shards[0])
    code = (
        "import sys; path, cache = sys.argv[1:]\n"
        f"{READERS[reader]}\n"
        "assert not {'dist', 'launch', 'recipes', 'spark_jobs'} & set(sys.modules)\n"
        "print([[int(t) for t in row] for row in rows])"
    )
    done = subprocess.run(
        # -I: neither the current folder nor PYTHONPATH can bring our rooms in.
        [sys.executable, "-I", "-c", code, str(path), str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    if kind == "packed_tokens":
        shard = PackedShard(path)
        expected = shard.tokens(0, shard.num_rows).tolist()
    else:
        examples = ExampleShard(path)
        expected = [examples.example_tokens(row).tolist() for row in range(examples.num_rows)]
    assert done.stdout.strip() == str(expected)


@pytest.mark.parametrize("reader", ["pandas", "polars", "datasets"])
def test_masks_are_read_without_leyden(reader: str, chats: Dataset, tmp_path: Path) -> None:
    """Tokens without their masks are half of the data; readers differ in structs within lists."""
    pytest.importorskip(reader)
    path = chats.shard_path(chats.manifest.shards[0])
    code = READERS[reader].replace("tokens", "loss_spans")
    code = f"import sys; path, cache = sys.argv[1:]\n{code}\n"
    code += "print([[[int(s['start']), int(s['stop'])] for s in row] for row in rows])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True,
        env={"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    shard = ExampleShard(path)
    assert done.stdout.strip() == str([shard.spans(i).tolist() for i in range(shard.num_rows)])
