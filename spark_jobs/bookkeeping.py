"""The books of a tokens job, on the driver: balanced before anything is committed."""

from __future__ import annotations

import json
import sys
from typing import Any

from dist.errors import DataRefused, LeydenError
from dist.manifest import TOTALS, Manifest, Shard
from dist.storage import Storage
from spark_jobs.records import REASONS
from spark_jobs.tokenize_tasks import Transform


def check_messages(
    messages: list[dict[str, Any]], plan: Transform
) -> tuple[dict[str, int], dict[str, Any] | None, list[dict[str, Any]]]:
    """Counters, quarantine file and shards in order, after the books were balanced.

    A failure here is a bug or a broken Spark, never the user's: nothing is committed then.
    """
    last = [one for one in messages if one["bucket"] == plan.num_buckets]
    shards = sorted(
        (one for one in messages if one["bucket"] < plan.num_buckets),
        key=lambda one: (one["bucket"], one["k"]),
    )
    if len(last) != 1:
        raise LeydenError(f"{len(last)} tasks answered for the counters; nothing is committed")
    numbers: dict[int, list[int]] = {}
    for one in shards:
        numbers.setdefault(one["bucket"], []).append(one["k"])
    wrong = [bucket for bucket, ks in numbers.items() if ks != list(range(len(ks)))]
    if wrong:
        raise LeydenError(f"buckets {wrong[:5]} were answered twice; nothing is committed")
    counters: dict[str, int] = {"documents_in": 0, "documents_out": 0, "tokens": 0}
    counters |= {"filtered": 0, **json.loads(last[0]["counters"])}
    quarantined = sum(counters.get(f"quarantined.{reason}", 0) for reason in REASONS)
    books = {
        "documents in = out + filtered + quarantined": (
            counters["documents_in"],
            counters["documents_out"] + counters["filtered"] + quarantined,
        ),
        "documents made = packed": (
            counters["documents_out"],
            sum(one["documents"] for one in shards),
        ),
        "tokens made = packed": (counters["tokens"], sum(one["tokens"] for one in shards)),
        "records refused = kept in quarantine": (quarantined, last[0]["rows"]),
    }
    balance(books)
    counters["quarantined"] = quarantined
    quarantine = {key: last[0][key] for key in ("name", "rows", "bytes")} if quarantined else None
    return counters, quarantine, shards


def balance(books: dict[str, tuple[int, int]]) -> None:
    """LeydenError unless the two sides of every entry are equal."""
    for what, (left, right) in books.items():
        if left != right:
            raise LeydenError(f"the books do not balance: {what}, but {left} != {right}")


def check_yield(
    text_field: str,
    max_quarantine_fraction: float,
    counters: dict[str, int],
    quarantine: dict[str, Any] | None,
    root: str,
) -> None:
    seen, bad = counters["documents_in"], counters["quarantined"]
    if seen == 0:
        raise DataRefused("the inputs hold no records; check --input and --format")
    reasons = ", ".join(f"{n} {reason}" for reason, n in by_reason(counters).items())
    where = f"{root}/{quarantine['name']}" if quarantine else ""
    if counters.get("quarantined.field_missing") == seen:
        raise DataRefused(
            f"none of {seen} rows has a text in the field {text_field!r}; name the right "
            f"one with --text_field (the rows are kept in {where})"
        )
    if bad > max_quarantine_fraction * seen:
        raise DataRefused(
            f"{bad} of {seen} records are bad ({reasons}), more than max_quarantine_fraction = "
            f"{max_quarantine_fraction}; nothing is committed. Look at {where}, then mend "
            "the input or raise the limit"
        )
    if counters["tokens"] == 0:
        raise DataRefused(f"no token is left of {seen} records ({reasons or 'all without text'})")


def by_reason(counters: dict[str, int]) -> dict[str, int]:
    found = {reason: counters.get(f"quarantined.{reason}", 0) for reason in REASONS}
    return {reason: count for reason, count in found.items() if count}


def build_manifest(
    messages: list[dict[str, Any]],
    plan: Transform,
    facts: dict[str, Any],
    tokenizer: str,
) -> Manifest:
    schema = {
        "seq_len": facts["seq_len"],
        "token_dtype": plan.token_dtype,
        "vocab_size": facts["vocab_size"],
        "bos_id": plan.bos_id,
        "eos_id": plan.eos_id,
        "rows_per_batch": facts["rows_per_batch"],
    }
    return manifest_of("packed_tokens", schema, tokenizer, messages, plan)


def manifest_of(
    kind: str,
    schema: dict[str, Any],
    tokenizer: str,
    messages: list[dict[str, Any]],
    plan: Transform,
) -> Manifest:
    """The manifest of the shards that the messages tell of, in their order."""
    shards = []
    totals: dict[str, dict[str, int]] = {}
    for one in messages:
        split = plan.split_of(one["bucket"])
        facts = {name: one[name] for name in ("name", "rows", "bytes")}
        shards.append(Shard(**facts, xxh3_128=one["digest"], split=split))
        sums = totals.setdefault(split, dict.fromkeys(TOTALS, 0))
        for name in TOTALS:
            sums[name] += one[name]
    if "train" not in totals:
        raise DataRefused("no document fell into the split train; lower --validation_fraction")
    if plan.validation_buckets and "validation" not in totals:
        print(
            "warning: no document fell into the split validation; give more documents or raise "
            "--validation_fraction",
            file=sys.stderr,
        )
    return Manifest(
        kind=kind, schema=schema, tokenizer_digest=tokenizer, shards=tuple(shards), totals=totals
    )


def summarise(
    storage: Storage,
    manifest: Manifest,
    counters: dict[str, int],
    quarantine: dict[str, Any] | None,
    facts: dict[str, Any],
    wall_s: float,
) -> None:
    text_mb = counters["text_bytes"] / 1e6
    print(f"{counters['documents_out']:,} documents, {counters['tokens']:,} tokens:")
    for split, sums in manifest.totals.items():
        shards = manifest.shards_of(split)
        size_mb = sum(shard.bytes for shard in shards) / 1e6
        print(
            f"  {split}: {sums['documents']:,} documents, {sums['rows']:,} rows of "
            f"{manifest.schema['seq_len']} + 1 tokens, {len(shards)} shards, {size_mb:,.1f} MB"
        )
    if quarantine:
        reasons = ", ".join(f"{n} {reason}" for reason, n in by_reason(counters).items())
        print(f"  refused: {reasons}; kept in {storage.url}/{quarantine['name']}")
    print(
        f"{text_mb:,.1f} MB of text in {wall_s:,.1f} s, {text_mb / wall_s:,.1f} MB/s with Spark's "
        f"start; tokenizer engine: {facts['engine_reason']}"
    )
    print(f"dataset: {storage.url}@{manifest.data_digest}")
    print(f"next: leyden train pretrain --config tiny --data.url {storage.url}")
