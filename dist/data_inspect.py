"""What a dataset version is, for people and programs: manifest, origin, and a scan of its rows.

The scan reads all rows of a small dataset and evenly spaced record batches of a large one, always
the same ones, and says which.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist.checked_shards import checked_batches, checked_path
from dist.dataset import Dataset, open_dataset
from dist.documents import Joiner, breaks_of, rows_of_batch, used_tokens
from dist.errors import LeydenError
from dist.example_file import ExampleShard
from dist.lineage import input_paths
from dist.tokenizer import TextTokenizer

SCAN_ROWS = 20_000
TOP_TOKENS = 30
MAX_CHAIN = 20
QUANTILES = (0, 0.1, 0.5, 0.9, 0.99, 1)
_INPUTS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What was counted in the rows that were read."""

    rows: int
    of_rows: int
    padding: dict[str, float]
    """Per split, the share of the scanned rows' positions that is padding."""
    counts: NDArray[np.int64]
    """(vocab_size,) how often each id stands there, padding left out."""
    document_lengths: NDArray[np.int64]
    """(documents,) tokens; of a part scan only documents that begin and end in it."""

    @property
    def complete(self) -> bool:
        return self.rows == self.of_rows


def facts_of(dataset: Dataset) -> dict[str, Any]:
    """The manifest by split, and where it came from."""
    manifest = dataset.manifest
    splits = {}
    for name in manifest.splits():
        shards = manifest.shards_of(name)
        splits[name] = {
            "shards": len(shards),
            "bytes": sum(shard.bytes for shard in shards),
            "shard_bytes": _spread([shard.bytes for shard in shards]),
            "shard_rows": _spread([shard.rows for shard in shards]),
            **manifest.totals.get(name, {}),
        }
    provenance = dataset.read_provenance()
    return {
        "reference": dataset.reference,
        "kind": manifest.kind,
        "schema": manifest.schema,
        "tokenizer_digest": manifest.tokenizer_digest,
        "splits": splits,
        "counters": counters_of(provenance or {}),
        "origin": origin_of(dataset, provenance or {}),
        "provenance": provenance,
    }


