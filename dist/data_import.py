"""Token datasets of others into a packed dataset: checked, packed, committed as a job does.

Documents keep their order; training permutes rows anyway. doc_input is the source file, doc_offset
the number of the token in it with which the document starts.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dist.commit import commit_dataset, find_job, publish_tokenizer, target_lease
from dist.errors import ConfigError, DataRefused
from dist.manifest import Manifest, digest_of
from dist.mds_format import find_mds
from dist.megatron_format import find_megatron
from dist.progress import Progress
from dist.shard_file import file_digest, rows_per_batch
from dist.storage import Storage
from dist.table_format import find_tables
from dist.tar_format import find_tars
from dist.token_shards import SplitWriter
from dist.token_source import Block, SourceFile
from dist.tokenizer import TextTokenizer, token_dtype, tokenizer_digest
from dist.versions import code_version, library_versions

FORMATS = ("megatron", "mds", "hf", "webdataset")
TRANSFORM_VERSION = 1
"""Raise when the same source and options would give other bytes."""


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """What to import, and what decides the rows."""

    format: str
    source: Path
    output: str
    tokenizer: str
    """tokenizer.json or its folder."""
    seq_len: int = 1024
    column: str = ""
    """Column or member that holds the tokens; by default input_ids or tokens."""
    bytes_dtype: str = ""
    """Type of an MDS column of plain bytes."""
    eos: str = ""
    """Text of a token after which documents that were joined are cut apart."""
    validation_fraction: float = 0.0
    """Share of the documents of `train`, chosen by hash, that becomes `validation`."""
    shard_size_mib: float = 256.0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"--from {self.format!r} is not one of {', '.join(FORMATS)}")
        if self.seq_len < 1 or self.shard_size_mib <= 0:
            raise ConfigError(
                f"seq_len {self.seq_len} must be at least 1, shard_size_mib "
                f"{self.shard_size_mib} above 0"
            )
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction {self.validation_fraction} is not in [0, 1)")
        if self.bytes_dtype and self.bytes_dtype not in ("uint16", "int32", "uint32", "int64"):
            raise ConfigError(f"bytes_dtype {self.bytes_dtype!r}: uint16, int32, uint32 or int64")
        if "://" in str(self.source) or ":/" in str(self.source):
            raise ConfigError(f"{self.source}: import reads local folders; copy it to a disk first")


def import_tokens(plan: ImportPlan, *, progress: bool = True) -> tuple[str, bool]:
    """Do the import, or find it done. Returns (data_digest, whether it was done before)."""
    started = time.time()
    storage = Storage(plan.output)
    tokenizer_json = _read_tokenizer(plan.tokenizer)
    files = find_files(plan)
    inputs = _describe(plan.source, files, progress)
    semantic = {k: v for k, v in asdict(plan).items() if k not in ("source", "output", "tokenizer")}
    semantic["tokenizer"] = tokenizer_digest(tokenizer_json)
    known = [[one["path"], one["size"], one["stamp"], one["split"]] for one in inputs]
    job = digest_of({"job": "import", "version": TRANSFORM_VERSION, "inputs": known,
                     "config": semantic})  # fmt: skip
    if (done := _done(storage, job)) is not None:
        return done, True
    with target_lease(storage) as lease:
        if (done := _done(storage, job)) is not None:
            return done, True
        manifest, counters = _pack(plan, files, inputs, storage, tokenizer_json, progress)
        publish_tokenizer(storage, tokenizer_json)
        provenance = {
            "job": "import", "transform_version": TRANSFORM_VERSION, "inputs": inputs,
            "config": {**asdict(plan), "source": str(plan.source.absolute())},
            "offsets": "token of the input at which the document starts",
            "code": code_version(),
            "libraries": library_versions(("pyarrow", "numpy", "tokenizers", "xxhash")),
            "started": _utc(started), "ended": _utc(time.time()), "counters": counters,
            "quarantine": None, "parent": None,
        }  # fmt: skip
        return commit_dataset(storage, manifest, provenance, job, lease), False


def find_files(plan: ImportPlan) -> list[SourceFile]:
    """The source's files in order; if none is of `train` and all of one split, they become it."""
    if plan.format == "megatron":
        files = find_megatron(plan.source)
    elif plan.format == "mds":
        files = find_mds(plan.source, plan.column, plan.bytes_dtype)
    elif plan.format == "hf":
        files = find_tables(plan.source, plan.column)
    else:
        files = find_tars(plan.source, plan.column)
    splits = {file.split for file in files}
    if "train" not in splits and len(splits) > 1:
        raise ConfigError(f"{plan.source} has the splits {sorted(splits)} and no train")
    if len(splits) == 1:
        files = [replace(file, split="train") for file in files]
    if plan.validation_fraction and "validation" in splits and len(splits) > 1:
        raise ConfigError(
            f"{plan.source} has a split validation of its own; leave --validation_fraction out"
        )
    # Shards are listed split by split, train first.
    order = ("train", "validation", "test")
    return sorted(files, key=lambda file: order.index(file.split))


