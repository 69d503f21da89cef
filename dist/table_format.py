"""Tokens in tables: Parquet files, Arrow files, and what Hugging Face's save_to_disk wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dist.documents import Documents
from dist.errors import ConfigError, DataRefused
from dist.token_source import TOKEN_COLUMNS, Block, SourceFile, split_of, text_advice

SUFFIXES = (".parquet", ".pq", ".arrow")
EXPORT_SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32())),
        pa.field("source", pa.string()),
        pa.field("offset", pa.int64()),
    ]
)
_ROW_GROUP = 4096


def find_tables(source: Path, column: str) -> list[SourceFile]:
    """Parquet and Arrow files of a folder (also of save_to_disk), or one file."""
    if source.is_file():
        found = [(source, split_of(source.name))]
    elif source.is_dir():
        found = [
            (path, split_of(path.relative_to(source)))
            for path in _listed(source) or sorted(source.rglob("*"))
            if path.suffix in SUFFIXES and not _hidden(path.relative_to(source))
        ]
    else:
        raise ConfigError(f"{source} does not exist")
    if not found:
        raise ConfigError(f"no {', '.join(SUFFIXES)} file in {source}")
    return [
        SourceFile(
            path=path, split=split or "train",
            read=lambda path=path: read_table(path, column),  # type: ignore[misc]
        )
        for path, split in found
    ]  # fmt: skip


def _hidden(relative: Path) -> bool:
    # datasets leaves cache-*.arrow files of its own map() beside the data.
    return relative.name.startswith("cache-") or any(p.startswith(".") for p in relative.parts)


def _listed(source: Path) -> list[Path]:
    """Files in the order that save_to_disk recorded; [] for another folder."""
    files: list[Path] = []
    for state in sorted([*source.glob("state.json"), *source.glob("*/state.json")]):
        try:
            names = [one["filename"] for one in json.loads(state.read_bytes())["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataRefused(f"{state} is not a state of save_to_disk ({error})") from None
        files += [state.parent / Path(name).name for name in names]
    for path in files:
        if not path.is_file():
            raise DataRefused(f"{path} is missing; copy the folder anew")
    return files


def read_table(path: Path, column: str) -> Iterator[Block]:
    """Each row's list of tokens as a document."""
    try:
        for batch in _batches(path, column):
            yield _block(path, batch)
    except pa.ArrowException as error:
        raise DataRefused(f"{path} is damaged or no such file ({error}); copy it anew") from None


def _batches(path: Path, column: str) -> Iterator[pa.RecordBatch]:
    """Record batches of the one column of tokens."""
    if path.suffix != ".arrow":
        with pq.ParquetFile(path) as file:
            name = token_column(path, file.schema_arrow, column)
            yield from file.iter_batches(batch_size=_ROW_GROUP, columns=[name])
        return
    with pa.memory_map(str(path), "r") as source:
        try:
            reader: Any = pa.ipc.open_file(source)
            batches: Any = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            batches = reader = pa.ipc.open_stream(source)
        name = token_column(path, reader.schema, column)
        for batch in batches:
            yield batch.select([name])


def token_column(path: Path, schema: pa.Schema, wanted: str) -> str:
    """Name of the column of tokens: the one asked for, or input_ids or tokens."""
    names = [wanted] if wanted else TOKEN_COLUMNS
    found = [name for name in names if name in schema.names]
    said = ", ".join(f"{field.name} ({field.type})" for field in schema)
    text = [
        f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)
    ]
    if not found and text and not wanted:
        raise DataRefused(text_advice(f"{path} holds text: its columns are {said}"))
    if not found:
        raise ConfigError(
            f"{path} has no column {' or '.join(names)}: it has {said}; name the column of tokens "
            "with --column"
        )
    kind = schema.field(found[0]).type
    if found[0] in text:
        raise DataRefused(text_advice(f"{path} holds text in its column {found[0]!r}"))
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_kind(kind) for is_kind in lists) or not pa.types.is_integer(kind.value_type):
        raise DataRefused(f"{path}: the column {found[0]!r} is {kind}, not a list of integers")
    return found[0]


def _block(path: Path, batch: pa.RecordBatch) -> Block:
    column = batch.column(0)
    values = pc.list_flatten(column)
    if column.null_count or values.null_count:
        raise DataRefused(f"{path} holds rows or tokens that are null; drop them first")
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
    return Block(tokens=values.to_numpy(zero_copy_only=False), lengths=lengths)


class ParquetTokensWriter:
    """Writes one Parquet file: a row a document, with its source and offset."""

    def __init__(self, path: Path, paths: list[str]) -> None:
        self._paths = paths
        self._file = pq.ParquetWriter(path, EXPORT_SCHEMA, compression="zstd")

    def add(self, documents: Documents) -> None:
        """Append documents."""
        splits = np.concatenate(([0], np.cumsum(documents.lengths)))
        ids = pa.ListArray.from_arrays(
            pa.array(splits.astype(np.int32)), pa.array(documents.tokens.astype(np.int32))
        )
        named = [self._paths[i] if i < len(self._paths) else "" for i in documents.inputs.tolist()]
        columns = [ids, pa.array(named, pa.string()), pa.array(documents.offsets)]
        self._file.write_table(pa.table(columns, schema=EXPORT_SCHEMA))

    def close(self) -> None:
        """Write the footer."""
        self._file.close()

    def abort(self) -> None:
        """Close what is open; the file is of no use."""
        self._file.close()
