"""Train a byte-level BPE tokenizer: `leyden prep train-tokenizer --config F --key value ...`

Also `python -m spark_jobs.train_tokenizer ...` and `spark-submit spark_jobs/train_tokenizer.py`.

Spark reads the same records that tokenize_text reads and keeps the documents of the smallest
hashes until `sample_mib` of text; the driver trains on them in that order. So tokenizer.json is
the same, byte for byte, on any number of executors.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # spark-submit puts this folder on sys.path, not the repository's
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from dist.config import parse_config
from dist.errors import ConfigError, DataRefused, run_main
from dist.lease import Lease
from dist.progress import Progress
from dist.storage import Storage
from dist.versions import code_version, library_versions
from spark_jobs import job_record
from spark_jobs.records import Rules, read_chunks
from spark_jobs.session import run_with_progress, spark_session
from spark_jobs.sources import (
    InputFile,
    Split,
    describe_inputs,
    key_hashes,
    list_inputs,
    plan_tasks,
    record_keys,
    split_bytes_for,
)
from spark_jobs.tokenize_tasks import speak_plainly

TRANSFORM_VERSION = 1
_MIB = 1 << 20
_SIGN_BIT = np.uint64(1 << 63)
_NAMED_SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>")
# Llama 3's splitting of text into words. GPT-2's made kitoken and tokenizers differ where a
# quoted word that begins with s, t, m or d follows a space ("\n'terminator'").
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(kw_only=True)
class Config:
    """Settings of the job; those from `output` on do not change the tokenizer."""

    input: list[str] = field(default_factory=list)
    """Files, folders, patterns with * or URLs; repeat --input for several."""
    format: str = "auto"
    """auto (by extension), jsonl, parquet or text (a file is a document)."""
    text_field: str = "text"
    """Name of the JSON key or Parquet column that holds the text."""
    vocab_size: int = 32768
    """Tokens in all, special ones included; at least 256 more than num_special_tokens."""
    num_special_tokens: int = 16
    """Special tokens at the ids 0 to this: begin, end, pad, then reserved ones."""
    sample_mib: float = 256.0
    """Text to train on, chosen by hash from all documents."""
    seed: int = 0
    """Seeds the choice of the sample."""
    max_document_mib: float = 64.0
    """Longer documents are left out."""
    output: str = ""
    """Folder or URL that gets tokenizer.json."""
    master: str = ""
    """Spark master; empty is spark-submit's own, or local[*]."""
    scratch: str = ""
    """Folder on local disks for Spark's files; empty is the temporary folder."""
    num_tasks: int = 0
    """Input partitions; 0 chooses by size and cores."""

    def __post_init__(self) -> None:
        if not self.output:
            raise ConfigError("`output` is not set; pass --output FOLDER (see --help)")
        if self.num_special_tokens < len(_NAMED_SPECIALS):
            raise ConfigError(
                f"num_special_tokens is {self.num_special_tokens}; at least "
                f"{len(_NAMED_SPECIALS)} are needed for begin, end and pad"
            )
        if self.vocab_size < 256 + self.num_special_tokens:
            raise ConfigError(
                f"vocab_size {self.vocab_size} is too small: 256 bytes and "
                f"{self.num_special_tokens} special tokens need {256 + self.num_special_tokens}"
            )
        if min(self.sample_mib, self.max_document_mib) <= 0:
            raise ConfigError("sample_mib and max_document_mib must be above 0")
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed {self.seed} is not in [0, 2^64)")


def special_tokens(count: int) -> list[str]:
    """Texts of the special tokens, in the order of their ids from 0."""
    reserved = [f"<|reserved_{number}|>" for number in range(len(_NAMED_SPECIALS), count)]
    return [*_NAMED_SPECIALS, *reserved]


def train_bpe(texts: Iterable[str], vocab_size: int, specials: list[str]) -> bytes:
    """tokenizer.json of a byte-level BPE; equal texts in equal order give equal bytes."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return (tokenizer.to_str(pretty=True) + "\n").encode()


def _sample_task(tasks: Any, files: Any, rules: Rules, seed: int, below: int) -> Callable[..., Any]:
    """Documents whose hash is at most `below`."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            for number in batch.column(0).to_pylist():
                yield from sample_splits(tasks.value[number], files.value, rules, seed, below)

    return speak_plainly(run)


def sample_splits(
    splits: list[Split], files: list[InputFile], rules: Rules, seed: int, below: int
) -> Iterator[pa.RecordBatch]:
    """Rows (h as signed long in unsigned order, key, text) of the documents with h <= below."""
    for chunk in read_chunks(files, splits, rules):
        where = zip(chunk.inputs, chunk.offsets, strict=True)
        keys = [record_keys(files[number].path, [offset])[0] for number, offset in where]
        h = key_hashes(keys, seed)
        chosen = np.flatnonzero(h <= np.uint64(below)).tolist()
        if chosen:
            yield pa.record_batch(
                {
                    "h": pa.array((h[chosen] ^ _SIGN_BIT).view(np.int64)),
                    "key": pa.array([keys[i] for i in chosen], pa.binary()),
                    "text": pa.array([chunk.texts[i] for i in chosen], pa.string()),
                }
            )


