"""A dataset for benchmarks/gpu.py where neither internet nor Java is: this Python's own library.

Each word of the sources is one token, numbered by CRC-32 into the vocabulary, so the shards are
the same on every machine with the same Python. Packed and committed as the Spark job does it.
"""

from __future__ import annotations

import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dist.commit import commit_dataset, publish_shard
from dist.dataset import Dataset, open_dataset
from dist.manifest import Manifest, Shard, digest_of
from dist.packing import Packer, num_targets
from dist.shard_file import PackedShardWriter
from dist.storage import Storage

ROWS_PER_BATCH = 16
SHARD_ROWS = 512
EOS = 0
_WORD = re.compile(rb"\w+|[^\w\s]|\s+")


def documents(vocab_size: int) -> Iterator[np.ndarray]:
    """Token ids of each source file, without end; the library again when it ends."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    while True:
        for path in paths:
            words = _WORD.findall(path.read_bytes())
            ids = [1 + zlib.crc32(word) % (vocab_size - 1) for word in words]
            yield np.array([*ids, EOS], np.int64)


def write_text_dataset(root: Path, *, vocab_size: int, seq_len: int, num_rows: int) -> Dataset:
    """At least `num_rows` rows of train and a few of validation, committed in `root`."""
    storage = Storage(str(root))
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    source = documents(vocab_size)
    shards: list[Shard] = []
    totals: dict[str, dict[str, int]] = {}
    plan = [("train", min(SHARD_ROWS, num_rows - n)) for n in range(0, num_rows, SHARD_ROWS)]
    for number, (split, rows) in enumerate([*plan, ("validation", 2)]):
        packer, made, count = Packer(seq_len, np.dtype(dtype)), 0, 0
        path = root / f"scratch-{number}.arrow"
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = PackedShardWriter(
            path, seq_len=seq_len, token_dtype=dtype, metadata={"kind": "packed_tokens"},
            rows_per_batch=ROWS_PER_BATCH,
        )  # fmt: skip
        counts = totals.setdefault(
            split, dict.fromkeys(("rows", "documents", "tokens", "targets"), 0)
        )
        while made < rows:
            ids = next(source)
            full = packer.add(ids, np.array([len(ids)]), np.array([0]), np.array([count]))
            count += 1
            counts["documents"] += 1
            counts["tokens"] += len(ids)
            if full is not None:
                writer.write(full)
                made += len(full.tokens)
                counts["targets"] += int(num_targets(full.doc_lens, full.row_splits).sum())
        done = writer.close()
        name = publish_shard(storage, path, done.xxh3_128, done.bytes)
        path.unlink()
        counts["rows"] += done.rows
        shards.append(
            Shard(name=Path(name).name, rows=done.rows, bytes=done.bytes, xxh3_128=done.xxh3_128,
                  split=split)
        )  # fmt: skip
    schema = {
        "seq_len": seq_len, "token_dtype": dtype, "vocab_size": vocab_size, "bos_id": None,
        "eos_id": EOS, "rows_per_batch": ROWS_PER_BATCH,
    }  # fmt: skip
    manifest = Manifest(
        kind="packed_tokens", schema=schema, tokenizer_digest=None, shards=tuple(shards),
        totals=totals,
    )  # fmt: skip
    job = digest_of({"benchmark": "gpu", **schema, "rows": num_rows})
    commit_dataset(storage, manifest, {"inputs": ["the Python standard library"]}, job)
    return open_dataset(str(root))
