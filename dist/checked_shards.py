"""Shards as readers other than the loader take them: no byte is shown, copied or counted unchecked.

Damage in an Arrow file can end a reader by a signal, or pass as data; so its bytes are hashed
before anything is read of them: whole, or the record batches that are wanted.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from dist.batch_hashes import batch_messages, hash_of, stored_hashes
from dist.dataset import Dataset
from dist.errors import DataRefused
from dist.manifest import Shard
from dist.split_table import SplitTable
from dist.stamps import file_facts, is_stamped
from dist.verify import stamp_name, wrong_bytes

_ADVICE = "copy it anew, or run the prep job again"
_checked: dict[str, dict[str, Any]] = {}
"""Facts of the files that this process has hashed, by path."""


def checked_path(dataset: Dataset, shard: Shard, stamps: Path | None = None) -> Path:
    """Where a shard can be mapped from, every byte as the manifest says; DataRefused otherwise.

    stamps: a run's folder of stamps; what it hashed on this machine is not hashed again.
    """
    path = dataset.shard_path(shard)
    if dataset.is_remote:
        return path  # the cache has hashed it
    facts = _facts(path, shard)
    if _checked.get(str(path)) == facts:
        return path
    stamped = stamps is not None and is_stamped(stamps / f"{stamp_name(path)}.json", facts)
    if not stamped and (problem := wrong_bytes(path, shard)):
        raise DataRefused(f"{problem}; {_ADVICE}")
    _checked[str(path)] = facts
    return path


def checked_rows(
    dataset: Dataset, split: SplitTable, number: int, rows: NDArray[np.integer]
) -> Path:
    """As checked_path, of shard `number` of a split, for its rows (k,), counted in it, alone."""
    records = split.records_of(number, rows)
    per_batch = dataset.manifest.schema["rows_per_batch"]
    return checked_batches(dataset, split.shards[number], np.unique(records // per_batch).tolist())


def checked_batches(dataset: Dataset, shard: Shard, wanted: Iterable[int]) -> Path:
    """As checked_path, but only the record batches of these numbers are hashed."""
    path = dataset.shard_path(shard)
    if dataset.is_remote:
        return path
    facts = _facts(path, shard)
    if _checked.get(str(path)) == facts:
        return path
    if facts["size"] != shard.bytes:
        raise DataRefused(
            f"{path} has {facts['size']} bytes, the manifest says {shard.bytes}; {_ADVICE}"
        )
    bad = _bad(path, wanted)
    if bad:
        raise DataRefused(f"{path} is damaged: {bad}; {_ADVICE}")
    return path


def _facts(path: Path, shard: Shard) -> dict[str, Any]:
    try:
        return file_facts(path, shard.xxh3_128)
    except FileNotFoundError:
        raise DataRefused(f"{path} is missing; {_ADVICE}") from None


def _bad(path: Path, wanted: Iterable[int]) -> str:
    """What is wrong with some record batches of a file; '' if nothing is."""
    numbers = list(wanted)
    try:
        stored = stored_hashes(path)
        for number, message in enumerate(batch_messages(path)):
            if number in numbers and (found := hash_of(message)) != stored[number]:
                return f"record batch {number} has xxh3-64 {found}, its footer {stored[number]}"
        with pa.memory_map(str(path), "r") as source:
            reader = pa.ipc.open_file(source)
            for number in numbers:
                # A damaged footer may send a reader to another batch, which is whole.
                if xxhash.xxh3_64_hexdigest(reader.get_batch(number).serialize()) != stored[number]:
                    return f"its footer sends to another record batch than {number}"
    except Exception as error:  # damage can make Arrow raise anything
        return f"it does not open as an Arrow file ({error})"
    return ""
