"""Versions without some rows, as quarantine derives them from a guard's bundle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist.dataset import Dataset, open_dataset
from spark_jobs.quarantine import Config, run


def derive(
    parent: Dataset, rows: Sequence[int], scratch: Path, output: str = "", **data: Any
) -> Dataset:
    """`parent` without `rows` of train; data: of the config of the bundle's run."""
    listed = [{"row": row, "shard": "", "row_in_shard": 0, "rank": 0, "micro": 0} for row in rows]
    record = {
        "format": 1, "data": parent.reference, "rows": listed, "reasons": ["a test"],
        "ranks": [{"rank": 0, "losses": ["nan"]}], "run": "x", "attempt": 0, "step": 1,
    }  # fmt: skip
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "bundle.json").write_text(json.dumps(record))
    (scratch / "config.json").write_text(json.dumps({"data": data}))
    output = output or parent.storage.url
    return open_dataset(f"{output}@{run(Config(bundle=str(scratch), output=output))}")