def _read_tokenizer(given: str) -> bytes:
    path = Path(given)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"no tokenizer at {given!r}; pass the tokenizer.json (or its folder) that made the "
            "tokens with --tokenizer"
        )
    return path.read_bytes()


def _describe(source: Path, files: list[SourceFile], progress: bool) -> list[dict[str, Any]]:
    """Inputs as the provenance lists them, with the xxh3-128 of their bytes."""
    base = source if source.is_dir() else source.parent
    total = sum(file.path.stat().st_size for file in files if file.path.is_file())

    def one(file: SourceFile) -> dict[str, Any]:
        if not file.path.is_file():
            raise DataRefused(f"{file.path} is missing; copy the source anew")
        stamps = [f"xxh3_128:{file_digest(path)}" for path in (file.path, *file.beside)]
        size = file.path.stat().st_size
        bar.update(size / 1e6)
        return {
            "url": str(file.path.absolute()), "path": str(file.path.relative_to(base)),
            "size": size, "stamp": " ".join(stamps), "split": file.split,
        }  # fmt: skip

    with (
        Progress("hash the source", total / 1e6, "MB", enabled=progress) as bar,
        concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        return list(pool.map(one, files))


def _done(storage: Storage, job: str) -> str | None:
    digest = find_job(storage, job)
    if digest is not None and storage.read("LATEST").decode().strip() != digest:
        storage.write_atomic("LATEST", digest.encode() + b"\n")
    return digest


def _pack(
    plan: ImportPlan, files: list[SourceFile], inputs: list[dict[str, Any]],
    storage: Storage, tokenizer_json: bytes, progress: bool,
) -> tuple[Manifest, dict[str, int]]:  # fmt: skip
    """Publish the shards of all files; (manifest, counters), nothing committed."""
    tokenizer = TextTokenizer(tokenizer_json)
    cut = tokenizer.token_id(plan.eos) if plan.eos else None
    dtype = token_dtype(tokenizer.vocab_size)
    ends = _Ends(tokenizer_json)
    counters = dict.fromkeys(("documents_in", "documents_out", "filtered", "quarantined"), 0)
    shards, totals = [], {}
    with (
        tempfile.TemporaryDirectory(prefix="leyden-import-") as scratch,
        Progress("pack", sum(one["size"] for one in inputs) / 1e6, "MB", enabled=progress) as bar,
    ):
        writers: dict[str, SplitWriter] = {}
        for number, file in enumerate(files):
            position = 0
            for block in _checked(file, tokenizer.vocab_size):
                lengths = block.lengths if cut is None else cut_after(block, cut)
                ends.see(block.tokens, lengths)
                offsets = position + np.cumsum(lengths) - lengths
                held_out = _held_out(inputs[number]["path"], offsets, plan.validation_fraction)
                for split, mine in ((file.split, ~held_out), ("validation", held_out)):
                    if mine.any():
                        writer = writers.get(split)
                        if writer is None:
                            writer = writers[split] = SplitWriter(
                                split, storage, Path(scratch), seq_len=plan.seq_len, dtype=dtype,
                                max_bytes=plan.shard_size_mib * 2**20,
                            )  # fmt: skip
                        writer.add(block.tokens, lengths, offsets, number, mine)
                counters["documents_in"] += len(lengths)
                counters["filtered"] += int((lengths == 0).sum())
                position += len(block.tokens)
            bar.update(inputs[number]["size"] / 1e6)
        for split in sorted(writers, key=("train", "validation", "test").index):
            shards += writers[split].close()
            totals[split] = writers[split].totals
    if "train" not in totals:
        raise DataRefused(f"{plan.source} holds no tokens of the split train")
    counters["documents_out"] = sum(one["documents"] for one in totals.values())
    counters["tokens"] = sum(one["tokens"] for one in totals.values())
    if counters["documents_in"] != counters["documents_out"] + counters["filtered"]:
        raise DataRefused(f"the books do not balance: {counters}; nothing is committed")
    bos, eos = ends.found()
    schema = {
        "seq_len": plan.seq_len, "token_dtype": dtype, "vocab_size": tokenizer.vocab_size,
        "bos_id": bos, "eos_id": eos, "rows_per_batch": rows_per_batch(plan.seq_len, dtype),
    }  # fmt: skip
    manifest = Manifest(
        kind="packed_tokens", schema=schema, tokenizer_digest=tokenizer_digest(tokenizer_json),
        shards=tuple(shards), totals=totals,
    )  # fmt: skip
    return manifest, counters


def _checked(file: SourceFile, vocab_size: int) -> Iterator[Block]:
    """Blocks of a file whose ids are all of the vocabulary; DataRefused names the first other."""
    before = 0
    for block in file.read():
        tokens = block.tokens
        # One unsigned comparison would let a negative id of a signed type pass as a large one.
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= vocab_size):
            bad = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
            document = int(np.searchsorted(np.cumsum(block.lengths), bad, side="right"))
            raise DataRefused(
                f"{file.path}: document {before + document} holds the id {int(tokens[bad])}, the "
                f"tokenizer has ids 0 to {vocab_size - 1}; pass the tokenizer that made the tokens"
            )
        yield block
        before += len(block.lengths)


