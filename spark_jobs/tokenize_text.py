"""Text to packed-token shards: `leyden prep tokenize-text --config F --key value ...`

Also `python -m spark_jobs.tokenize_text ...` and `spark-submit spark_jobs/tokenize_text.py ...`.

Stage 1 reads planned splits, refuses bad records, tokenizes. Each document's place follows from
hashes of its path and offset: h orders it, h * S >> 64 is its bucket. One shuffle brings buckets
together; stage 2 packs each into shards (shard_writer.py). So the same inputs and config give the
same data_digest on any number of executors, after any failure.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # spark-submit puts this folder on sys.path, not the repository's
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dist.commit import commit_dataset, publish_tokenizer, target_lease
from dist.config import parse_config
from dist.errors import ConfigError, DataRefused, run_main
from dist.shard_file import rows_per_batch
from dist.storage import Storage
from dist.tokenizer import ENGINES, TextTokenizer, choose_engine, token_dtype, tokenizer_digest
from dist.versions import code_version, library_versions
from spark_jobs import job_record
from spark_jobs.bookkeeping import build_manifest, check_messages, check_yield, summarise
from spark_jobs.records import Rules, read_chunks
from spark_jobs.shard_writer import WriterPlan
from spark_jobs.sources import (
    InputFile,
    describe_inputs,
    list_inputs,
    sample_splits,
)
from spark_jobs.tokenize_tasks import Transform, num_buckets, stage_1, stage_2
from spark_jobs.two_stages import run_two_stages

TRANSFORM_VERSION = 1
"""Raise when the same inputs and config would give other bytes."""
_MIB = 1 << 20
_SAMPLE_POINTS, _SAMPLE_PER_POINT = 32, 8


@dataclass(kw_only=True)
class Config:
    """Settings of the job; those from `output` on do not change the data."""

    input: list[str] = field(default_factory=list)
    """Files, folders, patterns with * or URLs; repeat --input for several."""
    format: str = "auto"
    """auto (by extension), jsonl, parquet or text (a file is a document)."""
    text_field: str = "text"
    """Name of the JSON key or Parquet column that holds the text."""
    tokenizer: str = ""
    """tokenizer.json, its folder, or a URL of either."""
    engine: str = "auto"
    """auto (kitoken where it equals the reference on a sample), kitoken or hf."""
    seq_len: int = 1024
    """Input tokens of a training row; a stored row holds one more."""
    bos: str = "<|begin_of_text|>"
    """Token put before each document, by its text; empty for none."""
    eos: str = "<|end_of_text|>"
    """Token put after each document, by its text; empty for none."""
    validation_fraction: float = 0.01
    """Share of the documents, chosen by hash, that becomes the split `validation`."""
    shard_size_mib: float = 256.0
    """Input bytes that one bucket should take, and the largest size of a shard's tokens."""
    seed: int = 0
    """Seeds the order of the rows and the choice of validation documents."""
    max_document_mib: float = 64.0
    """A longer document is refused (over_long)."""
    max_quarantine_fraction: float = 0.1
    """The job is refused if more than this share of the records is bad."""
    output: str = ""
    """Root of the dataset: a folder or an fsspec URL."""
    master: str = ""
    """Spark master; empty is spark-submit's own, or local[*]."""
    scratch: str = ""
    """Folder on local disks for shuffle files; empty is the temporary folder."""
    num_tasks: int = 0
    """Input partitions; 0 chooses by size and cores."""

    def __post_init__(self) -> None:
        for name in ("tokenizer", "output"):
            if not getattr(self, name):
                raise ConfigError(f"`{name}` is not set; pass --{name} (see --help)")
        if self.engine not in ENGINES:
            raise ConfigError(f"engine {self.engine!r} is not one of {', '.join(ENGINES)}")
        if self.seq_len < 1:
            raise ConfigError(f"seq_len is {self.seq_len}; a row needs at least 1 token")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction {self.validation_fraction} is not in [0, 1)")
        if not 0 <= self.max_quarantine_fraction <= 1:
            raise ConfigError(
                f"max_quarantine_fraction {self.max_quarantine_fraction} is not in [0, 1]"
            )
        if min(self.shard_size_mib, self.max_document_mib) <= 0:
            raise ConfigError("shard_size_mib and max_document_mib must be above 0")
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed {self.seed} is not in [0, 2^64)")


def semantic_config(config: Config) -> dict[str, Any]:
    """The settings that decide the data, and so the job's identity."""
    apart = ("input", "tokenizer", "output", "master", "scratch", "num_tasks")
    return {key: value for key, value in asdict(config).items() if key not in apart}


