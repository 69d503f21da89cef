"""Which files a job reads, and how they are cut into splits: pure planning, no file is opened.

An input is a file, a folder (recursive, hidden files left out), a pattern with `*`, or an fsspec
URL of any of these. A split is a byte range of one file: a JSONL line or a Parquet row group
belongs to the split that holds its first byte, so any cutting gives every record exactly once.
The cutting never changes a record's (path, offset), from which its key and its place derive.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import fsspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from dist.errors import ConfigError, DataRefused, SetupError

FORMATS = ("auto", "jsonl", "parquet", "text", "json")
_BY_EXTENSION = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "jsonl"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".txt", ".text", ".md", ".rst", ".py"), "text"),
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# What Spark and Hive leave beside the data.
_NOT_DATA = ("_SUCCESS", "_metadata", "_common_metadata")
MAX_FILES_PER_TASK = 5_000
MAX_TASKS = 50_000
_U32 = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file to read."""

    url: str
    """Where to read it: an absolute local path or an fsspec URL."""
    path: str
    """Its path relative to the input that named it; part of every record's key."""
    size: int
    """Bytes as stored."""
    stamp: str
    """Modification time, or the ETag of an object store; tells a changed file."""
    format: str
    """jsonl, parquet, text, or json: one array of records."""
    compression: str
    """gzip, zstd or empty."""


@dataclass(frozen=True)
class Split:
    """The records of file number `input` whose first byte lies in [start, start + length)."""

    input: int
    start: int
    length: int


def list_inputs(inputs: Sequence[str], format: str = "auto") -> list[InputFile]:
    """Every file of the inputs, in the order given and by relative path inside each.

    Raises ConfigError for an input that cannot be meant, DataRefused for one without data and
    SetupError for one that may not be read.
    """
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is unknown; choose one of {', '.join(FORMATS)}")
    if not inputs:
        raise ConfigError("no input is given; name files, folders or URLs with --input")
    files: list[InputFile] = []
    for given in inputs:
        files += _list_one(given, format)
    seen: set[str] = set()
    for file in files:
        if file.url in seen:
            raise ConfigError(f"{file.url} is given twice; its text would be trained on twice")
        seen.add(file.url)
    if sum(file.size for file in files) == 0:
        raise DataRefused(f"the {len(files)} input files hold no bytes; check --input")
    return files


def _list_one(given: str, format: str) -> list[InputFile]:
    try:
        fs, path = fsspec.core.url_to_fs(given)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"input {given}: {error}") from None
    try:
        root, found = _find(fs, str(path))
    except FileNotFoundError:
        raise ConfigError(f"input {given} does not exist; check the path") from None
    except PermissionError as error:
        raise SetupError(f"input {given} may not be read ({error}); check its mode") from None
    files = []
    for name, info in sorted(found.items()):
        relative = posixpath.relpath(name, root) if root else posixpath.basename(name)
        parts = relative.split("/")
        if root and (any(part.startswith(".") for part in parts) or parts[-1] in _NOT_DATA):
            continue
        files.append(_input_file(fs, name, relative, info, format))
    if not files:
        raise DataRefused(f"input {given} holds no files (hidden ones are left out)")
    return sorted(files, key=lambda file: file.path)