def _spread(values: list[int]) -> dict[str, int]:
    ordered = sorted(values)
    return {"min": ordered[0], "median": ordered[len(ordered) // 2], "max": ordered[-1]}


def counters_of(provenance: dict[str, Any]) -> dict[str, Any]:
    """Documents and tokens in, out, filtered and refused by reason; {} if the job kept none."""
    counters = provenance.get("counters") or {}
    prefix = "quarantined."
    reasons = {k.removeprefix(prefix): v for k, v in counters.items() if k.startswith(prefix) and v}
    plain = {key: value for key, value in counters.items() if not key.startswith(prefix)}
    return {**plain, "quarantined_by_reason": reasons} if counters else {}


def origin_of(dataset: Dataset, provenance: dict[str, Any]) -> dict[str, Any]:
    """Job, times, versions, a few inputs, and the chain of parents."""
    inputs = provenance.get("inputs") or []
    sizes = [one.get("size", 0) for one in inputs if isinstance(one, dict)]
    keys = ("job", "transform_version", "code", "started", "ended", "reason")
    return {
        **{key: provenance[key] for key in keys if provenance.get(key) is not None},
        "inputs": len(inputs),
        "input_bytes": sum(sizes),
        "first_inputs": [path for path, _ in input_paths(dataset)[:_INPUTS_SHOWN]],
        "parents": parent_chain(provenance),
    }


def parent_chain(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """Versions that this one was derived from, nearest first; ends where one is gone."""
    chain: list[dict[str, Any]] = []
    while (parent := provenance.get("parent")) and len(chain) < MAX_CHAIN:
        removed = (provenance.get("removed") or {}).get("rows") or []
        chain.append({"data_digest": parent, "by": provenance.get("job"), "removed": len(removed)})
        try:
            found = open_dataset(str(provenance.get("parent_reference")))
            provenance = found.read_provenance() or {}
        except (LeydenError, OSError):
            chain[-1]["gone"] = True
            break
    return chain


def unread(dataset: Dataset) -> str:
    """Why the rows of a dataset are not counted here; '' if they are."""
    if not dataset.is_remote:
        return ""
    return (
        "the dataset is remote: rows and tokens are the manifest's, and which tokens there are is "
        "not counted, as every shard would be fetched"
    )


def scan(dataset: Dataset, max_rows: int = SCAN_ROWS) -> Scan:
    """Count tokens, padding and document lengths in about `max_rows` rows."""
    if dataset.manifest.kind == "examples":
        return _scan_examples(dataset, max_rows)
    schema = dataset.manifest.schema
    counts = np.zeros(schema["vocab_size"], np.int64)
    total = sum(one["rows"] for one in dataset.manifest.totals.values())
    padding, lengths, rows_read = {}, [np.empty(0, np.int64)], 0
    for name in dataset.manifest.splits():
        budget = -(-max_rows * dataset.manifest.totals[name]["rows"] // total)
        used = positions = 0
        breaks = breaks_of(dataset, name)
        joiner, previous = Joiner(breaks), -1
        for number, row, last, batch in _batches(dataset, name, budget):
            rows = rows_of_batch(batch)
            filled = used_tokens(rows)
            width = rows.tokens.shape[1]
            tokens = rows.tokens[np.arange(width) < filled[:, None]]
            counts += np.bincount(tokens, minlength=len(counts))[: len(counts)]
            rows_read += len(rows)
            used, positions = used + int(filled.sum()), positions + rows.tokens.size
            begins = number == 0 or number == previous + 1
            if number != previous + 1:
                joiner, begins = Joiner(breaks, row), number == 0
            found = joiner.add(rows)
            if found is not None:
                # The first document after a gap may have begun before it.
                lengths.append(found.lengths if begins else found.lengths[1:])
            if last and (end := joiner.flush()) is not None:
                lengths.append(end.lengths)
            previous = number
        padding[name] = 1 - used / max(1, positions)
    return Scan(
        rows=rows_read, of_rows=total, padding=padding, counts=counts,
        document_lengths=np.concatenate(lengths),
    )  # fmt: skip


def _scan_examples(dataset: Dataset, max_rows: int) -> Scan:
    """Each example is a document; what padding there is a run decides (data.packing)."""
    counts = np.zeros(dataset.manifest.schema["vocab_size"], np.int64)
    shards = dataset.manifest.shards
    total = sum(shard.rows for shard in shards)
    lengths = []
    for shard in shards:
        wanted = min(shard.rows, -(-max_rows * shard.rows // total))
        chosen = np.arange(wanted) * shard.rows // wanted
        per_batch = dataset.manifest.schema["rows_per_batch"]
        batches = np.unique(chosen // per_batch).tolist()
        opened = ExampleShard(
            checked_path(dataset, shard) if wanted == shard.rows
            else checked_batches(dataset, shard, batches)
        )  # fmt: skip
        for example in chosen.tolist():
            tokens = opened.example_tokens(example)
            counts += np.bincount(tokens, minlength=len(counts))[: len(counts)]
            lengths.append(len(tokens))
        opened.close()
    return Scan(
        rows=len(lengths), of_rows=total, padding={}, counts=counts,
        document_lengths=np.array(lengths, np.int64),
    )  # fmt: skip


def _batches(dataset: Dataset, split: str, budget: int) -> Any:
    """(number of the record batch in the split, its first row, whether it is the last, batch),
    evenly spaced."""
    per_batch = dataset.manifest.schema["rows_per_batch"]
    shards = dataset.manifest.shards_of(split)
    starts = np.concatenate(([0], np.cumsum([-(-s.rows // per_batch) for s in shards])))
    first_rows = np.concatenate(([0], np.cumsum([shard.rows for shard in shards])))
    total = int(starts[-1])
    wanted = min(total, max(1, budget // per_batch))
    if budget >= sum(shard.rows for shard in shards):
        wanted = total
    chosen = np.arange(wanted) * total // wanted
    for index, shard in enumerate(shards):
        mine = chosen[(chosen >= starts[index]) & (chosen < starts[index + 1])]
        if not len(mine):
            continue
        path = (
            checked_path(dataset, shard) if wanted == total
            else checked_batches(dataset, shard, (mine - starts[index]).tolist())
        )  # fmt: skip
        with pa.memory_map(str(path), "r") as source:
            reader = pa.ipc.open_file(source)
            for number in mine.tolist():
                local = number - int(starts[index])
                row = int(first_rows[index]) + local * per_batch
                yield number, row, number == total - 1, reader.get_batch(local)


def scan_facts(found: Scan, tokenizer_json: bytes | None) -> dict[str, Any]:
    """A scan as JSON: top tokens decoded, special tokens, padding, lengths."""
    tokenizer = None if tokenizer_json is None else TextTokenizer(tokenizer_json)
    total = max(1, int(found.counts.sum()))
    order = np.argsort(-found.counts, kind="stable")[:TOP_TOKENS]

    def token(number: int, text: str | None = None) -> dict[str, Any]:
        if text is None:
            text = tokenizer.decode([number]) if tokenizer else ""
        count = int(found.counts[number])
        return {"id": number, "text": text, "count": count, "share": count / total}

    added = json.loads(tokenizer_json).get("added_tokens") or [] if tokenizer_json else []
    special = [token(int(one["id"]), one["content"]) for one in added
               if one.get("special") and int(one["id"]) < len(found.counts)]  # fmt: skip
    lengths = found.document_lengths
    quantiles = np.quantile(lengths, QUANTILES).tolist() if len(lengths) else []
    return {
        "rows": found.rows, "of_rows": found.of_rows, "complete": found.complete,
        "sampled_by": "record batches" if found.padding else "rows",
        "padding_share": found.padding,
        "distinct_tokens": int(np.count_nonzero(found.counts)),
        "top_tokens": [token(number) for number in order.tolist() if found.counts[number]],
        "special_tokens": [one for one in special if one["count"]],
        "documents": len(lengths),
        "mean_document_length": float(lengths.mean()) if len(lengths) else None,
        "document_length_quantiles": {
            f"{q:g}": float(v) for q, v in zip(QUANTILES, quantiles, strict=False)
        },
    }  # fmt: skip