def run(config: Config) -> str:
    """Do the job, or find it done; returns the data_digest."""
    started = time.time()
    storage = Storage(config.output)
    tokenizer_json = job_record.read_tokenizer(config.tokenizer)
    files = list_inputs(config.input, config.format)
    semantic = {**semantic_config(config), "tokenizer": tokenizer_digest(tokenizer_json)}
    job = job_record.job_digest("tokenize_text", TRANSFORM_VERSION, files, semantic)
    job_record.announce(job, storage.url)
    if done := job_record.already_done(storage, job):
        return done
    with target_lease(storage) as lease:
        if done := job_record.already_done(storage, job):
            return done
        plan, facts = plan_transform(config, files, tokenizer_json)
        writer = _writer_plan(config, storage, plan, facts)
        messages = _run_spark(config, files, tokenizer_json, plan, writer)
        counters, quarantine, shards = check_messages(messages, plan)
        check_yield(
            config.text_field, config.max_quarantine_fraction, counters, quarantine, storage.url
        )
        manifest = build_manifest(shards, plan, facts, semantic["tokenizer"])
        publish_tokenizer(storage, tokenizer_json)
        ended = time.time()
        provenance = {
            "job": "tokenize_text",
            "transform_version": TRANSFORM_VERSION,
            "inputs": describe_inputs(files),
            "config": asdict(config),
            "code": code_version(),
            "libraries": library_versions(job_record.LIBRARIES),
            "started": job_record.utc(started),
            "ended": job_record.utc(ended),
            "counters": counters,
            "engine": {"name": plan.engine, "reason": facts["engine_reason"]},
            "quarantine": quarantine,
            "parent": None,
        }
        digest = commit_dataset(storage, manifest, provenance, job, lease)
    summarise(storage, manifest, counters, quarantine, facts, ended - started)
    return digest


def plan_transform(
    config: Config, files: list[InputFile], tokenizer_json: bytes
) -> tuple[Transform, dict[str, Any]]:
    """Everything that is decided once, by inputs, config and a sample of the rows."""
    rules = Rules(config.text_field, max(1, int(config.max_document_mib * _MIB)))
    reference = TextTokenizer(tokenizer_json, "hf")
    bos_id, eos_id = (_special_id(reference, config, name) for name in ("bos", "eos"))
    sample = sample_texts(files, rules)
    engine, reason = config.engine, "set by the config"
    if engine == "auto":
        engine, reason = choose_engine(tokenizer_json, sample)
        if engine == "hf":
            print(f"warning: {reason}; using the slower reference engine", file=sys.stderr)
    total = sum(file.size for file in files)
    held_out = config.validation_fraction
    plan = Transform(
        rules=rules,
        seed=config.seed,
        validation_below=int(held_out * 2.0**64),
        train_buckets=num_buckets(1 - held_out, total, config.shard_size_mib * _MIB),
        validation_buckets=num_buckets(held_out, total, config.shard_size_mib * _MIB),
        engine=engine,
        token_dtype=token_dtype(reference.vocab_size),
        bos_id=bos_id,
        eos_id=eos_id,
    )
    facts = {
        "engine_reason": reason,
        "vocab_size": reference.vocab_size,
        "seq_len": config.seq_len,
        "input_bytes": total,
        "rows_per_batch": rows_per_batch(config.seq_len, plan.token_dtype),
    }
    return plan, facts


def _special_id(tokenizer: TextTokenizer, config: Config, name: str) -> int | None:
    text = getattr(config, name)
    if not text:
        return None
    try:
        return tokenizer.token_id(text)
    except ConfigError as error:
        raise ConfigError(
            f"{name}: {error}; set --{name} to one of its tokens, or to '' for none"
        ) from None


def sample_texts(files: list[InputFile], rules: Rules) -> list[str]:
    """A few documents from evenly spaced places; DataRefused if none has the field."""
    texts: list[str] = []
    reasons: Counter[str] = Counter()
    for split in sample_splits(files, _SAMPLE_POINTS):
        taken = 0
        for chunk in read_chunks(files, [split], rules):
            texts += chunk.texts[: _SAMPLE_PER_POINT - taken]
            reasons.update(one.reason for one in chunk.refused)
            taken += len(chunk.texts)
            if taken or len(chunk.refused) >= _SAMPLE_PER_POINT:
                break
    if not texts and reasons and set(reasons) == {"field_missing"}:
        raise DataRefused(
            f"none of {reasons['field_missing']} sampled rows has a text in the field "
            f"{rules.text_field!r}; name the right one with --text_field"
        )
    return texts


def _writer_plan(
    config: Config, storage: Storage, plan: Transform, facts: dict[str, Any]
) -> WriterPlan:
    row_bytes = (config.seq_len + 1) * np.dtype(plan.token_dtype).itemsize
    return WriterPlan(
        output=storage.url,
        seq_len=config.seq_len,
        token_dtype=plan.token_dtype,
        rows_per_batch=facts["rows_per_batch"],
        max_rows=max(1, int(config.shard_size_mib * _MIB) // row_bytes),
        metadata={},
        num_buckets=plan.num_buckets,
    )


def _run_spark(
    config: Config,
    files: list[InputFile],
    tokenizer_json: bytes,
    plan: Transform,
    writer: WriterPlan,
) -> list[dict[str, Any]]:
    """Both stages; one message a shard and one of the counters."""

    def stages(context: Any, tasks: Any, shared_files: Any, paths: Any) -> tuple[Any, Any]:
        first = stage_1(tasks, shared_files, context.broadcast(tokenizer_json), plan)
        return first, stage_2(writer, paths)

    return run_two_stages(
        "tokenize-text", "tokenize", files, config.master, config.scratch, config.num_tasks,
        writer.num_buckets, stages,
    )  # fmt: skip


def main() -> int:
    """Command line of the job."""
    config = parse_config(
        Config,
        sys.argv[1:],
        prog="leyden prep tokenize-text",
        description="Turn text into packed-token shards with Spark.",
    )
    run(config)
    return 0


if __name__ == "__main__":
    # Under its module name, so that Spark ships references to functions and not their code.
    from spark_jobs.tokenize_text import main as _main

    run_main(_main)