def first_by_hash(table: pa.Table, sample_bytes: int) -> tuple[list[str], int]:
    """Texts of the smallest (h, key) up to sample_bytes, in that order, and their bytes."""
    table = table.sort_by([("h", "ascending"), ("key", "ascending")])
    sizes = pa.compute.binary_length(table.column("text")).to_numpy().astype(np.int64)
    ends = np.cumsum(sizes)
    count = int(np.searchsorted(ends, sample_bytes, side="left")) + 1
    count = min(count, len(ends))
    return table.column("text").slice(0, count).to_pylist(), int(ends[count - 1]) if count else 0


def _read_sample(config: Config, files: list[InputFile]) -> tuple[list[str], int]:
    rules = Rules(config.text_field, max(1, int(config.max_document_mib * _MIB)))
    wanted = int(config.sample_mib * _MIB)
    total = sum(file.size for file in files)
    with spark_session(config.master, "leyden train-tokenizer", scratch=config.scratch) as spark:
        context = spark.sparkContext
        split_bytes = split_bytes_for(total, context.defaultParallelism, config.num_tasks)
        tasks = plan_tasks(files, split_bytes)
        shared_tasks, shared_files = context.broadcast(tasks), context.broadcast(files)
        # File sizes only guess at the bytes of text: read more until there is enough. What is
        # chosen in the end does not depend on the guesses.
        share = min(1.0, 1.5 * wanted / total)
        while True:
            below = min((1 << 64) - 1, int(share * 2.0**64))
            task = _sample_task(shared_tasks, shared_files, rules, config.seed, below)
            rows = spark.range(0, len(tasks), 1, len(tasks))
            frame = rows.mapInArrow(task, "h long, key binary, text string")
            table = run_with_progress(spark, "read the sample", len(tasks), frame.toArrow)
            texts, size = first_by_hash(table, wanted)
            if size >= wanted or share >= 1.0:
                return texts, size
            share = min(1.0, share * max(2.0, 1.2 * wanted / max(size, 1)))


def run(config: Config) -> str:
    """Do the job, or find it done; returns the tokenizer's SHA-256."""
    started = time.time()
    storage = Storage(config.output)
    files = list_inputs(config.input, config.format)
    apart = ("input", "output", "master", "scratch", "num_tasks")
    semantic = {key: value for key, value in asdict(config).items() if key not in apart}
    job = job_record.job_digest("train_tokenizer", TRANSFORM_VERSION, files, semantic)
    if done := _already_done(storage, job):
        return done
    with Lease(storage, "lease.json", what=f"the folder {storage.url}"):
        texts, size = _read_sample(config, files)
        if not texts:
            raise DataRefused(
                f"the inputs hold no text in the field {config.text_field!r}; check --input, "
                "--format and --text_field"
            )
        with Progress(f"train the tokenizer on {size / 1e6:,.1f} MB", unit="steps"):
            specials = special_tokens(config.num_special_tokens)
            data = train_bpe(texts, config.vocab_size, specials)
        found = len(json.loads(data)["model"]["vocab"])
        if found < config.vocab_size:
            print(
                f"warning: the text gave only {found} tokens of {config.vocab_size}; give more "
                "text (--sample_mib) or lower --vocab_size",
                file=sys.stderr,
            )
        digest = hashlib.sha256(data).hexdigest()
        storage.write_atomic("tokenizer.json", data)
        provenance = {
            "job": "train_tokenizer",
            "job_digest": job,
            "tokenizer_digest": digest,
            "inputs": describe_inputs(files),
            "config": asdict(config),
            "code": code_version(),
            "libraries": library_versions(job_record.LIBRARIES),
            "started": job_record.utc(started),
            "ended": job_record.utc(time.time()),
            "sample": {"documents": len(texts), "bytes": size},
        }
        text = json.dumps(provenance, indent=1, sort_keys=True) + "\n"
        storage.write_atomic("tokenizer.provenance.json", text.encode())
    print(
        f"tokenizer of {found:,} tokens from {len(texts):,} documents ({size / 1e6:,.1f} MB) in "
        f"{time.time() - started:,.1f} s: {storage.url}/tokenizer.json"
    )
    print(f"next: leyden prep tokenize-text --tokenizer {storage.url} --input ... --output ...")
    return digest


def _already_done(storage: Storage, job: str) -> str | None:
    try:
        record = json.loads(storage.read("tokenizer.provenance.json"))
        digest = hashlib.sha256(storage.read("tokenizer.json")).hexdigest()
    except (FileNotFoundError, ValueError):
        return None
    if record.get("job_digest") != job or record.get("tokenizer_digest") != digest:
        return None
    print(f"already done: {storage.url}/tokenizer.json was trained by the same job")
    return digest


def main() -> int:
    """Command line of the job."""
    config = parse_config(
        Config,
        sys.argv[1:],
        prog="leyden prep train-tokenizer",
        description="Train a byte-level BPE tokenizer on a sample that Spark reads.",
    )
    run(config)
    return 0


if __name__ == "__main__":
    # Under its module name, so that Spark ships references to functions and not their code.
    from spark_jobs.train_tokenizer import main as _main

    run_main(_main)
