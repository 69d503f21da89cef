"""Shards belong to the user: pandas, polars, DuckDB and HF datasets open them without Leyden."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist.dataset import Dataset
from dist.example_file import ExampleShard
from dist.shard_file import PackedShard
from tests.make_dataset import write_dataset
from tests.make_examples import write_examples

READERS = {
    "pandas": "import pandas; table = pandas.read_feather(path)\nread = lambda c: list(table[c])",
    "polars": "import polars; table = polars.read_ipc(path)\nread = lambda c: table[c].to_list()",
    "duckdb": (
        "import duckdb, pyarrow.ipc; shard = pyarrow.ipc.open_file(path).read_all()\n"
        "read = lambda c: [r[0] for r in duckdb.sql(f'select {c} from shard').fetchall()]"
    ),
    "datasets": (
        "import datasets; table = datasets.load_dataset('arrow', data_files=path,"
        " split='train', cache_dir=cache)\nread = lambda c: list(table[c])"
    ),
}
# An editable installation would bring our rooms in by itself, whatever the folder.
WITHOUT_US = """
import json, sys
class NoRooms:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("dist", "launch", "recipes", "spark_jobs"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, NoRooms)
try:
    import dist.manifest
except ImportError:
    pass
else:
    sys.exit("our rooms can be imported")
path, cache, *columns = sys.argv[1:]
"""
SAY = """
def plain(value):
    if isinstance(value, dict):
        return [plain(one) for one in value.values()]
    if hasattr(value, "__iter__"):
        return [plain(one) for one in value]
    return int(value)
print(json.dumps({column: plain(read(column)) for column in columns}))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    root = tmp_path_factory.mktemp("data")
    return {
        "packed_tokens": write_dataset(root / "packed"),
        "examples": write_examples(root / "examples"),
    }


def expected_of(kind: str, path: Path) -> dict[str, list[Any]]:
    """Each column as our own reader has it; what it leaves out is left out."""
    if kind == "packed_tokens":
        shard = PackedShard(path)
        lineage = [shard.lineage(row) for row in range(shard.num_rows)]
        names = ("doc_input", "doc_offset", "doc_lens")
        return {
            "tokens": shard.tokens(0, shard.num_rows).tolist(),
            **{n: [[one[i] for one in row] for row in lineage] for i, n in enumerate(names)},
        }
    examples = ExampleShard(path)
    rows = [examples.read(row) for row in range(examples.num_rows)]
    return {
        "tokens": [one.tokens.tolist() for one in rows],
        "loss_spans": [one.spans.tolist() for one in rows],
        "segment_lens": [one.segments.tolist() for one in rows],
        "doc_input": [one.input for one in rows],
        "doc_offset": [one.offset for one in rows],
    }


@pytest.mark.parametrize("kind", ["packed_tokens", "examples"])
@pytest.mark.parametrize("reader", READERS)
def test_every_column_is_read_without_leyden(
    reader: str, kind: str, data: dict[str, Dataset], tmp_path: Path
) -> None:
    """A format that needs our code to be read would hold its users' data hostage; tokens without
    their masks are half of it, and readers differ in structs within lists."""
    pytest.importorskip(reader)
    path = data[kind].shard_path(data[kind].manifest.shards[0])
    expected = expected_of(kind, path)
    assert len(expected["tokens"]) > 30 and np.size(expected["doc_offset"][0]) > 0
    done = subprocess.run(
        # -I: neither the current folder nor PYTHONPATH can bring our rooms in.
        [sys.executable, "-I", "-c", WITHOUT_US + READERS[reader] + SAY, str(path), str(tmp_path),
         *expected],
        cwd=tmp_path, capture_output=True, text=True,
        env={"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected
