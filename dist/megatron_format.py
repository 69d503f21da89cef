"""Megatron's indexed datasets, .bin and .idx, in plain numpy.

Source: megatron/core/datasets/indexed_dataset.py of megatron-core 0.16. The .bin file is all
tokens; the .idx file is, little-endian: magic, u64 version, u8 dtype code, u64 sequences, u64
length of the document index, int32 length of each sequence, int64 byte offset of each in the .bin
file, int64 document index (the sequence that each document starts with, and at the end the number
of sequences).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dist.documents import Documents
from dist.errors import ConfigError, DataRefused
from dist.token_source import BLOCK_TOKENS, Block, SourceFile, split_of

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_HEADER = struct.Struct("<9sQBQQ")


@dataclass(frozen=True, kw_only=True)
class Index:
    """A parsed .idx file."""

    dtype: np.dtype
    doc_lens: NDArray[np.int64]
    """(documents,) tokens of each document; they stand one after the other in the .bin file."""


def find_megatron(source: Path) -> list[SourceFile]:
    """Pairs of .bin and .idx: a prefix, one of the two files, or every pair of a folder."""
    if source.is_dir():
        indices = sorted(source.glob("*.idx"))
        if not indices:
            raise ConfigError(f"no .idx file in {source}; pass the folder or prefix of a pair")
    else:
        stem = source.with_suffix("") if source.suffix in (".bin", ".idx") else source
        indices = [stem.with_name(f"{stem.name}.idx")]
    files = []
    for idx in indices:
        data = idx.with_suffix(".bin")
        for path in (idx, data):
            if not path.is_file():
                raise ConfigError(f"{path} is missing; a Megatron dataset is a .bin and an .idx")
        files.append(
            SourceFile(
                path=data,
                split=split_of(data.name) or "train",
                beside=(idx,),
                read=lambda data=data, idx=idx: read_blocks(data, idx),  # type: ignore[misc]
            )  # fmt: skip
        )
    return files


def read_index(idx: Path, data_bytes: int) -> Index:
    """Parse an .idx file against the size of its .bin file; DataRefused says what is wrong."""
    raw = idx.read_bytes()
    if raw[: len(MAGIC)] != MAGIC:
        raise DataRefused(
            f"{idx} does not begin with {MAGIC!r} but with {raw[:9]!r}: no index of a Megatron "
            "MMapIndexedDataset"
        )
    if len(raw) < _HEADER.size:
        raise DataRefused(f"{idx} has {len(raw)} bytes, less than its header; copy it anew")
    _, version, code, sequences, entries = _HEADER.unpack_from(raw)
    if version != VERSION:
        raise DataRefused(f"{idx} has version {version}; only version {VERSION} is known")
    dtype = np.dtype(DTYPES.get(code, "f4"))
    if dtype.kind == "f":
        raise DataRefused(f"{idx} has the dtype code {code}, which is no integer type of tokens")
    want = _HEADER.size + 12 * sequences + 8 * entries
    if len(raw) != want:
        modes = " (it seems to hold modes of a multimodal dataset)" * (len(raw) == want + sequences)
        raise DataRefused(
            f"{idx} has {len(raw)} bytes where {sequences} sequences and {entries} document "
            f"entries need {want}{modes}; copy it anew"
        )
    at = _HEADER.size
    lengths = np.frombuffer(raw, "<i4", sequences, at).astype(np.int64)
    pointers = np.frombuffer(raw, "<i8", sequences, at + 4 * sequences)
    starts = np.frombuffer(raw, "<i8", entries, at + 12 * sequences)
    ends = np.concatenate(([0], np.cumsum(lengths)))
    if (lengths < 0).any() or not np.array_equal(pointers, ends[:-1] * dtype.itemsize):
        raise DataRefused(f"{idx}: its sequences do not stand one after the other in the .bin file")
    if entries < 1 or starts[0] != 0 or starts[-1] != sequences or (np.diff(starts) < 0).any():
        raise DataRefused(f"{idx}: its document index does not rise from 0 to {sequences}")
    if data_bytes != int(ends[-1]) * dtype.itemsize:
        raise DataRefused(
            f"{idx.with_suffix('.bin')} has {data_bytes} bytes where its index needs "
            f"{int(ends[-1]) * dtype.itemsize} ({ends[-1]} tokens of {dtype.name}): it was cut "
            "off or is another file; copy it anew"
        )
    return Index(dtype=dtype, doc_lens=np.diff(ends[starts]))


def read_blocks(data: Path, idx: Path) -> Iterator[Block]:
    """Documents of a pair, about BLOCK_TOKENS tokens at a time."""
    index = read_index(idx, data.stat().st_size)
    ends = np.cumsum(index.doc_lens)
    if not len(ends) or ends[-1] == 0:
        return
    tokens = np.memmap(data, index.dtype, "r")
    first = 0
    while first < len(ends):
        start = int(ends[first] - index.doc_lens[first])
        last = max(first + 1, int(np.searchsorted(ends, start + BLOCK_TOKENS, side="right")))
        yield Block(tokens=tokens[start : ends[last - 1]], lengths=index.doc_lens[first:last])
        first = last


class MegatronWriter:
    """Writes PREFIX.bin and PREFIX.idx, one sequence a document, as IndexedDatasetBuilder does."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        # Megatron's own rule (DType.optimal_dtype): uint16 where the ids fit, else int32.
        code = 8 if vocab_size < 65500 else 4
        if vocab_size > 1 << 31:
            raise ConfigError(f"a vocabulary of {vocab_size} does not fit Megatron's int32 tokens")
        self._prefix, self._code, self._dtype = prefix, code, np.dtype(DTYPES[code])
        self._data: BinaryIO = open(f"{prefix}.bin", "wb")  # noqa: SIM115 -- closed by close()
        self._lengths: list[NDArray[np.int32]] = []

    def add(self, documents: Documents) -> None:
        """Append documents."""
        too_long = documents.lengths.max(initial=0)
        if too_long >= 1 << 31:
            raise DataRefused(f"a document of {too_long} tokens does not fit Megatron's int32")
        self._data.write(documents.tokens.astype(self._dtype, copy=False).tobytes())
        self._lengths.append(documents.lengths.astype("<i4"))

    def close(self) -> None:
        """Write the index."""
        self._data.close()
        lengths = np.concatenate([np.empty(0, "<i4"), *self._lengths])
        pointers = np.concatenate(([0], np.cumsum(lengths[:-1], dtype="<i8")))[: len(lengths)]
        with open(f"{self._prefix}.idx", "wb") as file:
            count = len(lengths)
            file.write(_HEADER.pack(MAGIC, VERSION, self._code, count, count + 1))
            file.write(lengths.astype("<i4").tobytes())
            file.write((pointers * self._dtype.itemsize).astype("<i8").tobytes())
            file.write(np.arange(count + 1, dtype="<i8").tobytes())

    def abort(self) -> None:
        """Close what is open; the files are of no use."""
        self._data.close()
