"""Shards belong to the user: pandas, polars, DuckDB and HF datasets open them without Leyden."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dist.dataset import Dataset
from dist.shard_file import PackedShard
from tests.make_dataset import write_dataset

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
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("reader", READERS)
def test_rows_are_read_without_leyden(reader: str, dataset: Dataset, tmp_path: Path) -> None:
    """A format that needs our code to be read would hold its users' data hostage."""
    pytest.importorskip(reader)
    path = dataset.shard_path(dataset.manifest.shards[0])
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
    shard = PackedShard(path)
    assert done.stdout.strip() == str(shard.tokens(0, shard.num_rows).tolist())