def cut_after(block: Block, token: int) -> Any:
    """(documents,) lengths where each document of a block ends after every `token`."""
    ends = np.union1d(np.cumsum(block.lengths), np.flatnonzero(block.tokens == token) + 1)
    ends = ends[ends > 0]
    return np.diff(ends, prepend=0).astype(np.int64)


def _held_out(path: str, offsets: Any, fraction: float) -> Any:
    """(documents,) whether a document goes to validation, by hash of its path and offset."""
    if not fraction:
        return np.zeros(len(offsets), bool)
    prefix, below = path.encode() + b"\0", int(fraction * 2.0**64)
    digest = xxhash.xxh3_64_intdigest
    hashes = [digest(prefix + int(one).to_bytes(8, "little")) for one in offsets]
    return np.array([one < below for one in hashes])


class _Ends:
    """Which special token begins and which ends every document, if one does."""

    def __init__(self, tokenizer_json: bytes) -> None:
        added = json.loads(tokenizer_json).get("added_tokens") or []
        self._special = {int(one["id"]) for one in added if one.get("special")}
        self._first: set[int] | None = None
        self._last: set[int] | None = None

    def see(self, tokens: Any, lengths: Any) -> None:
        """Take documents; those without tokens say nothing."""
        ends = np.cumsum(lengths)[lengths > 0]
        if not len(ends):
            return
        starts = ends - lengths[lengths > 0]
        first, last = (
            set(np.unique(tokens[starts]).tolist()),
            set(np.unique(tokens[ends - 1]).tolist()),
        )
        self._first = first if self._first is None else self._first | first
        self._last = last if self._last is None else self._last | last

    def found(self) -> tuple[int | None, int | None]:
        """(bos_id, eos_id)"""
        pair = [next(iter(one)) if one and len(one) == 1 else None
                for one in (self._first, self._last)]  # fmt: skip
        bos, eos = (one if one in self._special else None for one in pair)
        return bos, eos


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
