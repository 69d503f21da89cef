"""Token datasets of others into a dataset of ours: checked, written, committed as a job does.

Documents keep their order; training permutes rows anyway. Documents become packed rows, and those
with labels examples. doc_input is the source file, doc_offset the number of the token in it with
which the document starts, of an example the number of its record.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dist.commit import (
    commit_dataset,
    find_job,
    make_latest,
    publish_lengths,
    publish_tokenizer,
    target_lease,
)
from dist.errors import ConfigError, DataRefused
from dist.example_file import example_rows_per_batch
from dist.example_lengths import lengths_file
from dist.example_shards import ExampleSplitWriter
from dist.import_source import (
    check_export,
    describe_source,
    digests_of_export,
    ends_of_export,
)
from dist.manifest import Manifest, digest_of
from dist.mds_format import find_mds
from dist.megatron_format import find_megatron
from dist.progress import Progress
from dist.shard_file import rows_per_batch
from dist.storage import Storage
from dist.table_format import find_tables
from dist.tar_format import find_tars
from dist.token_shards import SplitWriter
from dist.token_source import SourceFile, checked_blocks, cut_after
from dist.tokenizer import TextTokenizer, token_dtype, tokenizer_digest
from dist.versions import code_version, library_versions

FORMATS = ("megatron", "mds", "hf", "webdataset")
KINDS = ("packed_tokens", "examples")
TRANSFORM_VERSION = 2
"""Raise when the same source and options would give other bytes."""


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """What to import, and what decides the rows."""

    format: str
    source: Path
    output: str
    tokenizer: str
    """tokenizer.json or its folder."""
    kind: str = ""
    """packed_tokens or examples; by default examples where the source has labels."""
    seq_len: int = 1024
    """Of packed rows."""
    max_length: int = 0
    """Tokens of the longest example that there may be; 0: of the longest that there is."""
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
        if self.kind and self.kind not in KINDS:
            raise ConfigError(f"--kind {self.kind!r} is not one of {', '.join(KINDS)}")
        if self.kind == "examples" and self.eos:
            raise ConfigError("--eos cuts documents apart, and examples are whole; leave it out")
        if self.max_length < 0 or self.max_length == 1:
            raise ConfigError(f"max_length is {self.max_length}; an example needs 2 tokens")
        if self.seq_len < 1 or not 0 < self.shard_size_mib < math.inf:
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
    if storage.is_local:
        _check_output(Path(plan.output.removeprefix("file://")), plan)
    tokenizer_path = _tokenizer_path(plan.tokenizer)
    files = find_files(plan)
    plan = replace(plan, kind=_kind(plan, files))
    inputs = describe_source(plan.source, files, progress)
    tokenizer_json = tokenizer_path.read_bytes()
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
            "offsets": "record of the input" if plan.kind == "examples"
            else "token of the input at which the document starts",
            "code": code_version(),
            "libraries": library_versions(("pyarrow", "numpy", "tokenizers", "xxhash")),
            "started": _utc(started), "ended": _utc(time.time()), "counters": counters,
            "quarantine": None, "parent": None,
        }  # fmt: skip
        return commit_dataset(storage, manifest, provenance, job, lease), False


def _check_output(output: Path, plan: ImportPlan) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"the output {output} is no folder; name another")
    source = plan.source
    if (
        plan.format == "hf"
        and source.is_dir()
        and output.resolve().is_relative_to(source.resolve())
    ):
        raise ConfigError(
            f"the output {output} lies in the source {source}, and the next import would take its "
            "shards for source; name a folder outside of it"
        )


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


def _kind(plan: ImportPlan, files: list[SourceFile]) -> str:
    """What the documents become; ConfigError where that cannot be."""
    without = [file.path for file in files if not file.has_labels]
    if plan.kind == "examples" and without:
        raise ConfigError(
            f"{without[0]} has no labels, and examples are documents with labels (--from hf); "
            "leave --kind out to import packed rows"
        )
    if not plan.kind and without and len(without) < len(files):
        raise ConfigError(
            f"{len(files) - len(without)} files of {plan.source} have labels, {len(without)} have "
            f"none, as {without[0]}; import them one by one, or say --kind packed_tokens"
        )
    kind = plan.kind or ("packed_tokens" if without or not files else "examples")
    if kind == "packed_tokens" and plan.max_length:
        raise ConfigError(
            "--max_length bounds examples, and these documents become packed rows, which cut them; "
            "leave it out"
        )
    ignored = [(file.path, name) for file in files for name in file.not_read]
    if not plan.kind and ignored:
        path, name = ignored[0]
        raise ConfigError(
            f"{path} has the column {name}, which tells what of a row is trained or where its "
            "documents end, and which import does not read: make it labels (-100 where a token is "
            "not trained), or say --kind packed_tokens to take each row as one document, all of it "
            "trained"
        )
    if kind == "examples" and plan.eos:
        raise ConfigError(
            f"{plan.source} has labels, so its documents become examples, which --eos cannot cut; "
            "leave it out, or say --kind packed_tokens"
        )
    return kind


def _tokenizer_path(given: str) -> Path:
    path = Path(given)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"no tokenizer at {given!r}; pass the tokenizer.json (or its folder) that made the "
            "tokens with --tokenizer"
        )
    check_export(path, digests_of_export(path.parent), path.parent)
    return path


def _done(storage: Storage, job: str) -> str | None:
    digest = find_job(storage, job)
    if digest is not None:
        make_latest(storage, digest)
    return digest


def _pack(
    plan: ImportPlan, files: list[SourceFile], inputs: list[dict[str, Any]],
    storage: Storage, tokenizer_json: bytes, progress: bool,
) -> tuple[Manifest, dict[str, int]]:  # fmt: skip
    """Publish the shards of all files; (manifest, counters), nothing committed."""
    tokenizer = TextTokenizer(tokenizer_json)
    cut = tokenizer.token_id(plan.eos) if plan.eos else None
    is_packed = plan.kind == "packed_tokens"
    dtype = token_dtype(tokenizer.vocab_size) if is_packed else "uint32"
    longest = 0 if is_packed else plan.max_length or _longest(files, inputs, progress)
    batch_rows = rows_per_batch(plan.seq_len, dtype)
    if not is_packed:
        batch_rows = example_rows_per_batch(longest)
    ends = _Ends(tokenizer_json)
    counters = dict.fromkeys(("documents_in", "documents_out", "filtered", "quarantined"), 0)
    with (
        tempfile.TemporaryDirectory(prefix="leyden-import-") as scratch,
        Progress("pack", sum(one["size"] for one in inputs) / 1e6, "MB", enabled=progress) as bar,
    ):
        writers: dict[str, Any] = {}
        max_bytes = plan.shard_size_mib * 2**20

        def writer(split: str) -> SplitWriter | ExampleSplitWriter:
            if split not in writers and is_packed:
                writers[split] = SplitWriter(
                    split, storage, Path(scratch), seq_len=plan.seq_len, dtype=dtype,
                    max_bytes=max_bytes,
                )  # fmt: skip
            elif split not in writers:
                writers[split] = ExampleSplitWriter(
                    split, storage, Path(scratch), max_length=longest, rows_per_batch=batch_rows,
                    max_bytes=max_bytes,
                )  # fmt: skip
            return writers[split]

        for number, file in enumerate(files):
            position = 0
            for block in checked_blocks(file, tokenizer.vocab_size, is_packed):
                if cut is not None:
                    block = replace(block, lengths=cut_after(block, cut))
                ends.see(block.tokens, block.lengths)
                sizes = block.lengths if is_packed else np.ones_like(block.lengths)
                offsets = position + np.cumsum(sizes) - sizes
                held_out = _held_out(inputs[number]["path"], offsets, plan.validation_fraction)
                taken = 0
                for split, mine in ((file.split, ~held_out), ("validation", held_out)):
                    if not mine.any():
                        continue
                    try:
                        taken += writer(split).add(block, offsets, number, mine)
                    except DataRefused as error:
                        raise DataRefused(f"{file.path}: {error}") from None
                counters["documents_in"] += len(block.lengths)
                counters["filtered"] += len(block.lengths) - taken
                position += int(sizes.sum())
            bar.update(inputs[number]["size"] / 1e6)
        splits = sorted(writers, key=("train", "validation", "test").index)
        shards = [shard for split in splits for shard in writers[split].close()]
    # An example that trains nothing makes none, so a split may have come out empty.
    totals = {split: writers[split].totals for split in splits if writers[split].totals["rows"]}
    if "train" not in totals:
        what = "tokens" if is_packed else "example with a trained token"
        if plan.validation_fraction and totals:
            raise DataRefused(
                f"all documents of {plan.source} were drawn to validation; make "
                f"--validation_fraction {plan.validation_fraction} less"
            )
        raise DataRefused(f"{plan.source} holds no {what} of the split train")
    counters["documents_out"] = sum(one["documents"] for one in totals.values())
    counters["tokens"] = sum(one["tokens"] for one in totals.values())
    if counters["documents_in"] != counters["documents_out"] + counters["filtered"]:
        raise DataRefused(f"the books do not balance: {counters}; nothing is committed")
    # Those of an export are known; of others they are what every document begins or ends with.
    known = ends_of_export(plan.source, tokenizer_digest(tokenizer_json))
    found = ends.found()
    bos = known[0] if known[0] is not None else found[0]
    eos = known[1] if known[1] is not None and cut is None else found[1]
    schema = {
        "token_dtype": dtype, "vocab_size": tokenizer.vocab_size, "bos_id": bos, "eos_id": eos,
        "rows_per_batch": batch_rows,
    }  # fmt: skip
    lengths_digest = None
    if is_packed:
        schema["seq_len"] = plan.seq_len
    else:
        schema |= {"max_length": longest, "template_digest": None}
        lengths = [one for split in splits for one in writers[split].lengths]
        lengths_digest = publish_lengths(storage, lengths_file(lengths, longest))
    manifest = Manifest(
        kind=plan.kind, schema=schema, tokenizer_digest=tokenizer_digest(tokenizer_json),
        shards=tuple(shards), totals=totals, lengths_digest=lengths_digest,
    )  # fmt: skip
    return manifest, counters


def _longest(files: list[SourceFile], inputs: list[dict[str, Any]], progress: bool) -> int:
    """Tokens of the longest document; at least 2."""
    total, longest = sum(one["size"] for one in inputs), 2
    with Progress("measure", total / 1e6, "MB", enabled=progress) as bar:
        for file, facts in zip(files, inputs, strict=True):
            for block in file.read():
                longest = max(longest, int(block.lengths.max(initial=0)))
            bar.update(facts["size"] / 1e6)
    return longest


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
