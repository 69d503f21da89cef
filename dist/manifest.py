"""The contract between the jobs that write a dataset and the trainers that read it.

The manifest file is the canonical JSON of what the data *is*; the SHA-256 of its bytes is the
dataset's identity, `data_digest` (check it with `sha256sum`). Nothing in it depends on a machine,
a folder, a clock or a commit: those are provenance, kept beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from dist.errors import ConfigError, DataRefused

FORMAT_VERSION = 1
_TOKENS = ("token_dtype", "vocab_size", "bos_id", "eos_id", "rows_per_batch")
# kind -> keys of its schema.
KINDS = {
    "packed_tokens": ("seq_len", *_TOKENS),
    "examples": ("max_length", "template_digest", *_TOKENS),
}
TOTALS = ("rows", "documents", "tokens", "targets")
_SHARD_NAME = re.compile(r"[0-9a-f]{32}\.arrow")
_SPLIT_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_REFERENCE = re.compile(r"(?P<url>.+)@(?P<prefix>[0-9a-fA-F]{6,64})")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One immutable file under shards/, named by its content."""

    name: str
    """`<xxh3-128 of the file>.arrow`."""
    rows: int
    bytes: int
    xxh3_128: str
    split: str

    def __post_init__(self) -> None:
        if not _SHARD_NAME.fullmatch(self.name) or self.name != f"{self.xxh3_128}.arrow":
            raise DataRefused(
                f"shard name {self.name!r} is not <xxh3-128>.arrow with the digest "
                f"{self.xxh3_128!r}; a name must not leave the folder shards/"
            )
        if not _SPLIT_NAME.fullmatch(self.split):
            raise DataRefused(f"split name {self.split!r} of shard {self.name} is not a plain word")
        if self.rows < 1 or self.bytes < 1:
            raise DataRefused(f"shard {self.name} claims {self.rows} rows in {self.bytes} bytes")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A dataset version: its kind, schema, tokenizer and shards in order."""

    kind: str
    schema: dict[str, Any]
    """token_dtype, vocab_size, bos_id, eos_id, rows_per_batch; and of packed_tokens seq_len, of
    examples max_length (tokens of the longest that there may be) and template_digest (SHA-256 of
    the chat template, kept at templates/<digest>.jinja; null without one)."""
    tokenizer_digest: str | None
    """SHA-256 of tokenizer.json, kept at tokenizers/<digest>.json of the dataset."""
    shards: tuple[Shard, ...]
    totals: dict[str, dict[str, int]]
    """Per split: rows, documents, tokens, targets (of examples: trained tokens)."""
    lengths_digest: str | None = None
    """Of examples: SHA-256 of lengths/<digest>.arrow (dist/example_lengths.py). None in versions
    written before there was one; the manifest file then lacks the key."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataRefused(f"kind {self.kind!r} is unknown; this version reads {list(KINDS)}")
        if not self.shards:
            raise DataRefused("the manifest lists no shard; a dataset has at least one row")
        for what in ("tokenizer", "lengths"):
            digest = getattr(self, f"{what}_digest")
            if digest is not None and not re.fullmatch(r"[0-9a-f]{64}", digest):
                raise DataRefused(f"{what} digest {digest!r} is not a SHA-256")
        if self.lengths_digest is not None and self.kind != "examples":
            raise DataRefused(f"lengths of examples are named by a dataset of kind {self.kind}")
        self._check_schema()
        rows: dict[str, int] = {}
        for shard in self.shards:
            rows[shard.split] = rows.get(shard.split, 0) + shard.rows
        if set(rows) != set(self.totals):
            raise DataRefused(f"totals name splits {sorted(self.totals)}, shards {sorted(rows)}")
        for split, totals in self.totals.items():
            if set(totals) != set(TOTALS):
                raise DataRefused(f"totals of {split!r} hold {sorted(totals)}, not {list(TOTALS)}")
            if totals["rows"] != rows[split]:
                raise DataRefused(
                    f"totals say {totals['rows']} rows in {split!r}, its shards {rows[split]}"
                )

    def _check_schema(self) -> None:
        expected = set(KINDS[self.kind])
        if set(self.schema) != expected:
            raise DataRefused(f"schema holds {sorted(self.schema)}, not {sorted(expected)}")
        limit = {"uint16": 1 << 16, "uint32": 1 << 32}.get(self.schema["token_dtype"])
        if limit is None:
            raise DataRefused(f"token_dtype {self.schema['token_dtype']!r} is not uint16 or uint32")
        if self.kind == "examples":
            if self.schema["token_dtype"] != "uint32":
                raise DataRefused(f"examples hold uint32 tokens, not {self.schema['token_dtype']}")
            if self.schema["max_length"] < 2:
                raise DataRefused(f"max_length {self.schema['max_length']} is below 2 tokens")
        if not 0 < self.schema["vocab_size"] <= limit:
            raise DataRefused(
                f"vocabulary of {self.schema['vocab_size']} does not fit "
                f"{self.schema['token_dtype']} tokens"
            )

    @property
    def data_digest(self) -> str:
        """SHA-256 (64 hex digits) of the manifest file; equal data gives an equal digest."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def splits(self) -> list[str]:
        """Split names in the order of their shards."""
        return list(dict.fromkeys(shard.split for shard in self.shards))

    def shards_of(self, split: str) -> tuple[Shard, ...]:
        found = tuple(shard for shard in self.shards if shard.split == split)
        if not found:
            raise ConfigError(f"no split {split!r} in this dataset; it has {self.splits()}")
        return found

    def to_json(self) -> bytes:
        """The manifest file, byte for byte: sorted keys, one space of indent, ASCII, newline."""
        record = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        if self.lengths_digest is None:
            del record["lengths_digest"]  # or versions without it would get another name
        return (json.dumps(record, sort_keys=True, indent=1) + "\n").encode("ascii")

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Parse and check a manifest file; DataRefused names what is wrong with it."""
        try:
            record = json.loads(data)
        except ValueError as error:
            raise DataRefused(f"the manifest is not JSON ({error}); copy it anew") from None
        if not isinstance(record, dict):
            raise DataRefused(f"the manifest is a {type(record).__name__}, not an object")
        version = record.pop("format_version", None)
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise DataRefused(
                f"the manifest has format version {version}; this Leyden reads up to "
                f"{FORMAT_VERSION}: update Leyden, or write the dataset with this one"
            )
        if version != FORMAT_VERSION:
            raise DataRefused(f"format version {version!r} is not a Leyden manifest's")
        _check_keys("manifest", record, cls)
        if not isinstance(record["shards"], list):
            raise DataRefused(f"the manifest's shards are {record['shards']!r:.80}, not a list")
        for number, shard in enumerate(record["shards"]):
            _check_keys(f"shard {number}", shard, Shard)
        try:
            shards = tuple(Shard(**shard) for shard in record.pop("shards"))
            return cls(shards=shards, **record)
        except (TypeError, AttributeError, KeyError) as error:
            raise DataRefused(f"the manifest holds a value of a wrong type: {error}") from None


def _check_keys(what: str, record: Any, cls: type) -> None:
    fields = dataclasses.fields(cls)
    known = {field.name for field in fields}
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    if not isinstance(record, dict):
        raise DataRefused(f"{what} is a {type(record).__name__}, not an object")
    unknown, missing = sorted(set(record) - known), sorted(needed - set(record))
    if unknown:
        raise DataRefused(
            f"{what} holds unknown keys {unknown}; a newer Leyden may have written it"
        )
    if missing:
        raise DataRefused(f"{what} lacks the keys {missing}")


def digest_of(record: dict[str, Any]) -> str:
    """SHA-256 (hex) of a JSON record with sorted keys; identities of jobs and configs."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def parse_reference(reference: str) -> tuple[str, str | None]:
    """Split a dataset reference `URL` or `URL@hexprefix` (6 to 64 digits) into its parts."""
    if not reference or reference != reference.strip():
        raise ConfigError(f"dataset reference {reference!r} is empty or padded with spaces")
    match = _REFERENCE.fullmatch(reference)
    if match:
        return match["url"].rstrip("/") or "/", match["prefix"].lower()
    return reference.rstrip("/") or "/", None
