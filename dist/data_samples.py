"""A few rows of a dataset as text, with the borders of their documents or what of them is trained.

They are evenly spaced, the first one first, and always the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dist.checked_shards import checked_rows
from dist.dataset import Dataset
from dist.example_file import Example, ExampleShard
from dist.lineage import input_paths
from dist.shard_file import PackedShard
from dist.tokenizer import TextTokenizer

Decode = Callable[[Any], str]
Paths = list[tuple[str, str]]


def sample_rows(dataset: Dataset, split: str, num_rows: int) -> list[dict[str, Any]]:
    """Rows of a split: their pieces with source and text; of examples also turns and `runs`."""
    decode = _decoder(dataset)
    table, paths = dataset.split(split), input_paths(dataset)
    num_rows = min(num_rows, table.num_rows)
    rows = np.arange(num_rows) * table.num_rows // max(1, num_rows)
    read = _example if dataset.manifest.kind == "examples" else _packed_row
    found = []
    for number, index, local in zip(rows.tolist(), *table.locate(rows), strict=True):
        path = checked_rows(dataset, table, int(index), np.array([local]))
        found.append({"row": number, **read(path, int(local), decode, paths)})
    return found


def _decoder(dataset: Dataset) -> Decode:
    if dataset.manifest.tokenizer_digest is None:
        return lambda tokens: " ".join(map(str, tokens))
    return TextTokenizer(dataset.read_tokenizer()).decode


def _piece(source: int, offset: int, tokens: Any, decode: Decode, paths: Paths) -> dict[str, Any]:
    return {
        "input": source, "path": paths[source][0] if source < len(paths) else "",
        "offset": offset, "tokens": len(tokens), "text": decode(tokens),
    }  # fmt: skip


def _packed_row(path: Path, row: int, decode: Decode, paths: Paths) -> dict[str, Any]:
    shard = PackedShard(path)
    tokens, at, pieces = shard.tokens(row, row + 1)[0], 0, []
    for source, offset, length in shard.lineage(row):
        pieces.append(_piece(source, offset, tokens[at : at + length], decode, paths))
        at += length
    shard.close()
    return {"pieces": pieces, "padding": len(tokens) - at}


def _example(path: Path, row: int, decode: Decode, paths: Paths) -> dict[str, Any]:
    """`runs`: the text in parts, each trained or not; padding is a run's business, not its."""
    shard = ExampleShard(path)
    example = shard.read(row)
    runs = [
        {"trained": trained, "tokens": stop - start, "text": decode(example.tokens[start:stop])}
        for start, stop, trained in runs_of(example)
    ]
    found = {
        "pieces": [_piece(example.input, example.offset, example.tokens, decode, paths)],
        "padding": 0,
        "turns": len(example.segments),
        "targets": example.num_targets,
        "runs": runs,
        "trained": [run["text"] for run in runs if run["trained"]],
    }
    shard.close()
    return found


def runs_of(example: Example) -> list[tuple[int, int, bool]]:
    """(start, stop, whether it is trained) of the parts of an example, one after the other."""
    edges, at = [], 0
    for start, stop in [*example.spans.tolist(), [len(example.tokens)] * 2]:
        edges += [(at, start, False), (start, stop, True)]
        at = stop
    return [one for one in edges if one[0] < one[1]]
