"""Reads the records of splits: bytes by fsspec, newlines aligned here, text decoded strictly.

Spark's own readers will not do: `read.text` turns bad bytes into U+FFFD without a word and knows
no offset, `read.json` drops lines. Here a record is either a document or refused for a reason.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa

from dist.errors import DataRefused
from spark_jobs.sources import InputFile, Split

REASONS = (
    *("undecodable", "not_json", "field_missing", "empty", "over_long"),
    # Of chats (spark_jobs/chat_tokens.py).
    *("unrecognised", "template_error", "not_prefix", "turns_unclear", "special_text"),
    "truncated_away",
)
KEPT_RAW_BYTES = 64 << 10
BLOCK_BYTES = 1 << 20
CHUNK_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Refused:
    """A record that is not trained on; kept in the quarantine file."""

    input: int
    offset: int
    reason: str
    raw: bytes
    """At most 64 KiB; empty for Parquet rows."""


@dataclass
class Chunk:
    """Some documents in order: parallel lists, about CHUNK_BYTES of text."""

    inputs: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    text_bytes: int = 0
    """UTF-8 bytes of the texts."""


@dataclass(frozen=True)
class Rules:
    """What makes a record a document."""

    text_field: str
    """Key or column of the text; '' takes the whole row, as the text of a JSON object."""
    max_document_bytes: int


def read_chunks(
    files: Sequence[InputFile], splits: Sequence[Split], rules: Rules
) -> Iterator[Chunk]:
    """All records of the splits, small files together in one chunk."""
    chunk = Chunk()
    for split in splits:
        file = files[split.input]
        try:
            for offset, value in _read_split(file, split, rules):
                _sort_in(chunk, split.input, offset, value, rules)
                if chunk.text_bytes >= CHUNK_BYTES or len(chunk.refused) >= 1000:
                    yield chunk
                    chunk = Chunk()
        except (OSError, pa.ArrowInvalid, EOFError) as error:
            if isinstance(error, PermissionError):
                raise
            raise DataRefused(
                f"{file.url} cannot be read as {file.format} {file.compression}: {error}; "
                "replace the file or leave it out"
            ) from error
    if chunk.texts or chunk.refused:
        yield chunk


# A record as read: a document's text, or (reason, raw bytes).
Value = str | tuple[str, bytes]


def _sort_in(chunk: Chunk, number: int, offset: int, value: Value, rules: Rules) -> None:
    if isinstance(value, str):
        # A lone surrogate ("\ud800" in JSON) is a str that has no UTF-8; isascii() is free.
        try:
            size = len(value) if value.isascii() else len(value.encode())
        except UnicodeEncodeError:
            value = ("undecodable", value.encode("utf-8", "surrogatepass"))
        else:
            if size > rules.max_document_bytes:
                value = ("over_long", value[:KEPT_RAW_BYTES].encode())
            elif not value or value.isspace():
                value = ("empty", value[:KEPT_RAW_BYTES].encode())
            else:
                chunk.inputs.append(number)
                chunk.offsets.append(offset)
                chunk.texts.append(value)
                chunk.text_bytes += size
                return
    reason, raw = value
    chunk.refused.append(Refused(number, offset, reason, raw[:KEPT_RAW_BYTES]))


def _read_split(file: InputFile, split: Split, rules: Rules) -> Iterator[tuple[int, Value]]:
    if file.format == "parquet":
        return _read_parquet(file, split, rules)
    if file.format == "text":
        return _read_text(file, rules)
    if file.format == "json":
        return _read_json(file, rules)
    return _read_jsonl(file, split, rules)


@contextlib.contextmanager
def _open(file: InputFile) -> Iterator[BinaryIO]:
    with fsspec.open(file.url, "rb") as raw:
        if not file.compression:
            yield raw
            return
        # Arrow's streams also read concatenated gzip members and zstd frames.
        with pa.CompressedInputStream(pa.PythonFile(raw, "r"), file.compression) as stream:
            yield stream


def _read_text(file: InputFile, rules: Rules) -> Iterator[tuple[int, Value]]:
    with _open(file) as stream:
        raw = stream.read(rules.max_document_bytes + len(_BOM) + 1).removeprefix(_BOM)
    yield 0, ("over_long", raw) if len(raw) > rules.max_document_bytes else _decode(raw)


def _read_jsonl(file: InputFile, split: Split, rules: Rules) -> Iterator[tuple[int, Value]]:
    # \u0041 is six bytes for one, and a row has other fields: beyond this no document can fit.
    max_line = 6 * rules.max_document_bytes + BLOCK_BYTES
    end = None if file.compression else split.start + split.length
    with _open(file) as stream:
        for offset, line in iter_lines(stream, split.start, end, max_line):
            if offset == 0:
                line = line.removeprefix(_BOM)
            if len(line) > max_line:
                yield offset, ("over_long", line)
            elif line and not line.isspace():
                yield offset, _parse(line, rules.text_field)


def _parse(line: bytes, text_field: str) -> Value:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return "undecodable", line
    except (ValueError, RecursionError):
        return "not_json", line
    if not isinstance(row, dict):
        return "not_json", line
    text = row.get(text_field) if text_field else line.decode()
    return text if isinstance(text, str) else ("field_missing", line)


def _read_json(file: InputFile, rules: Rules) -> Iterator[tuple[int, Value]]:
    """Elements of a file that is one JSON array; a record's offset is that of its first byte.

    The file is held in memory. What follows a damaged element is refused with it as one record.
    """
    with _open(file) as stream:
        raw = stream.read()
    text = raw.decode("utf-8", "surrogateescape")  # so that a bad byte costs one element only
    scan, decoder = re.compile(r"[\s,\ufeff]*"), json.JSONDecoder()
    begin = re.match(r"[\s\ufeff]*\[", text)
    if begin is None:
        yield 0, ("not_json", raw[:KEPT_RAW_BYTES])
        return
    at, done, offset = begin.end(), 0, 0
    while True:
        at = scan.match(text, at).end()  # type: ignore[union-attr]
        offset += len(text[done:at].encode("utf-8", "surrogateescape"))
        done = at
        if at >= len(text) or text[at] == "]":
            return
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            yield offset, ("not_json", raw[offset : offset + KEPT_RAW_BYTES])
            return
        yield offset, _parse(text[at:end].encode("utf-8", "surrogateescape"), rules.text_field)
        at = end


def _decode(raw: bytes) -> Value:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "undecodable", raw


def iter_lines(
    stream: Any, start: int, end: int | None, max_line: int, block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[int, bytes]]:
    r"""(offset, line without \n) of the lines that begin in [start, end); end None is the end.

    A line of more than max_line bytes comes cut to max_line + 1, the rest is never held.
    """
    offset = start
    if start > 0:
        # The line that begins before `start` belongs to the split before; it may end just there.
        stream.seek(start - 1)
        skipped = _skip_line(stream, block_bytes)
        if skipped is None:
            return
        count, buffer = skipped
        offset = start - 1 + count
    else:
        buffer = stream.read(block_bytes)
    while buffer and (end is None or offset < end):
        *lines, rest = buffer.split(b"\n")
        for line in lines:
            if end is not None and offset >= end:
                return
            yield offset, line if len(line) <= max_line else line[: max_line + 1]
            offset += len(line) + 1
        more = stream.read(block_bytes)
        if rest and (end is None or offset < end):
            pieces, size = [rest], len(rest)
            while more and b"\n" not in more:
                if size <= max_line:
                    pieces.append(more)
                size += len(more)
                more = stream.read(block_bytes)
            head, newline, more = more.partition(b"\n")
            line = b"".join([*pieces, head]) if size <= max_line else b"".join(pieces)
            yield offset, line if len(line) <= max_line else line[: max_line + 1]
            offset += size + len(head) + len(newline)
            more = more or stream.read(block_bytes)
        buffer = more


def _skip_line(stream: Any, block_bytes: int) -> tuple[int, bytes] | None:
    r"""Bytes up to and with the next \n, and what was read beyond; None if the file ends."""
    count = 0
    while block := stream.read(block_bytes):
        head, newline, rest = block.partition(b"\n")
        count += len(head) + len(newline)
        if newline:
            return count, rest or stream.read(block_bytes)
    return None


def _read_parquet(file: InputFile, split: Split, rules: Rules) -> Iterator[tuple[int, Value]]:
    import pyarrow.parquet as pq

    with _open(file) as stream, pq.ParquetFile(stream) as parquet:
        row = 0
        for group in range(parquet.num_row_groups):
            facts = parquet.metadata.row_group(group)
            if split.start <= _first_byte(facts) < split.start + split.length:
                yield from _read_row_group(parquet, group, row, rules)
            row += facts.num_rows


def _first_byte(row_group: Any) -> int:
    column = row_group.column(0)
    starts = [column.data_page_offset]
    if column.has_dictionary_page and column.dictionary_page_offset:
        starts.append(column.dictionary_page_offset)
    return int(min(starts))


def _read_row_group(
    parquet: Any, group: int, row: int, rules: Rules
) -> Iterator[tuple[int, Value]]:
    if not rules.text_field:
        yield from _read_whole_rows(parquet, group, row)
        return
    schema = parquet.schema_arrow
    kind = schema.field(rules.text_field).type if rules.text_field in schema.names else None
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        for number in range(row, row + parquet.metadata.row_group(group).num_rows):
            yield number, ("field_missing", b"")
        return
    batches = parquet.iter_batches(1024, row_groups=[group], columns=[rules.text_field])
    for batch in batches:
        # As bytes: Arrow does not check that a string column holds UTF-8.
        for raw in batch.column(0).cast(pa.large_binary()).to_pylist():
            yield row, ("field_missing", b"") if raw is None else _decode(raw)
            row += 1


def _read_whole_rows(parquet: Any, group: int, row: int) -> Iterator[tuple[int, Value]]:
    """Rows of a row group as JSON; a field without a value is left out at any depth, since a
    Parquet struct gives every row the fields of all others."""
    for batch in parquet.iter_batches(1024, row_groups=[group]):
        for number in range(batch.num_rows):
            try:
                values = batch.slice(number, 1).to_pylist()[0]
                yield row, json.dumps(_without_nulls(values), ensure_ascii=False, default=str)
            except UnicodeDecodeError:
                yield row, ("undecodable", b"")
            row += 1


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return value
