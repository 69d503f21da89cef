"""A dataset without the rows of a repro bundle: a new version, made of the old one's shards.

    leyden prep quarantine --from runs/NAME/guard/step-120 --output DATASET
    leyden train pretrain ... --switch_data DATASET@DIGEST      # the run goes on with it

No Spark is started: only the shards that hold such rows are written anew, all others are taken
as they are. The rows that stay keep their order, so that a run can go on in its own order. Of
examples, all that share the rows are left out: a run that packs goes on with its own rows, as far
as they are left, while a new run packs what is left anew.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dist.bundle import open_bundle_data, read_bundle, read_bundle_config
from dist.checked_shards import checked_path
from dist.commit import (
    commit_dataset,
    find_job,
    make_latest,
    publish_lengths,
    publish_shard,
    publish_template,
    publish_tokenizer,
    target_lease,
)
from dist.config import parse_config
from dist.dataset import Dataset, MixedDataset
from dist.documents import breaks_after, breaks_of
from dist.errors import ConfigError, run_main
from dist.example_file import ExampleShard, ExampleShardWriter
from dist.example_lengths import lengths_file
from dist.examples import ExampleDataset, ExampleSplit
from dist.manifest import TOTALS, Shard, digest_of
from dist.packing import PackedRows, num_targets
from dist.references import MIXED
from dist.shard_file import PackedShard, PackedShardWriter, ShardFile
from dist.storage import Storage
from dist.versions import code_version

TRANSFORM_VERSION = 1
Totals = dict[str, int]
Records = dict[int, NDArray[np.integer]]
"""Number of a shard of train -> records of its file, ascending."""


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
    source: str = ""
    """Of a run on several sources: the one to write a version of."""
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
    record, storage = read_bundle(config.bundle), Storage(config.output)
    parent, rows = chosen(config, record)
    records = records_of(parent, rows)
    starts = np.cumsum([0, *(shard.rows for shard in parent.manifest.shards_of("train"))])
    removed = [row for n in sorted(records) for row in (starts[n] + records[n]).tolist()]
    job = digest_of(
        {"job": "quarantine", "version": TRANSFORM_VERSION, "parent": parent.data_digest,
         "removed": removed}
    )  # fmt: skip
    done = find_job(storage, job)
    if done is not None:
        _finish(storage, parent.data_digest, done)
    else:
        with target_lease(storage) as lease:
            shards, lost = write_shards(parent, storage, records)
            publish_what_is_named(parent, storage)
            totals = {name: dict(counts) for name, counts in parent.manifest.totals.items()}
            for name, count in lost.items():
                totals["train"][name] -= count
            manifest = replace(parent.manifest, shards=tuple(shards), totals=totals)
            if isinstance(parent, ExampleDataset):
                lengths = left_lengths(parent, records)
                table = lengths_file(lengths, parent.manifest.schema["max_length"])
                manifest = replace(manifest, lengths_digest=publish_lengths(storage, table))
            provenance = {
                **_origin(parent), "job": "quarantine", "transform_version": TRANSFORM_VERSION,
                "parent": parent.data_digest, "parent_reference": parent.reference,
                "removed": {"split": "train", "rows": removed},
                "reason": config.reason or ", ".join(record["reasons"]),
                "bundle": {name: record[name] for name in ("run", "attempt", "step")},
                "config": asdict(config), "code": code_version(), "started": started,
                "ended": time.time(),
            }  # fmt: skip
            if manifest.kind == "packed_tokens":
                breaks = breaks_after(breaks_of(parent, "train"), removed)
                provenance["breaks"] = {"train": breaks}
            done = commit_dataset(storage, manifest, provenance, job, lease)
    name = f"{config.source}=" if config.source else ""
    then = f"a run goes on with --switch_data {name}{storage.url}@{done[:12]}"
    if name and isinstance(parent, ExampleDataset) and parent.packing == "packed":
        then = "of a mixture packed rows change: add it as a source of its own"
    what = "examples" if isinstance(parent, ExampleDataset) else "rows"
    print(f"{storage.url}@{done}: {len(removed)} {what} of {parent.reference} left out; {then}")
    return done


def _finish(storage: Storage, parent: str, done: str) -> None:
    """Let LATEST name a version that an earlier start made and was killed; never an older one than
    it names already."""
    with suppress(FileNotFoundError):
        if storage.read("LATEST").decode(errors="replace").strip() != parent:
            return
    with target_lease(storage):
        make_latest(storage, done)


def chosen(config: Config, record: dict[str, Any]) -> tuple[Dataset, list[int]]:
    """The dataset as the run of a bundle trained on it, and its rows of train to leave out."""
    reference, rows = record["data"], chosen_rows(record, config.rows)
    mixed = reference.startswith(MIXED)
    if mixed and config.data or config.source and not mixed:
        name, value = ("data", config.data) if mixed else ("source", config.source)
        many = "several sources" if mixed else "one dataset"
        raise ConfigError(f"--{name} {value}: the run of the bundle trains on {many}; leave it out")
    if config.data:
        reference = f"{config.data.partition('@')[0]}@{reference.rpartition('@')[2]}"
    dataset = open_bundle_data(record, reference, read_bundle_config(config.bundle))
    if not isinstance(dataset, MixedDataset):
        return dataset, sorted({row["row"] for row in rows})
    counts = Counter(row["source"] for row in rows)
    if config.source not in counts:
        listed = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
        raise ConfigError(
            f"the run of the bundle trains on several sources, and --source {config.source!r} has "
            f"none of the rows to leave out, which are of {listed}; name one, and write a version "
            "of each"
        )
    part = dataset.parts[dataset.names.index(config.source)]
    return part, sorted({row["source_row"] for row in rows if row["source"] == config.source})


def records_of(parent: Dataset, rows: list[int]) -> Records:
    """What the shard files hold of rows of train: of examples, those that share the rows."""
    split = parent.split("train")
    number, local = split.locate(np.array(rows, np.int64))
    found = {n: local[number == n] for n in set(number.tolist())}
    if isinstance(split, ExampleSplit):
        found = {
            n: np.sort(np.concatenate([split.packs[n].examples_of(row) for row in of.tolist()]))
            for n, of in found.items()
        }
    return found


def left_lengths(parent: ExampleDataset, records: Records) -> list[NDArray[np.integer]]:
    """Lengths of the examples of each shard of the derived version, in the manifest's order."""
    by_split = {name: list(parent.lengths_of(name)) for name in parent.manifest.splits()}
    for number, gone in records.items():
        by_split["train"][number] = np.delete(by_split["train"][number], gone)
    return [by_split[shard.split].pop(0) for shard in parent.manifest.shards]


