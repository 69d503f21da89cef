"""Tokens in tables: Parquet files, Arrow files, and what Hugging Face's save_to_disk wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dist.documents import Documents
from dist.errors import ConfigError, DataRefused
from dist.token_source import (
    TOKEN_COLUMNS,
    Block,
    SourceFile,
    split_of,
    text_advice,
    visible_files,
)

SUFFIXES = (".parquet", ".pq", ".arrow")
LABELS, MASK = "labels", "attention_mask"
EXPORT_SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32())),
        pa.field("source", pa.string()),
        pa.field("offset", pa.int64()),
    ]
)
# What is not trained of an example, as transformers' losses leave it out.
IGNORED_LABEL = -100
_ROW_GROUP = 4096
_PACKED_COLUMNS = ("position_ids", "seq_lengths")
"""A row with one of these may be several examples that were joined."""
_MASK_COLUMNS = ("assistant_masks", "loss_mask", "completion_mask")
"""What is trained, as transformers' chat templates, Megatron and TRL call it."""
_SHARD_COLUMNS = ({"doc_lens", "doc_input"}, {"loss_spans", "segment_lens"})


class _Columns(NamedTuple):
    """Names of a table's columns; '' where it has none."""

    tokens: str
    labels: str
    mask: str


def find_tables(source: Path, column: str) -> list[SourceFile]:
    """Parquet and Arrow files of a folder (also of save_to_disk), or one file."""
    if source.is_file():
        found = [(source, split_of(source.name))]
    elif source.is_dir():
        found = [(path, split_of(path.relative_to(source))) for path in _tables_in(source)]
    else:
        raise ConfigError(f"{source} does not exist")
    if not found:
        raise ConfigError(f"no {', '.join(SUFFIXES)} file in {source}")
    files = []
    for path, split in found:
        schema = _schema(path)
        has_labels = _labels(schema) != ""
        files.append(
            SourceFile(
                path=path, split=split or "train",
                read=lambda path=path: read_table(path, column),  # type: ignore[misc]
                has_labels=has_labels,
                not_read=() if has_labels else tuple(
                    name for name in (*_MASK_COLUMNS, *_PACKED_COLUMNS) if name in schema.names
                ),
            )
        )  # fmt: skip
    return files


def _tables_in(source: Path) -> list[Path]:
    """Those of folders of save_to_disk in the order that it recorded, then all others, sorted."""
    every = visible_files(source)
    for path in every:
        if path.parent.name == "shards" and (path.parent.parent / "manifests").is_dir():
            raise ConfigError(
                f"{path.parent.parent} is a dataset of Leyden, of packed rows and not of documents;"
                f" export it first: leyden data export {path.parent.parent} --to hf FOLDER"
            )
    states = [
        path
        for path in every
        if path.name == "state.json"
        and (len(path.relative_to(source).parts) <= 2 or b'"_data_files"' in path.read_bytes())
    ]
    saved = {state.parent for state in states}
    # datasets leaves cache-*.arrow files of its own map() beside the data.
    others = [
        path
        for path in every
        if path.suffix in SUFFIXES
        and path.parent not in saved
        and not path.name.startswith("cache-")
    ]
    return [*_listed(states), *others]


def _listed(states: list[Path]) -> list[Path]:
    """Files in the order that save_to_disk recorded."""
    files: list[Path] = []
    for state in states:
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
    """Each row's list of tokens as a document, without what its attention_mask leaves out."""
    try:
        before = 0
        for batch, columns in _batches(path, column):
            # Offsets that point out of their buffer would end the process.
            batch.validate(full=True)
            yield _block(path, batch, columns, before)
            before += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's own; Arrow's name damage and have no number
        why = " ".join(str(error).split())
        raise DataRefused(f"{path} is damaged or no such file ({why}); copy it anew") from None


def _schema(path: Path) -> pa.Schema:
    """A table's columns; none of a damaged one, which fails where it is read."""
    try:
        if path.suffix != ".arrow":
            return pq.read_schema(path)
        with pa.memory_map(str(path), "r") as source:
            return _ipc(source)[0]
    except (pa.ArrowException, OSError):
        return pa.schema([])


def _labels(schema: pa.Schema) -> str:
    # Labels of whole rows, as for a classifier, are none of these.
    return LABELS if LABELS in schema.names and _is_list(schema.field(LABELS).type) else ""


