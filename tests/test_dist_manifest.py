"""The manifest: one identity for equal data, and nothing accepted that is not understood."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist.errors import ConfigError, DataRefused
from dist.manifest import Manifest, Shard, parse_reference

GOLDEN = Path(__file__).parent / "golden" / "manifest_v1.json"


def example() -> Manifest:
    digests = [f"{i:032x}" for i in (11, 12, 13)]
    shards = tuple(
        Shard(name=f"{d}.arrow", rows=10 + i, bytes=1000 + i, xxh3_128=d, split=split)
        for i, (d, split) in enumerate(zip(digests, ("train", "train", "validation"), strict=True))
    )
    return Manifest(
        kind="packed_tokens",
        schema={
            "seq_len": 256,
            "token_dtype": "uint16",
            "vocab_size": 4096,
            "bos_id": None,
            "eos_id": 1,
            "rows_per_batch": 4096,
        },
        tokenizer_digest="ab" * 32,
        shards=shards,
        totals={
            "train": {"rows": 21, "documents": 9, "tokens": 5000, "targets": 4990},
            "validation": {"rows": 12, "documents": 2, "tokens": 3000, "targets": 2998},
        },
    )


def changed(**changes: object) -> bytes:
    record = json.loads(example().to_json())
    for key, value in changes.items():
        if value is None:
            del record[key]
        else:
            record[key] = value
    return json.dumps(record).encode()


def test_golden_manifest_is_kept_byte_for_byte() -> None:
    """A change of the canonical form would rename every dataset in the world."""
    data = GOLDEN.read_bytes()
    assert example().to_json() == data
    assert Manifest.from_json(data) == example()
    assert example().data_digest == hashlib.sha256(data).hexdigest()


def test_identity_ignores_the_order_of_dicts_but_not_of_shards() -> None:
    """A digest that follows dict order differs between machines; one blind to order is wrong."""
    manifest = example()
    turned = dataclasses.replace(manifest, schema=dict(reversed(manifest.schema.items())))
    assert turned.data_digest == manifest.data_digest
    first, second, last = manifest.shards
    swapped = dataclasses.replace(manifest, shards=(second, first, last))
    assert swapped.data_digest != manifest.data_digest


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{", "not JSON"),
        (b"[]", "not an object"),
        (b"{}", "not a Leyden manifest"),
        (changed(format_version=2), "format version 2"),
        (changed(colour="red"), r"unknown keys \['colour'\]"),
        (changed(totals=None), r"lacks the keys \['totals'\]"),
        (changed(kind="images"), "kind 'images'"),
        (changed(kind=["examples"]), "wrong type"),
        (changed(tokenizer_digest="../x"), "not a SHA-256"),
        (changed(shards=[]), "no shard"),
        (changed(shards=5), "not a list"),
        (changed(shards=[7]), "not an object"),
        (changed(schema={}), "schema holds"),
        (changed(totals={}), "totals name"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(data: bytes, said: str) -> None:
    """A newer or edited manifest read by guess would train on something else."""
    with pytest.raises(DataRefused, match=said):
        Manifest.from_json(data)


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b.arrow", "x.arrow", f"{5:032x}.arrow"])
def test_names_cannot_leave_the_root_or_lie(name: str) -> None:
    """A manifest could otherwise point the reader at any file."""
    shards = json.loads(example().to_json())["shards"]
    shards[0]["name"] = name
    with pytest.raises(DataRefused, match="name"):
        Manifest.from_json(changed(shards=shards))


def test_rows_that_do_not_add_up_are_refused() -> None:
    """A manifest cut short by hand would silently drop data."""
    shards = json.loads(example().to_json())["shards"]
    with pytest.raises(DataRefused, match="totals say 21 rows in 'train', its shards 10"):
        Manifest.from_json(changed(shards=[shards[0], shards[2]]))


def test_a_vocabulary_too_large_for_its_tokens_is_refused() -> None:
    """uint16 tokens of a 128k vocabulary wrap: 45 % of ids were wrong in one published case."""
    schema = json.loads(example().to_json())["schema"]
    with pytest.raises(DataRefused, match="does not fit uint16"):
        Manifest.from_json(changed(schema={**schema, "vocab_size": 128_256}))


def examples() -> Manifest:
    schema = {key: value for key, value in example().schema.items() if key != "seq_len"}
    schema |= {"token_dtype": "uint32", "max_length": 2048, "template_digest": "cd" * 32}
    return dataclasses.replace(example(), kind="examples", schema=schema)


def test_golden_manifest_of_examples_is_kept_byte_for_byte() -> None:
    """As for packed tokens: a moved byte renames every dataset of chats."""
    data = GOLDEN.with_name("manifest_examples_v1.json").read_bytes()
    assert examples().to_json() == data and Manifest.from_json(data) == examples()


def test_lengths_are_named_or_absent() -> None:
    """A null that renames every version written before there were lengths; a name that leaves the
    folder; lengths of packed rows, which have none."""
    plain = examples()
    assert b"lengths" not in plain.to_json() and plain.lengths_digest is None
    named = dataclasses.replace(plain, lengths_digest="ef" * 32)
    assert Manifest.from_json(named.to_json()) == named
    assert named.data_digest != plain.data_digest
    assert json.loads(named.to_json())["lengths_digest"] == "ef" * 32
    with pytest.raises(DataRefused, match=r"lengths digest '\.\./x' is not a SHA-256"):
        dataclasses.replace(plain, lengths_digest="../x")
    with pytest.raises(DataRefused, match="named by a dataset of kind packed_tokens"):
        Manifest.from_json(changed(lengths_digest="ef" * 32))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token_dtype": "uint16"}, "examples hold uint32"),
        ({"max_length": 1}, "max_length 1 is below"),
        ({"seq_len": 256}, "schema holds"),
    ],
)
def test_a_schema_of_another_kind_is_refused(changes: dict[str, object], said: str) -> None:
    """Packed tokens called examples would be read as masks that are not there."""
    record = json.loads(examples().to_json())
    record["schema"] |= changes
    with pytest.raises(DataRefused, match=said):
        Manifest.from_json(json.dumps(record).encode())


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("data/x", ("data/x", None)),
        ("data/x/", ("data/x", None)),
        ("s3://bucket/x@0123abCD", ("s3://bucket/x", "0123abcd")),
        ("s3://user@host/x", ("s3://user@host/x", None)),
        ("data/x@abc", ("data/x@abc", None)),
    ],
)
def test_references(reference: str, parts: tuple[str, str | None]) -> None:
    """An @ in a folder's name must not be taken for a version."""
    assert parse_reference(reference) == parts


def test_empty_reference_is_a_usage_error() -> None:
    """An unset shell variable must not open the current folder."""
    with pytest.raises(ConfigError, match="empty"):
        parse_reference("")


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    """Garbage must end in a message, never in a traceback."""
    with pytest.raises(DataRefused):
        Manifest.from_json(data)