def publish_what_is_named(parent: Dataset, storage: Storage) -> None:
    """Keep the parent's tokenizer and chat template beside the derived version too."""
    if parent.manifest.tokenizer_digest is not None:
        publish_tokenizer(storage, parent.read_tokenizer())
    if parent.manifest.schema.get("template_digest") is not None:
        publish_template(storage, parent.read_template())


def write_shards(parent: Dataset, storage: Storage, records: Records) -> tuple[list[Shard], Totals]:
    """Publish all shards without `records` of train; (shards in order, what is lost)."""
    lost: Totals = dict.fromkeys(("rows", "documents", "tokens", "targets"), 0)
    train = parent.manifest.shards_of("train")
    by_shard = {train[n].name: gone for n, gone in records.items()}
    without = _without_examples if parent.manifest.kind == "examples" else _without
    shards = []
    with tempfile.TemporaryDirectory(prefix="leyden-quarantine-") as scratch:
        for shard in parent.manifest.shards:
            path = checked_path(parent, shard)
            if shard.split != "train" or shard.name not in by_shard:
                publish_shard(storage, path, shard.xxh3_128, shard.bytes)
                shards.append(shard)
                continue
            target = Path(scratch) / path.name
            made = without(path, by_shard[shard.name], parent, target, lost)
            if made is not None:
                name = publish_shard(storage, target, made.xxh3_128, made.bytes)
                facts = {"rows": made.rows, "bytes": made.bytes}
                shards.append(
                    Shard(name=Path(name).name, xxh3_128=made.xxh3_128, split="train", **facts)
                )
    if not any(shard.split == "train" for shard in shards):
        raise ConfigError("no row of train would be left; nothing was committed")
    return shards, lost


def _without(
    path: Path, rows: NDArray[np.integer], parent: Dataset, target: Path, lost: Totals
) -> ShardFile | None:
    """Write a shard without `rows` (k,) to `target`; None if none is left. Adds to `lost`."""
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
    writer = PackedShardWriter(
        target, seq_len=schema["seq_len"], token_dtype=schema["token_dtype"],
        metadata={k: v for k, v in shard.metadata.items() if k not in known},
        rows_per_batch=schema["rows_per_batch"],
    )  # fmt: skip
    writer.write(kept)
    return writer.close()


def _without_examples(
    path: Path, records: NDArray[np.integer], parent: Dataset, target: Path, lost: Totals
) -> ShardFile | None:
    """As _without, of examples."""
    shard, gone = ExampleShard(path), set(records.tolist())
    writer = ExampleShardWriter(
        target, metadata={k: v for k, v in shard.metadata.items() if k != "format"},
        rows_per_batch=parent.manifest.schema["rows_per_batch"],
    )  # fmt: skip
    for row in range(shard.num_rows):
        one = shard.read(row)
        if row not in gone:
            writer.write(one)
            continue
        for name, count in zip(TOTALS, (1, 1, len(one.tokens), one.num_targets), strict=True):
            lost[name] += count
    return writer.close() if writer.num_rows else None


def read_rows(shard: PackedShard, rows: Any) -> PackedRows:
    """Rows (k,) of a shard with their pieces."""
    lineage = [shard.lineage(row) for row in rows.tolist()]
    pieces = np.array([one for row in lineage for one in row], np.int64).reshape(-1, 3)
    splits = np.cumsum([0] + [len(row) for row in lineage]).astype(np.int64)
    return PackedRows(
        tokens=shard.gather(rows).tokens, row_splits=splits, doc_lens=pieces[:, 2].astype(np.int32),
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