def _ipc(source: Any) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Schema and batches of an Arrow file or stream."""
    try:
        file = pa.ipc.open_file(source)
        return file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
    except pa.ArrowInvalid:
        source.seek(0)
        stream = pa.ipc.open_stream(source)
        return stream.schema, iter(stream)


def _batches(path: Path, column: str) -> Iterator[tuple[pa.RecordBatch, _Columns]]:
    """Record batches of the columns that decide tokens, and what they are called."""
    if path.suffix != ".arrow":
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            columns = _columns(path, file.schema_arrow, column)
            names = [name for name in columns if name]
            for batch in file.iter_batches(batch_size=_ROW_GROUP, columns=names):
                yield batch, columns
        return
    with pa.memory_map(str(path), "r") as source:
        schema, batches = _ipc(source)
        columns = _columns(path, schema, column)
        for batch in batches:
            yield batch.select([name for name in columns if name]), columns


def _columns(path: Path, schema: pa.Schema, wanted: str) -> _Columns:
    if any(names <= set(schema.names) for names in _SHARD_COLUMNS):
        raise DataRefused(
            f"{path} is a shard of a Leyden dataset, of packed rows and not of documents; export "
            "the dataset first: leyden data export DATASET --to hf FOLDER"
        )
    tokens = token_column(path, schema, wanted)
    labels, mask = _labels(schema), MASK if MASK in schema.names else ""
    if mask:
        _check_list(path, schema, mask)
    packed = [name for name in _PACKED_COLUMNS if name in schema.names]
    if labels and packed:
        raise DataRefused(
            f"{path} has the columns {LABELS} and {', '.join(packed)}: its rows may be several "
            "examples that were packed; import them as they were before that, Leyden packs as it "
            "reads"
        )
    return _Columns(tokens, labels, mask)


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
    if found[0] in text:
        raise DataRefused(text_advice(f"{path} holds text in its column {found[0]!r}"))
    _check_list(path, schema, found[0])
    return found[0]


def _check_list(path: Path, schema: pa.Schema, name: str) -> None:
    kind = schema.field(name).type
    if not _is_list(kind):
        raise DataRefused(f"{path}: the column {name!r} is {kind}, not a list of integers")


def _is_list(kind: Any) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(kind) for is_kind in lists) and pa.types.is_integer(kind.value_type)


def _block(path: Path, batch: pa.RecordBatch, columns: _Columns, before: int) -> Block:
    """before: rows of the file before this batch."""
    tokens, lengths = _lists(path, batch, columns.tokens)
    ends = np.cumsum(lengths)

    def beside(name: str) -> NDArray[np.integer]:
        values, own = _lists(path, batch, name)
        if not np.array_equal(own, lengths):
            row = int(np.flatnonzero(own != lengths)[0])
            raise DataRefused(
                f"{path}: row {before + row} has {lengths[row]} tokens and {own[row]} of {name}"
            )
        return values

    def refuse_where(wrong: NDArray[np.bool_], why: str) -> None:
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            row = int(np.searchsorted(ends, at, side="right"))
            place = at - int(ends[row] - lengths[row])
            raise DataRefused(f"{path}: row {before + row}, token {place}: {why}")

    trained = None
    if columns.labels:
        labels = beside(columns.labels)
        trained = labels != IGNORED_LABEL
        refuse_where(
            trained & (labels != tokens),
            f"its label is neither the token nor {IGNORED_LABEL}; labels are to stand at their own "
            "tokens, not shifted",
        )
    if columns.mask:
        kept = beside(columns.mask) != 0
        if trained is not None:
            refuse_where(trained & ~kept, f"it is trained, but its {MASK} leaves it out")
        first = np.zeros(len(kept), bool)
        first[(ends - lengths)[lengths > 0]] = True
        begins = kept & (first | ~np.concatenate(([False], kept[:-1])))
        counts = np.concatenate(([0], np.cumsum(begins)))
        again = begins & (counts[1:] - counts[np.repeat(ends - lengths, lengths)] > 1)
        refuse_where(again, f"its {MASK} has left out tokens before it, in the middle of the row")
        left = np.concatenate(([0], np.cumsum(kept)))
        lengths = left[ends] - left[ends - lengths]
        tokens, trained = tokens[kept], None if trained is None else trained[kept]
    return Block(tokens=tokens, lengths=lengths, trained=trained)


def _lists(
    path: Path, batch: pa.RecordBatch, name: str
) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """(values, lengths) of a column of lists."""
    column = batch.column(name)
    values = pc.list_flatten(column)
    if column.null_count or values.null_count:
        raise DataRefused(f"{path} holds rows or {name} that are null; drop them first")
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
    return values.to_numpy(zero_copy_only=False), lengths


class ParquetTokensWriter:
    """Writes one Parquet file: a row a document, with its source and offset.

    with_labels: of examples; where a token is trained its id, else -100.
    """

    def __init__(self, path: Path, paths: list[str], *, with_labels: bool = False) -> None:
        self._paths = paths
        self._schema = EXPORT_SCHEMA
        if with_labels:
            self._schema = EXPORT_SCHEMA.insert(1, pa.field("labels", pa.list_(pa.int32())))
        self._file = pq.ParquetWriter(
            path, self._schema, compression="zstd", write_page_checksum=True
        )

    def add(self, documents: Documents) -> None:
        """Append documents."""
        splits = pa.array(np.concatenate(([0], np.cumsum(documents.lengths))).astype(np.int32))
        tokens = documents.tokens.astype(np.int32)
        lists = [pa.ListArray.from_arrays(splits, pa.array(tokens))]
        if documents.trained is not None:
            labels = np.where(documents.trained, tokens, np.int32(IGNORED_LABEL))
            lists.append(pa.ListArray.from_arrays(splits, pa.array(labels)))
        named = [self._paths[i] if i < len(self._paths) else "" for i in documents.inputs.tolist()]
        columns = [*lists, pa.array(named, pa.string()), pa.array(documents.offsets)]
        self._file.write_table(pa.table(columns, schema=self._schema))

    def close(self) -> None:
        """Write the footer."""
        self._file.close()

    def abort(self) -> None:
        """Close what is open; the file is of no use."""
        self._file.close()
