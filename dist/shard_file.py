"""Shard files: Arrow IPC *file* format, uncompressed, readable by mmap and by anything Arrow.

packed_tokens:  tokens      FixedSizeList<uint16|uint32, seq_len + 1>
                doc_lens    List<int32>   pieces of documents in the row; the rest is padding
                doc_input   List<int32>   which input file (index into the provenance's inputs)
                doc_offset  List<int64>   where in it the document starts
(The other kind, examples, is dist/example_file.py.)
Columns are non-null, record batches hold the same power of two of rows (the last may hold
fewer), the footer holds one xxh3-64 a record batch. Equal rows give equal bytes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from dist.arrow_view import numpy_view
from dist.batch_hashes import FOOTER_KEY
from dist.errors import DataRefused
from dist.local_files import HugePageWriter
from dist.packing import PackedRows
from dist.row_gather import BatchPlaces, GatheredRows, gather_rows

FORMAT = "leyden.packed_tokens.v1"
MAX_BATCH_BYTES = 4 << 20
_CHUNK_BYTES = 256 << 10


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """What a finished shard file is."""

    rows: int
    bytes: int
    xxh3_128: str


def rows_per_batch(seq_len: int, token_dtype: str) -> int:
    """The largest power of two of rows whose tokens fill at most 4 MiB."""
    row_bytes = (seq_len + 1) * np.dtype(token_dtype).itemsize
    return 1 << max(0, (MAX_BATCH_BYTES // row_bytes).bit_length() - 1)


def packed_schema(seq_len: int, token_dtype: str, metadata: dict[str, str]) -> pa.Schema:
    """Schema of packed_tokens; metadata keys are sorted, for equal bytes."""
    tokens = pa.list_(pa.field("item", pa.type_for_alias(token_dtype), nullable=False), seq_len + 1)
    fields = [pa.field("tokens", tokens, nullable=False)]
    for name, item in (("doc_lens", "int32"), ("doc_input", "int32"), ("doc_offset", "int64")):
        of = pa.list_(pa.field("item", pa.type_for_alias(item), nullable=False))
        fields.append(pa.field(name, of, nullable=False))
    facts = {**metadata, "format": FORMAT, "seq_len": str(seq_len), "token_dtype": token_dtype}
    return pa.schema(fields, metadata={key: facts[key] for key in sorted(facts)})


def packed_batch(rows: PackedRows, schema: pa.Schema) -> pa.RecordBatch:
    """The one function that turns rows into Arrow arrays."""
    columns = [_fixed_list(rows.tokens, schema.field("tokens").type)]
    splits = pa.array(rows.row_splits.astype(np.int32))
    for name in ("doc_lens", "doc_input", "doc_offset"):
        kind = schema.field(name).type
        values = pa.array(getattr(rows, name), kind.value_type)
        columns.append(pa.ListArray.from_arrays(splits, values, type=kind))
    return pa.record_batch(columns, schema=schema)


def _fixed_list(tokens: NDArray[np.unsignedinteger], kind: pa.DataType) -> pa.Array:
    values = pa.array(np.ascontiguousarray(tokens).reshape(-1), kind.value_type)
    return pa.FixedSizeListArray.from_arrays(values, type=kind)


class _HashingFile:
    """A binary file that computes the digest of what is written to it."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 -- closed by close()
        self._writer = HugePageWriter(self._file.fileno())
        self._hash = xxhash.xxh3_128()
        self.bytes = 0
        self.closed = False

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self._writer.write(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        self._writer.flush()

    def tell(self) -> int:
        return self.bytes

    def close(self) -> None:
        self.closed = True
        try:
            self.flush()
        finally:
            self._file.close()

    @property
    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def write_batches(path: Path, schema: pa.Schema, batches: list[pa.RecordBatch]) -> ShardFile:
    """Write record batches as a shard file of any kind, their hashes in its footer."""
    hashes = [xxhash.xxh3_64_hexdigest(batch.serialize()) for batch in batches]
    sink = _HashingFile(path)
    footer = {FOOTER_KEY: json.dumps(hashes).encode()}
    try:
        with pa.ipc.new_file(pa.PythonFile(sink, "w"), schema, metadata=footer) as out:
            for batch in batches:
                out.write_batch(batch)
    finally:
        sink.close()
    rows = sum(batch.num_rows for batch in batches)
    return ShardFile(rows=rows, bytes=sink.bytes, xxh3_128=sink.hexdigest)


class PackedShardWriter:
    """Writes one shard file; memory holds its tokens until close(), as the footer needs hashes."""

    def __init__(
        self,
        path: Path | str,
        *,
        seq_len: int,
        token_dtype: str,
        metadata: dict[str, str],
        rows_per_batch: int,
    ) -> None:
        if rows_per_batch < 1 or rows_per_batch & (rows_per_batch - 1):
            raise ValueError(f"rows_per_batch is {rows_per_batch}, not a power of two")
        self._path, self._rows_per_batch = Path(path), rows_per_batch
        self._schema = packed_schema(seq_len, token_dtype, metadata)
        self._pending: list[PackedRows] = []
        self._num_pending = 0
        self._batches: list[pa.RecordBatch] = []
        self.num_rows = 0

    def write(self, rows: PackedRows) -> None:
        """Append rows in order."""
        self._pending.append(rows)
        self._num_pending += len(rows)
        self.num_rows += len(rows)
        if self._num_pending >= self._rows_per_batch:
            self._cut(final=False)

    def close(self) -> ShardFile:
        """Write the file and return its size and digest."""
        self._cut(final=True)
        if not self._batches:
            raise ValueError(f"shard {self._path} would hold no row")
        made = write_batches(self._path, self._schema, self._batches)
        self._batches = []
        return made

    def _cut(self, *, final: bool) -> None:
        """Turn pending rows into batches of exactly rows_per_batch (the last may be shorter)."""
        if not self._pending:
            return
        rows = join_rows(self._pending)
        start = 0
        while start < len(rows):
            stop = min(start + self._rows_per_batch, len(rows))
            if stop - start < self._rows_per_batch and not final:
                break
            self._batches.append(packed_batch(slice_rows(rows, start, stop), self._schema))
            start = stop
        self._pending = [slice_rows(rows, start, len(rows))] if start < len(rows) else []
        self._num_pending = len(rows) - start


def join_rows(parts: list[PackedRows]) -> PackedRows:
    """Rows of several parts, in order."""
    if len(parts) == 1:
        return parts[0]
    pieces = np.cumsum([0] + [int(part.row_splits[-1]) for part in parts[:-1]])
    splits = [part.row_splits[:-1] + start for part, start in zip(parts, pieces, strict=True)]
    last = pieces[-1] + parts[-1].row_splits[-1]
    return PackedRows(
        tokens=np.concatenate([part.tokens for part in parts]),
        row_splits=np.concatenate([*splits, [last]]),
        doc_lens=np.concatenate([part.doc_lens for part in parts]),
        doc_input=np.concatenate([part.doc_input for part in parts]),
        doc_offset=np.concatenate([part.doc_offset for part in parts]),
    )


def slice_rows(rows: PackedRows, start: int, stop: int) -> PackedRows:
    """Rows start to stop, as views."""
    splits = rows.row_splits[start : stop + 1]
    first, last = int(splits[0]), int(splits[-1])
    return PackedRows(
        tokens=rows.tokens[start:stop],
        row_splits=splits - first,
        doc_lens=rows.doc_lens[first:last],
        doc_input=rows.doc_input[first:last],
        doc_offset=rows.doc_offset[first:last],
    )


def open_shard_file(path: Path, expected: str) -> tuple[Any, Any, dict[str, str]]:
    """(map, reader, metadata) of a shard file; DataRefused unless its format is `expected`."""
    try:
        mapped = pa.memory_map(str(path), "r")
        reader = pa.ipc.open_file(mapped)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataRefused(f"shard {path} cannot be opened as an Arrow file: {error}") from None
    metadata = reader.schema.metadata or {}
    facts = {key.decode(): value.decode() for key, value in metadata.items()}
    if facts.get("format") != expected:
        raise DataRefused(f"shard {path} is {facts.get('format')!r}, not {expected}")
    return mapped, reader, facts


class PackedShard:
    """A shard mapped into memory; a record batch is looked at when a row of it is asked for."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        _, reader, facts = open_shard_file(self.path, FORMAT)  # the reader keeps the map
        self.metadata = facts
        self.seq_len = int(facts["seq_len"])
        self.dtype = np.dtype(facts["token_dtype"])
        self._get_batch: Callable[[int], pa.RecordBatch] = functools.cache(reader.get_batch)
        self.places = BatchPlaces(self._get_batch, reader.num_record_batches)
        """For gather_rows."""
        self.num_rows = self.places.num_rows

    def gather(self, rows: NDArray[np.integer]) -> GatheredRows:
        """Copies of `rows` (k,)."""
        wanted: NDArray[np.int64] = np.asarray(rows, np.int64)
        which = np.zeros_like(wanted)
        return gather_rows([self.places], which, wanted, self.seq_len + 1, self.dtype)

    def tokens(self, start: int, stop: int) -> NDArray[np.unsignedinteger]:
        """A copy of the tokens of rows start to stop, (stop - start, seq_len + 1)."""
        return self.gather(np.arange(start, stop)).tokens

    def doc_lens(self, rows: NDArray[np.integer]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Piece lengths of `rows` (k,): flat (pieces,) and row_splits (k + 1,)."""
        found = self.gather(rows)
        return found.lengths, found.row_splits

    def lineage(self, row: int) -> list[tuple[int, int, int]]:
        """(input index, document offset, tokens) of each piece of a row."""
        cells = [self._list_cell(name, row) for name in ("doc_input", "doc_offset", "doc_lens")]
        return list(zip(*(cell.tolist() for cell in cells), strict=True))

    def close(self) -> None:
        """Let go of the map; it stays for whoever holds `places`, until they are gone."""
        del self._get_batch, self.places

    def _list_cell(self, name: str, row: int) -> NDArray[Any]:
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows} in {self.path}")
        batch, local = divmod(row, self.places.rows_per_batch)
        column = self._get_batch(batch).column(name)
        offsets = numpy_view(column.offsets)
        return numpy_view(column.values)[offsets[local] : offsets[local + 1]]


def file_digest(path: Path | str) -> str:
    """xxh3-128 (hex) of a whole file."""
    digest = xxhash.xxh3_128()
    # One buffer that stays in the CPU's cache: new memory for every chunk costs more than hashing.
    # No map: a disk error or a file cut meanwhile is an OSError here, and would be a SIGBUS there.
    chunk = memoryview(bytearray(_CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
    return digest.hexdigest()
