"""Chats to shards of examples with loss masks: `leyden prep chat --config F --key value ...`

Also `python -m spark_jobs.chat ...` and `spark-submit spark_jobs/chat.py ...`.

A row of messages is rendered by a chat template and tokenized; which tokens are trained follows
from the template's `{% generation %}` tags, or from what each turn adds, and from `train`. Reading,
order, split, shuffle, commit and books are those of tokenize_text. A job whose masks nobody can
have meant (all ones, all zeros, a stop token never trained) fails by name before Spark starts.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # spark-submit puts this folder on sys.path, not the repository's
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import datetime as dt
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import fsspec

from dist.commit import commit_dataset, publish_template, publish_tokenizer, target_lease
from dist.config import parse_config
from dist.errors import ConfigError, run_main
from dist.example_file import example_rows_per_batch
from dist.manifest import Manifest
from dist.storage import Storage
from dist.tokenizer import tokenizer_digest
from dist.versions import code_version, library_versions
from spark_jobs import job_record
from spark_jobs.bookkeeping import (
    balance,
    by_reason,
    check_messages,
    check_yield,
    manifest_of,
)
from spark_jobs.chat_tasks import chat_tokens, judge, judge_sample, stage_1, stage_2
from spark_jobs.chat_template import load_template
from spark_jobs.chat_tokens import ChatRules, TrainedTurns
from spark_jobs.example_writer import ExamplePlan
from spark_jobs.records import Rules
from spark_jobs.sources import InputFile, describe_inputs, list_inputs
from spark_jobs.tokenize_tasks import Transform, num_buckets
from spark_jobs.tokenize_text import sample_texts
from spark_jobs.two_stages import run_two_stages

TRANSFORM_VERSION = 2
"""Raise when the same inputs and config would give other bytes."""
_MIB = 1 << 20


@dataclass(kw_only=True)
class Config:
    """Settings of the job; those from `output` on do not change the data."""

    input: list[str] = field(default_factory=list)
    """Files, folders, patterns with * or URLs; repeat --input for several."""
    format: str = "auto"
    """auto (by extension; .json may hold one array), jsonl, json or parquet."""
    tokenizer: str = ""
    """tokenizer.json, its folder, or a URL of either; tokenizer_config.json beside it is read."""
    template: str = ""
    """Chat template: a Jinja file, a tokenizer_config.json, chatml or leyden (built in); empty for
    the tokenizer's own."""
    train: TrainedTurns = field(default_factory=TrainedTurns)
    """Which turns of each role are trained."""
    stop: str = ""
    """Token that ends a turn, by its text; empty for any special token."""
    special_text: Literal["refuse", "control"] = "refuse"
    """A message that holds a special token's text: refuse the row, or take it for the token."""
    max_length: int = 4096
    """Tokens of an example at most."""
    truncation: Literal["drop", "left", "right"] = "drop"
    """Of a longer one: drop it, or cut its left or its right side away."""
    today: str = "2024-07-26"
    """The date that a template's strftime_now tells, YYYY-MM-DD; never the clock's."""
    validation_fraction: float = 0.01
    """Share of the rows, chosen by hash, that becomes the split `validation`."""
    shard_size_mib: float = 256.0
    """Input bytes that one bucket should take, and the largest size of a shard's tokens."""
    seed: int = 0
    """Seeds the order of the rows and the choice of validation rows."""
    max_document_mib: float = 64.0
    """A longer row is refused (over_long)."""
    max_quarantine_fraction: float = 0.1
    """The job is refused if more than this share of the rows is bad."""
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
        if self.format == "text":
            raise ConfigError("format text holds no chats; choose auto, jsonl, json or parquet")
        if self.max_length < 2:
            raise ConfigError(f"max_length is {self.max_length}; an example needs 2 tokens")
        for name in ("validation_fraction", "max_quarantine_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} {getattr(self, name)} is not in [0, 1]")
        if self.validation_fraction == 1:
            raise ConfigError("validation_fraction is 1; nothing would be left to train on")
        if min(self.shard_size_mib, self.max_document_mib) <= 0:
            raise ConfigError("shard_size_mib and max_document_mib must be above 0")
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed {self.seed} is not in [0, 2^64)")
        try:
            dt.date.fromisoformat(self.today)
        except ValueError:
            raise ConfigError(f"today {self.today!r} is not a date as YYYY-MM-DD") from None


def run(config: Config) -> str:
    """Do the job, or find it done; returns the data_digest."""
    started = time.time()
    storage = Storage(config.output)
    tokenizer_json = job_record.read_tokenizer(config.tokenizer)
    template = load_template(config.template, config.tokenizer, config.today)
    files = find_arrays(list_inputs(config.input, config.format))
    apart = ("input", "tokenizer", "template", "output", "master", "scratch", "num_tasks")
    semantic = {key: value for key, value in asdict(config).items() if key not in apart}
    semantic |= {"tokenizer": tokenizer_digest(tokenizer_json), "template": asdict(template)}
    job = job_record.job_digest("chat", TRANSFORM_VERSION, files, semantic)
    if done := job_record.already_done(storage, job):
        return done
    with target_lease(storage) as lease:
        if done := job_record.already_done(storage, job):
            return done
        names = ("max_length", "truncation", "special_text", "stop", "train")
        rules = ChatRules(template=template, **{name: getattr(config, name) for name in names})
        plan, schema = plan_transform(config, files, rules, tokenizer_json)
        messages = _run_spark(config, files, tokenizer_json, plan, rules, schema)
        counters, quarantine, shards = check_messages(messages, plan)
        balance({
            "trained tokens made = written": (
                counters["targets"], sum(one["targets"] for one in shards)
            )
        })  # fmt: skip
        judge(counters, rules)
        fraction = config.max_quarantine_fraction
        check_yield("messages", fraction, counters, quarantine, storage.url)
        schema["template_digest"] = publish_template(storage, template.text)
        manifest = manifest_of("examples", schema, semantic["tokenizer"], shards, plan)
        publish_tokenizer(storage, tokenizer_json)
        ended = time.time()
        provenance = {
            "job": "chat",
            "transform_version": TRANSFORM_VERSION,
            "inputs": describe_inputs(files),
            "config": asdict(config),
            "code": code_version(),
            "libraries": library_versions((*job_record.LIBRARIES, "jinja2")),
            "started": job_record.utc(started),
            "ended": job_record.utc(ended),
            "counters": counters,
            "quarantine": quarantine,
            "parent": None,
        }
        digest = commit_dataset(storage, manifest, provenance, job, lease)
    summarise(storage, manifest, counters, quarantine, ended - started)
    return digest


