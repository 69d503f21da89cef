"""Tokens of MosaicML streaming's MDS shards, read in plain numpy.

Source: streaming/base/format/mds/ of mosaicml-streaming 0.13. index.json lists the shards; a shard
is u32 samples, u32 offsets of the samples (samples + 1), a JSON header, the samples. A sample is
the u32 size of each column without a fixed one, then the columns' bytes in order.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from dist.errors import ConfigError, DataRefused, SetupError
from dist.token_source import (
    TOKEN_COLUMNS,
    Block,
    SourceFile,
    split_of,
    text_advice,
    visible_files,
)

# Encodings.NDArray: code of a value's type, and of the type that its shape is written in.
_VALUE_DTYPES = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
_SHAPE_DTYPES = ("u1", "<u2", "<u4", "<u8")
_HASHES: dict[str, Any] = {
    "xxh3_64": xxhash.xxh3_64, "xxh64": xxhash.xxh64, "xxh3_128": xxhash.xxh3_128,
    "xxh128": xxhash.xxh3_128, "sha1": hashlib.sha1, "sha256": hashlib.sha256,
    "md5": hashlib.md5,
}  # fmt: skip


def find_mds(source: Path, column: str, bytes_dtype: str) -> list[SourceFile]:
    """Shards of every index.json at or under a folder, in their order."""
    indices = [path for path in visible_files(source) if path.name == "index.json"]
    indices.sort(key=lambda path: (path.parent != source, path))
    if not indices:
        raise ConfigError(f"no index.json in {source}; pass the folder that MDSWriter wrote")
    files = []
    for index in indices:
        for shard in _entries(index):
            stored = index.parent / (shard.get("zip_data") or shard["raw_data"])["basename"]
            if stored.parent != index.parent:
                raise DataRefused(f"{index} names {stored}, which lies outside its folder")
            if shard["samples"]:
                files.append(
                    SourceFile(
                        path=stored,
                        split=split_of(index.parent.relative_to(source)) or "train",
                        read=lambda stored=stored, shard=shard: read_shard(  # type: ignore[misc]
                            stored, shard, column, bytes_dtype
                        ),
                    )
                )
    return files


def read_shard(path: Path, shard: dict[str, Any], column: str, bytes_dtype: str) -> Iterator[Block]:
    """The tokens of each sample of a shard as a document."""
    data = _raw_bytes(path, shard)
    name = token_column(path, shard, column)
    place = shard["column_names"].index(name)
    encoding, sizes = shard["column_encodings"][place], shard["column_sizes"]
    if encoding == "bytes" and not bytes_dtype:
        raise ConfigError(
            f"{path}: the column of tokens is plain bytes; say their type with --bytes_dtype "
            "(llm-foundry wrote int64, then uint32)"
        )
    count = int(np.frombuffer(data, "<u4", 1)[0]) if len(data) >= 4 else -1
    if count != shard["samples"] or len(data) < 4 * (count + 2):
        raise DataRefused(f"{path} holds {count} samples, its index.json says {shard['samples']}")
    offsets = np.frombuffer(data, "<u4", count + 1, 4).tolist()
    documents = []
    for number in range(count):
        sample = data[offsets[number] : offsets[number + 1]]
        try:
            documents.append(_decode(encoding, _column(sample, sizes, place), bytes_dtype))
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise DataRefused(f"{path}: sample {number}, column {name!r}: {error}") from None
    yield Block(
        tokens=np.concatenate(documents),
        lengths=np.array([len(one) for one in documents], np.int64),
    )


def token_column(path: Path, shard: dict[str, Any], wanted: str) -> str:
    """Name of the column of tokens: the one asked for, or input_ids or tokens."""
    names, encodings = shard["column_names"], shard["column_encodings"]
    found = [name for name in ([wanted] if wanted else TOKEN_COLUMNS) if name in names]
    said = ", ".join(f"{n} ({e})" for n, e in zip(names, encodings, strict=True))
    if not found:
        if not wanted and "str" in encodings:
            raise DataRefused(text_advice(f"{path} holds text: its columns are {said}"))
        raise ConfigError(
            f"{path} has no column {wanted or ' or '.join(TOKEN_COLUMNS)}: it has {said}; name "
            "the column of tokens with --column"
        )
    encoding = encodings[names.index(found[0])]
    if encoding == "str":
        raise DataRefused(text_advice(f"{path} holds text in its column {found[0]!r}"))
    if encoding.split(":")[0] not in ("ndarray", "bytes"):
        raise DataRefused(f"{path}: the column {found[0]!r} is {encoding}, not ndarray or bytes")
    return str(found[0])


def _entries(index: Path) -> list[dict[str, Any]]:
    """The shards that an index.json lists; DataRefused for what MDSWriter does not write."""
    try:
        shards = json.loads(index.read_bytes())["shards"]
        for shard in shards:
            _check_kind(index, shard)
            if not _is_whole(shard):
                raise ValueError(f"a shard is listed as {str(shard)[:80]}...")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DataRefused):
            raise
        raise DataRefused(
            f"{index} is not an index of MDS shards ({error}); copy it anew"
        ) from None
    return list(shards)


def _is_whole(shard: dict[str, Any]) -> bool:
    """Whether an entry has what is read of it, in its types."""
    names, encodings, sizes = (
        shard[key] for key in ("column_names", "column_encodings", "column_sizes")
    )
    files = [shard["raw_data"], *([shard["zip_data"]] if shard.get("zip_data") else [])]
    return (
        type(shard["samples"]) is int and shard["samples"] >= 0
        and len(names) == len(encodings) == len(sizes)
        and all(isinstance(one, str) for one in [*names, *encodings])
        and all(one is None or (type(one) is int and one >= 0) for one in sizes)
        and all(isinstance(one["basename"], str) and type(one["bytes"]) is int for one in files)
        and all(isinstance(one.get("hashes") or {}, dict) for one in files)
        and isinstance(shard["compression"] if shard.get("zip_data") else "", str)
    )  # fmt: skip


def _check_kind(index: Path, shard: dict[str, Any]) -> None:
    if shard.get("format") != "mds" or shard.get("version") != 2:
        raise DataRefused(
            f"{index} lists a shard of format {shard.get('format')!r}, version "
            f"{shard.get('version')!r}; only mds, version 2, is known"
        )


def _raw_bytes(path: Path, shard: dict[str, Any]) -> bytes:
    """A shard's uncompressed bytes, held against the sizes and hashes in the index."""
    if not path.is_file():
        raise DataRefused(f"{path} is missing; copy the folder anew")
    data = path.read_bytes()
    zipped = shard.get("zip_data")
    for facts, what in ((zipped, "compressed "), (shard["raw_data"], "")):
        if not facts:
            continue
        if what == "" and zipped:
            data = _decompress(path, data, shard["compression"], facts["bytes"])
        if len(data) != facts["bytes"]:
            raise DataRefused(
                f"{path} has {len(data)} {what}bytes, its index.json says {facts['bytes']}: it "
                "was cut off or is another file; copy it anew"
            )
        for name, digest in (facts.get("hashes") or {}).items():
            if name in _HASHES and _HASHES[name](data).hexdigest() != digest:
                raise DataRefused(f"{path} is damaged: its {name} is not {digest}; copy it anew")
    return data


