"""Arrow's arrays as numpy's, and what reading a shard does not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dist.arrow_view import numpy_view
from tests.make_dataset import write_dataset


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
def test_a_view_is_what_arrow_says(dtype: str) -> None:
    """A slice whose offset is counted in bytes, or not at all, gives another row's numbers."""
    whole = pa.array(np.arange(7, 20), pa.type_for_alias(dtype))
    for array in (whole, whole[3:], whole[3:9][2:4], whole[5:5], whole[:0]):
        found, expected = numpy_view(array), array.to_numpy()
        assert found.dtype == expected.dtype == np.dtype(dtype)
        assert found.tolist() == expected.tolist()
    offsets = pa.array([[1, 2], [], [3]], pa.list_(pa.int32()))[1:].offsets
    assert numpy_view(offsets).tolist() == offsets.to_numpy().tolist()


def test_a_view_keeps_the_memory() -> None:
    """A view of memory that was freed."""
    found = numpy_view(pa.array(range(100_000)))
    pa.array([9] * 100_000)
    assert found.tolist() == list(range(100_000))


def test_the_first_row_needs_no_pandas(tmp_path: Path) -> None:
    """pyarrow's to_numpy() imports pandas when it is first called: 0.5 s before the first batch."""
    dataset = write_dataset(tmp_path, with_tokenizer=False)
    path = dataset.shard_path(dataset.split("train").shards[0])
    code = (
        "import sys, numpy\nfrom dist.shard_file import PackedShard\n"
        f"print(len(PackedShard({str(path)!r}).gather(numpy.array([0])).tokens))\n"
        "print('pandas' in sys.modules)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["1", "False"]