def find_arrays(files: Sequence[InputFile]) -> list[InputFile]:
    """The files, with those called .json that hold one array known as such."""
    found = []
    for file in files:
        stem = file.path.lower().removesuffix(".gz").removesuffix(".zst")
        if file.format == "jsonl" and stem.endswith(".json"):
            with fsspec.open(file.url, "rb", compression=file.compression or None) as stream:
                if stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                    file = replace(file, format="json")
        found.append(file)
    return found


def plan_transform(
    config: Config, files: list[InputFile], rules: ChatRules, tokenizer_json: bytes
) -> tuple[Transform, dict[str, Any]]:
    """Everything that is decided once, and the manifest's schema; refuses hopeless jobs."""
    chat = chat_tokens(rules, tokenizer_json)
    reading = Rules("", max(1, int(config.max_document_mib * _MIB)))
    # Points of the sample may lie on one row in small files.
    judge_sample(list(dict.fromkeys(sample_texts(files, reading))), chat)
    total = sum(file.size for file in files)
    held_out, shard_bytes = config.validation_fraction, config.shard_size_mib * _MIB
    plan = Transform(
        rules=reading, seed=config.seed, validation_below=int(held_out * 2.0**64),
        train_buckets=num_buckets(1 - held_out, total, shard_bytes),
        validation_buckets=num_buckets(held_out, total, shard_bytes),
        engine="hf", token_dtype="uint32", bos_id=None, eos_id=None,
    )  # fmt: skip
    special, tokens = chat.tokenizer.special, rules.template.tokens
    schema = {
        "max_length": config.max_length,
        "token_dtype": "uint32",
        "vocab_size": chat.tokenizer.vocab_size,
        "bos_id": special.get(tokens.get("bos_token", "")),
        "eos_id": special.get(config.stop or tokens.get("eos_token", "")),
        "rows_per_batch": example_rows_per_batch(config.max_length),
    }
    return plan, schema


def _run_spark(
    config: Config, files: list[InputFile], tokenizer_json: bytes, plan: Transform,
    rules: ChatRules, schema: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """Both stages; one message a shard and one of the counters."""
    writer = ExamplePlan(
        output=Storage(config.output).url, rows_per_batch=schema["rows_per_batch"],
        max_tokens=max(1, int(config.shard_size_mib * _MIB) // 4), num_buckets=plan.num_buckets,
    )  # fmt: skip

    def stages(context: Any, tasks: Any, shared_files: Any, paths: Any) -> tuple[Any, Any]:
        first = stage_1(tasks, shared_files, context.broadcast(tokenizer_json), plan, rules)
        return first, stage_2(writer, paths)

    return run_two_stages(
        "chat", "chat", files, config.master, config.scratch, config.num_tasks,
        plan.num_buckets, stages,
    )  # fmt: skip


def summarise(
    storage: Storage, manifest: Manifest, counters: dict[str, int], quarantine: Any, wall_s: float
) -> None:
    """Tell what was made, what was left out, and what to do next."""
    print(
        f"{counters['documents_out']:,} examples, {counters['tokens']:,} tokens, of which "
        f"{counters['targets']:,} ({counters['targets'] / counters['tokens']:.0%}) are trained:"
    )
    for split, sums in manifest.totals.items():
        shards = manifest.shards_of(split)
        size_mb = sum(shard.bytes for shard in shards) / 1e6
        print(f"  {split}: {sums['rows']:,} examples, {len(shards)} shards, {size_mb:,.1f} MB")
    names = ("truncated", "filtered.over_length", "filtered.nothing_trained")
    left = {name.rpartition(".")[2]: counters.get(name, 0) for name in names}
    if any(left.values()):
        print("  " + ", ".join(f"{count:,} {name}" for name, count in left.items() if count))
    if quarantine:
        reasons = ", ".join(f"{n} {reason}" for reason, n in by_reason(counters).items())
        print(f"  refused: {reasons}; kept in {storage.url}/{quarantine['name']}")
    print(f"{counters['text_bytes'] / 1e6:,.1f} MB in {wall_s:,.1f} s with Spark's start")
    print(f"dataset: {storage.url}@{manifest.data_digest}")
    print(f"next: leyden data inspect {storage.url}")


def main() -> int:
    """Command line of the job."""
    config = parse_config(
        Config,
        sys.argv[1:],
        prog="leyden prep chat",
        description="Turn chats into examples with loss masks, with Spark.",
    )
    run(config)
    return 0


if __name__ == "__main__":
    # Under its module name, so that Spark ships references to functions and not their code.
    from spark_jobs.chat import main as _main

    run_main(_main)