def _decompress(path: Path, data: bytes, how: str, raw_bytes: int) -> bytes:
    kind = how.split(":")[0]
    try:
        if kind == "zstd":
            import zstandard

            return zstandard.ZstdDecompressor().decompress(data, max_output_size=raw_bytes)
        if kind in ("gz", "bz2"):
            return (gzip if kind == "gz" else bz2).decompress(data)
    except Exception as error:  # each library raises its own class
        raise DataRefused(f"{path} does not decompress ({error}); copy it anew") from None
    raise SetupError(
        f"{path} is compressed by {how}; only zstd, gz and bz2 are read here: write it anew with "
        "one of them"
    )


def _column(sample: bytes, sizes: list[int | None], place: int) -> bytes:
    """Bytes of one column of a sample."""
    free = sum(size is None for size in sizes)
    given = iter(np.frombuffer(sample, "<u4", free).tolist())
    start = 4 * free
    for number, fixed in enumerate(sizes):
        size = fixed if fixed is not None else next(given)
        if number == place:
            if start + size > len(sample):
                raise ValueError(f"{size} bytes are claimed, {len(sample) - start} are there")
            return sample[start : start + size]
        start += size
    raise IndexError(place)


def _decode(encoding: str, data: bytes, bytes_dtype: str) -> NDArray[np.integer]:
    """A one-dimensional integer array from an `ndarray[:dtype[:shape]]` or `bytes` column."""
    kind, _, rest = encoding.partition(":")
    if kind == "bytes":
        return np.frombuffer(data, np.dtype(bytes_dtype).newbyteorder("<"))
    name, _, shape = rest.partition(":")
    at, dims = 0, shape.count(",") + 1
    if not name:
        at, dtype = 1, np.dtype(_VALUE_DTYPES[data[0]])
    else:
        dtype = np.dtype(name).newbyteorder("<")
    if not shape:
        dims, width = data[at] >> 2, np.dtype(_SHAPE_DTYPES[data[at] % 4]).itemsize
        at += 1 + dims * width
    if dims != 1 or dtype.kind not in "iu":
        raise ValueError(f"{encoding} of {dims} dimensions and {dtype.name} is no list of tokens")
    return np.frombuffer(data, dtype, offset=at)