def _find(fs: Any, path: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The folder that relative paths start at ('' for a single file) and the files' infos."""
    if "*" in path and not fs.exists(path):
        root = path[: path.index("*")].rpartition("/")[0]
        found = {n: i for n, i in fs.glob(path, detail=True).items() if i["type"] == "file"}
        if not found:
            raise DataRefused(f"no file matches {path}; quote the pattern and check it")
        return root, found
    info = fs.info(path)
    if info["type"] == "file":
        return "", {path: info}
    # fsspec's local walk leaves out folders that it may not list unless it is told to raise.
    options = {"on_error": "raise"} if _is_local(fs) else {}
    return path.rstrip("/"), fs.find(path, detail=True, **options)


def _input_file(fs: Any, name: str, relative: str, info: dict[str, Any], format: str) -> InputFile:
    url = name if _is_local(fs) else fs.unstrip_protocol(name)
    if _is_local(fs) and not os.access(name, os.R_OK):
        raise SetupError(f"{name} may not be read by this user; check its owner and mode")
    stem, extension = posixpath.splitext(relative)
    compression = _COMPRESSIONS.get(extension.lower(), "")
    if compression:
        extension = posixpath.splitext(stem)[1]
    kind = format if format != "auto" else _BY_EXTENSION.get(extension.lower(), "")
    if not kind:
        raise ConfigError(
            f"cannot tell the format of {url} by its extension {extension!r}; known are "
            f"{', '.join(_BY_EXTENSION)} (+ .gz, .zst): set --format jsonl, parquet or text, or "
            "name the files by a pattern such as 'folder/**/*.txt'"
        )
    if kind == "parquet" and compression:
        raise ConfigError(f"{url}: a Parquet file is compressed inside; unpack it first")
    keys = ("ETag", "etag", "mtime", "LastModified", "created")
    stamp = next((str(info[key]) for key in keys if info.get(key)), "")
    return InputFile(
        url=url,
        path=relative,
        size=int(info["size"] or 0),
        stamp=stamp,
        format=kind,
        compression=compression,
    )


def _is_local(fs: Any) -> bool:
    protocol = fs.protocol if isinstance(fs.protocol, (tuple, list)) else (fs.protocol,)
    return "file" in protocol


def split_bytes_for(total_bytes: int, parallelism: int, num_tasks: int = 0) -> int:
    """Bytes a task should read: for `num_tasks` if given, else for eight tasks a core.

    Between 1 and 16 MiB, so that no core waits long for the last task, but never so little that
    Spark's scheduler gets more than 50,000 tasks.
    """
    if num_tasks > 0:
        return max(1, -(-total_bytes // num_tasks))
    split_bytes = max(1 << 20, min(16 << 20, -(-total_bytes // max(1, 8 * parallelism))))
    return max(split_bytes, total_bytes // MAX_TASKS)


def plan_tasks(files: Sequence[InputFile], split_bytes: int) -> list[list[Split]]:
    """Cut files into splits of about `split_bytes` and group small ones; one list per task."""
    tasks: list[list[Split]] = []
    open_task: list[Split] = []
    open_bytes = 0
    for split in _cut_files(files, split_bytes):
        too_much = open_bytes + split.length > split_bytes or len(open_task) >= MAX_FILES_PER_TASK
        if open_task and too_much:
            tasks.append(open_task)
            open_task, open_bytes = [], 0
        open_task.append(split)
        open_bytes += split.length
    return [*tasks, open_task] if open_task else tasks


def _cut_files(files: Sequence[InputFile], split_bytes: int) -> Iterable[Split]:
    for number, file in enumerate(files):
        if file.compression or file.format in ("text", "json"):
            yield Split(number, 0, file.size)
            continue
        for start in range(0, file.size, split_bytes):
            yield Split(number, start, min(split_bytes, file.size - start))


def sample_splits(files: Sequence[InputFile], num_points: int) -> list[Split]:
    """Splits at evenly spaced bytes of all inputs, by which the driver judges a job's rows.

    Depends on the inputs alone, never on cores or cutting: what is decided by it is the same
    wherever the job runs.
    """
    ends = np.cumsum([file.size for file in files])
    splits: dict[tuple[int, int], Split] = {}
    for point in range(num_points):
        position = int(ends[-1]) * point // num_points
        number = int(np.searchsorted(ends, position, side="right"))
        file = files[number]
        start = position - int(ends[number] - file.size)
        if file.compression or file.format != "jsonl":
            start = 0
        splits[number, start] = Split(number, start, file.size - start)
    return list(splits.values())


def record_keys(path: str, offsets: Sequence[int]) -> list[bytes]:
    """16-byte identities of the records of a file: xxh3_128(path || 0 || offset as 8 bytes)."""
    prefix = path.encode() + b"\0"
    digest = xxhash.xxh3_128_digest
    return [digest(prefix + offset.to_bytes(8, "little")) for offset in offsets]


def key_hashes(keys: Iterable[bytes], seed: int) -> NDArray[np.uint64]:
    """h = xxh3_64(key, seed) of every key: the order of the rows."""
    intdigest = xxhash.xxh3_64_intdigest
    return np.array([intdigest(key, seed) for key in keys], np.uint64)


def scale_hashes(hashes: NDArray[np.uint64], num_buckets: int) -> NDArray[np.int64]:
    """(h * S) >> 64 without 128-bit integers: bucket numbers in [0, S), S below 2^31."""
    count = np.uint64(num_buckets)
    high, low = hashes >> np.uint64(32), hashes & _U32
    return ((high * count + (low * count >> np.uint64(32))) >> np.uint64(32)).astype(np.int64)


def describe_inputs(files: Sequence[InputFile]) -> list[dict[str, Any]]:
    """Inputs as the provenance lists them; `doc_input` of a shard indexes this list."""
    return [asdict(file) for file in files]
