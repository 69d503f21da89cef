"""Which record batches of a shard are damaged, told from its bytes alone.

No array is made of them: Arrow ends the process (SIGABRT, SIGSEGV) where a damaged length or
offset points out of its buffer, and the damage would go unnamed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import xxhash

FOOTER_KEY = b"leyden.batch_xxh3_64"
_MAGIC_BYTES = 8


def stored_hashes(path: Path) -> list[str]:
    """The xxh3-64 (hex) of each record batch as the footer tells them."""
    with pa.memory_map(str(path), "r") as source:
        return list(json.loads((pa.ipc.open_file(source).metadata or {}).get(FOOTER_KEY, b"[]")))


def hash_of(message: pa.Message) -> str:
    """xxh3-64 (hex) of a message's bytes, as they stand in the file."""
    return xxhash.xxh3_64_hexdigest(message.serialize())


def batch_messages(path: Path) -> Iterator[pa.Message]:
    """The message of each record batch in their order; Arrow's errors for damage.

    Its body is a view of the map: of a message that is not hashed no page is read.
    """
    with pa.memory_map(str(path), "r") as source:
        source.seek(_MAGIC_BYTES)  # what follows is a stream
        messages = pa.ipc.MessageReader.open_stream(source)
        while True:
            try:
                message = messages.read_next_message()
            except StopIteration:
                return
            if message.type == "record batch":
                yield message


def damaged_batches(path: Path) -> list[int]:
    """Numbers of the record batches whose bytes differ from their hash in the footer.

    Whatever comes after a message that cannot be read counts as damaged. Raises anything where the
    footer cannot be read.
    """
    stored = stored_hashes(path)
    found: list[str] = []
    try:
        found += map(hash_of, batch_messages(path))
    except (pa.ArrowException, OSError, MemoryError):
        pass  # its length is damaged, and so where the next one begins is not known
    found += [""] * (len(stored) - len(found))
    return [number for number, told in enumerate(stored) if found[number] != told]
