"""A dataset without the rows of a repro bundle: a new version, made of the old one's shards.

    leyden prep quarantine --from runs/NAME/guard/step-120 --output DATASET
    leyden train pretrain ... --switch_data DATASET@DIGEST      # the run goes on with it

No Spark is started: only the shards that hold such rows are written anew, all others are taken
as they are. The rows that stay keep their order, so that a run can go on in its own order.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dist.bundle import read_bundle
from dist.commit import commit_dataset, find_job, publish_shard, publish_tokenizer, target_lease
from dist.config import parse_config
from dist.dataset import Dataset, open_dataset
from dist.errors import ConfigError, run_main
from dist.manifest import Shard, digest_of
from dist.packing import PackedRows, num_targets
from dist.shard_file import PackedShard, PackedShardWriter
from dist.storage import Storage
from dist.versions import code_version

TRANSFORM_VERSION = 1
Totals = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to leave out, and where the new version goes."""

    bundle: str = ""
    """Repro bundle of the guard: a folder guard/step-<n> of a run. --from is the same."""
    output: str = ""
    """Folder or URL of the new version; may be the dataset's own folder."""
    rows: Literal["bad", "all"] = "bad"
    """bad: rows of micro-batches whose loss was not finite (all rows if every loss was);
    all: every row of the step."""
    data: str = ""
    """Where the bundle's dataset is now, if it was moved."""
    reason: str = ""
    """For the provenance; by default what the guard said."""


def chosen_rows(record: dict[str, Any], which: str) -> list[dict[str, Any]]:
    """Rows of a bundle to leave out."""
    losses = {
        (one["rank"], micro): loss
        for one in record["ranks"]
        for micro, loss in enumerate(one["losses"])
    }
    bad = [row for row in record["rows"] if isinstance(losses[row["rank"], row["micro"]], str)]
    return bad if which == "bad" and bad else record["rows"]


def run(config: Config) -> str:
    """Write the derived version, or find it done; returns its data_digest."""
    if not config.bundle or not config.output:
        raise ConfigError("pass --from BUNDLE (runs/NAME/guard/step-<n>) and --output FOLDER")
    started = time.time()
    record = read_bundle(config.bundle)
    reference = record["data"]
    if config.data:
        reference = f"{config.data.partition('@')[0]}@{reference.rpartition('@')[2]}"
    parent, storage = open_dataset(reference), Storage(config.output)
    if parent.manifest.kind != "packed_tokens":
        raise ConfigError(
            f"{parent.reference} is of kind {parent.manifest.kind}: without a row all others would "
            "be packed anew, and the run could not go on in its order. Leave the source's record "
            "out of the input, write the dataset anew, and start another run"
        )
    removed = sorted({row["row"] for row in chosen_rows(record, config.rows)})
    job = digest_of(
        {"job": "quarantine", "version": TRANSFORM_VERSION, "parent": parent.data_digest,
         "removed": removed}
    )  # fmt: skip
    done = find_job(storage, job)
    if done is None:
        with target_lease(storage) as lease:
            shards, lost = write_shards(parent, storage, removed)
            if parent.manifest.tokenizer_digest is not None:
                publish_tokenizer(storage, parent.read_tokenizer())
            totals = {name: dict(counts) for name, counts in parent.manifest.totals.items()}
            for name, count in lost.items():
                totals["train"][name] -= count
            manifest = replace(parent.manifest, shards=tuple(shards), totals=totals)
            provenance = {
                **_origin(parent), "job": "quarantine", "transform_version": TRANSFORM_VERSION,
                "parent": parent.data_digest, "parent_reference": parent.reference,
                "removed": {"split": "train", "rows": removed},
                "reason": config.reason or ", ".join(record["reasons"]),
                "bundle": {name: record[name] for name in ("run", "attempt", "step")},
                "config": asdict(config), "code": code_version(), "started": started,
                "ended": time.time(),
            }  # fmt: skip
            done = commit_dataset(storage, manifest, provenance, job, lease)
    print(
        f"{storage.url}@{done}: {len(removed)} rows of {parent.reference} left out; a run goes on "
        f"with --switch_data {storage.url}@{done[:12]}"
    )
    return done


