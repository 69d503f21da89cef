"""Repro bundles: what a person needs to look at a bad step, `guard/step-<n>/` in the run.

bundle.json     step, reasons, loss and norm with their limits, losses of every rank's
                micro-batches, every row of the batch with its shard and source documents, the
                coordinates of its random numbers, a digest of the weights, the dataset
config.json     the resolved config

`leyden data replay RUN --bundle FOLDER` reads the exact rows and prints their text.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from dist.audit import TRAIN, Replay, ReplayedRow, read_pieces
from dist.batch_layout import batch_rows, batch_samples
from dist.dataset import Dataset, open_dataset
from dist.errors import ConfigError, DataRefused
from dist.examples import ExampleDataset, keep_rows, rows_as_trained
from dist.lineage import RowRef, refs_of
from dist.local_files import write_atomic
from dist.order import rank_span
from dist.references import MIXED
from dist.skips import Stream
from dist.split_table import SplitTable

BUNDLE_FORMAT = 1
BUNDLE_JSON = "bundle.json"


def rows_of_step(
    dataset: Dataset, split: SplitTable, order: Stream, t0: int, t1: int, *,
    world_size: int, micro_batch: int,
) -> list[ReplayedRow]:  # fmt: skip
    """The rows of a step [t0, t1) with their places and source documents, without text."""
    size = min(micro_batch, -(-(t1 - t0) // world_size))
    t = batch_samples(order, t0, t1)
    epochs, numbers = batch_rows(order, t0, t1, 0, t1 - t0)
    refs = refs_of(split, numbers, dataset)
    pieces = read_pieces(dataset, refs, text=False)
    found = []
    for rank in range(world_size):
        lo, hi = rank_span(t1 - t0, rank, world_size)
        for i in range(lo, hi):
            micro, index = divmod(i - lo, size)
            found.append(
                ReplayedRow(
                    t=int(t[i]),
                    epoch=int(epochs[i]),
                    rank=rank,
                    micro=micro,
                    index=index,
                    row=refs[i].row,
                    shard=refs[i].shard,
                    row_in_shard=refs[i].row_in_shard,
                    pieces=pieces[i],
                    source=refs[i].source,
                    source_row=refs[i].source_row,
                )  # fmt: skip
            )
    return found


def write_bundle(
    folder: Path, facts: dict[str, Any], rows: list[ReplayedRow], config: dict[str, Any]
) -> Path:
    """Write a bundle into `folder`, or `folder`-2, ... if that step has one; returns where."""
    number, place = 1, folder
    while (place / BUNDLE_JSON).exists():
        number += 1
        place = folder.with_name(f"{folder.name}-{number}")
    record = {"format": BUNDLE_FORMAT, **facts, "rows": [dataclasses.asdict(row) for row in rows]}
    write_atomic(place / "config.json", _json(config))
    write_atomic(place / BUNDLE_JSON, _json(record))
    return place


def read_bundle(path: Path | str) -> dict[str, Any]:
    """A bundle's record; `path` is its folder or its bundle.json."""
    path = Path(path)
    file = path / BUNDLE_JSON if path.is_dir() else path
    try:
        record = json.loads(file.read_bytes())
        if record["format"] != BUNDLE_FORMAT:
            raise ConfigError(
                f"{file} is a bundle of format {record['format']}; this Leyden reads "
                f"{BUNDLE_FORMAT}"
            )
        rows_of_bundle(record)
    except FileNotFoundError:
        raise ConfigError(
            f"no repro bundle at {path}: there is no {BUNDLE_JSON}; pass a folder such as "
            "runs/NAME/guard/step-120"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise DataRefused(f"{file} is not a repro bundle ({error!r}); was it edited?") from None
    return record


def rows_of_bundle(record: dict[str, Any]) -> list[RowRef]:
    """The rows of a bundle's step."""
    return [
        RowRef(split=TRAIN, row=row["row"], shard=row["shard"], row_in_shard=row["row_in_shard"])
        for row in record["rows"]
    ]


def read_bundle_config(path: Path | str) -> dict[str, Any]:
    """The resolved config that lies in a bundle; {} where it was taken away."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    try:
        return dict(json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError):
        return {}


def kept_facts(dataset: Dataset) -> dict[str, Any]:
    """For a bundle: whose packed rows a version has, where they are not its own."""
    if not isinstance(dataset, ExampleDataset) or dataset.began is None:
        return {}
    return {"kept": {"first": dataset.began.reference, "gone": list(dataset.gone)}}


def open_bundle_data(record: dict[str, Any], reference: str, config: dict[str, Any]) -> Dataset:
    """A bundle's dataset, at `reference`, as the rows that its run trained on."""
    dataset = rows_as_trained(open_dataset(reference), config)
    if "kept" not in record:
        return dataset
    first = record["kept"]["first"]
    try:
        began = open_dataset(first)
    except (ConfigError, DataRefused):
        began = open_dataset(f"{dataset.storage.url}@{first.rpartition('@')[2]}")
    return keep_rows(dataset, began, record["kept"]["gone"])


def replay_bundle(path: Path | str, *, data: str = "", rank: int | None = None) -> Replay:
    """The batch of a bundle, or one rank's part of it, with its text read from the shards.

    data: where the dataset lies now, if it was moved. Raises ConfigError or DataRefused.
    """
    record = read_bundle(path)
    reference = record["data"]
    if data and not reference.startswith(MIXED):
        reference = f"{data.partition('@')[0]}@{reference.rpartition('@')[2]}"
    dataset = open_bundle_data(record, reference, read_bundle_config(path))
    split = dataset.split(TRAIN)
    listed = [row for row in record["rows"] if rank is None or row["rank"] == rank]
    if not listed:
        raise ConfigError(f"rank {rank} has no row in {path}: it ran on {record['world_size']}")
    refs = refs_of(split, np.array([row["row"] for row in listed], np.int64), dataset)
    if [(one.shard, one.row_in_shard) for one in refs] != [
        (row["shard"], row["row_in_shard"]) for row in listed
    ]:
        raise DataRefused(f"the rows of {path} lie elsewhere in {dataset.reference}")
    pieces = read_pieces(dataset, refs, text=True)
    rows = [ReplayedRow(**{**row, "pieces": cut}) for row, cut in zip(listed, pieces, strict=True)]
    return Replay(
        data=dataset.reference, step=record["step"], attempt=record["attempt"], t0=record["t0"],
        t1=record["t1"], world_size=record["world_size"], consumed=True, rows=rows,
    )  # fmt: skip


def _json(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, sort_keys=True, default=str) + "\n").encode()
