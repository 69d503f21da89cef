"""The lengths of all examples of a dataset in one small file, so that a start reads no shard.

lengths/<SHA-256>.arrow is an Arrow IPC file, uncompressed, with one non-null column `tokens`: the
length of each example in the order of the manifest's shards and of the rows in them, as uint16
where max_length fits, else uint32. Equal lengths and max_length give equal bytes. One process a
node fetches that of a remote dataset (dist/cached_file.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist.arrow_view import numpy_view
from dist.errors import DataRefused
from dist.manifest import Shard

FORMAT = "leyden.example_lengths.v1"


def lengths_file(shards: Sequence[NDArray[np.integer]], max_length: int) -> bytes:
    """The file's bytes, from the lengths (rows,) of the examples of each shard in order."""
    dtype = np.uint16 if max_length < 1 << 16 else np.uint32
    lengths = np.concatenate(shards)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= max_length:
        raise ValueError(f"lengths {lengths.min()} to {lengths.max()}, max_length {max_length}")
    column = pa.array(lengths.astype(dtype))
    field = pa.field("tokens", column.type, nullable=False)
    schema = pa.schema([field], metadata={"format": FORMAT})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as out:
        out.write_batch(pa.record_batch([column], schema=schema))
    return sink.getvalue().to_pybytes()


def parse_lengths(
    data: bytes, shards: Sequence[Shard], url: str
) -> list[NDArray[np.unsignedinteger]]:
    """The lengths (rows,) of the examples of each shard, views of `data`; DataRefused for a file
    that is not of these shards.
    """
    try:
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    except pa.ArrowInvalid as error:
        raise DataRefused(f"{url} cannot be opened as an Arrow file: {error}") from None
    found = (table.schema.metadata or {}).get(b"format", b"").decode()
    if found != FORMAT:
        raise DataRefused(f"{url} is {found!r}, not {FORMAT}")
    rows = sum(shard.rows for shard in shards)
    if table.num_rows != rows:
        raise DataRefused(
            f"{url} has the lengths of {table.num_rows:,} examples, the manifest has {rows:,}; run "
            "the prep job again"
        )
    lengths = numpy_view(table.column("tokens").chunk(0))
    return np.split(lengths, np.cumsum([shard.rows for shard in shards])[:-1])