def write_shards(
    parent: Dataset, storage: Storage, removed: Sequence[int]
) -> tuple[list[Shard], Totals]:
    """Publish all shards without rows `removed` of train; (shards in order, what is lost)."""
    split = parent.split("train")
    number, local = split.locate(np.array(removed, np.int64))
    lost: Totals = dict.fromkeys(("rows", "documents", "tokens", "targets"), 0)
    by_shard = {split.shards[n].name: local[number == n] for n in set(number.tolist())}
    shards = []
    with tempfile.TemporaryDirectory(prefix="leyden-quarantine-") as scratch:
        for shard in parent.manifest.shards:
            path = parent.shard_path(shard)
            if shard.split != "train" or shard.name not in by_shard:
                publish_shard(storage, path, shard.xxh3_128, shard.bytes)
                shards.append(shard)
                continue
            made = _without(path, by_shard[shard.name], parent, Path(scratch), lost)
            if made is not None:
                name = publish_shard(storage, made[0], made[1].xxh3_128, made[1].bytes)
                facts = {"rows": made[1].rows, "bytes": made[1].bytes}
                shards.append(
                    Shard(name=Path(name).name, xxh3_128=made[1].xxh3_128, split="train", **facts)
                )
    if not any(shard.split == "train" for shard in shards):
        raise ConfigError("no row of train would be left; nothing was committed")
    return shards, lost


def _without(path: Path, rows: Any, parent: Dataset, scratch: Path, lost: Totals) -> Any:
    """(file, ShardFile) of a shard without `rows` (k,); None if none is left. Adds to `lost`."""
    shard = PackedShard(path)
    gone = read_rows(shard, np.asarray(rows, np.int64))
    kept = read_rows(shard, np.setdiff1d(np.arange(shard.num_rows), rows))
    lost["rows"] += len(gone)
    lost["tokens"] += int(gone.doc_lens.sum())
    lost["targets"] += int(num_targets(gone.doc_lens, gone.row_splits).sum())
    lost["documents"] += len(_documents(gone) - _documents(kept))
    shard.close()
    if not len(kept):
        return None
    schema = parent.manifest.schema
    known = ("format", "seq_len", "token_dtype")
    target = scratch / path.name
    writer = PackedShardWriter(
        target, seq_len=schema["seq_len"], token_dtype=schema["token_dtype"],
        metadata={k: v for k, v in shard.metadata.items() if k not in known},
        rows_per_batch=schema["rows_per_batch"],
    )  # fmt: skip
    writer.write(kept)
    return target, writer.close()


def read_rows(shard: PackedShard, rows: Any) -> PackedRows:
    """Rows (k,) of a shard with their pieces."""
    tokens = np.empty((len(rows), shard.seq_len + 1), shard.dtype)
    shard.gather(rows, tokens)
    lineage = [shard.lineage(row) for row in rows.tolist()]
    pieces = np.array([one for row in lineage for one in row], np.int64).reshape(-1, 3)
    splits = np.cumsum([0] + [len(row) for row in lineage]).astype(np.int64)
    return PackedRows(
        tokens=tokens, row_splits=splits, doc_lens=pieces[:, 2].astype(np.int32),
        doc_input=pieces[:, 0].astype(np.int32), doc_offset=pieces[:, 1],
    )  # fmt: skip


def _documents(rows: PackedRows) -> set[tuple[int, int]]:
    return set(zip(rows.doc_input.tolist(), rows.doc_offset.tolist(), strict=True))


def _origin(parent: Dataset) -> dict[str, Any]:
    """What the parent's provenance says of its inputs: lineage columns point into that list."""
    record = parent.read_provenance() or {}
    return {"inputs": record["inputs"]} if "inputs" in record else {}


def main() -> int:
    """Command line of the job."""
    words = ["--bundle" + word[6:] if word.split("=")[0] == "--from" else word
             for word in sys.argv[1:]]  # fmt: skip
    run(
        parse_config(
            Config,
            words,
            prog="leyden prep quarantine",
            description="Write a dataset version without the rows of a repro bundle.",
        )  # fmt: skip
    )
    return 0


if __name__ == "__main__":
    run_main(main)
