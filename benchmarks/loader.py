"""Rows/s of the loader against a bare mmap copy of the same rows, in one run.

    python -m benchmarks.loader [--rows 131072] [--seq-len 2048] [--seconds 5]

Both read random rows of the same shards from the page cache on one core's worth of Python. The
bare copy is what no loader can beat: `out[i] = mapped[row]`. Ours also looks up documents and
makes positions, document ids, target masks and cu_seqlens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dist.commit import commit_dataset, publish_shard
from dist.dataset import Dataset, open_dataset
from dist.loader import LoaderPlan, TokenLoader
from dist.manifest import Manifest, Shard
from dist.order import Order
from dist.packing import PackedRows
from dist.shard_file import PackedShard, PackedShardWriter, rows_per_batch
from dist.storage import Storage

DOCUMENTS_PER_ROW = 4


def make_dataset(folder: Path, num_rows: int, seq_len: int, rows_per_shard: int) -> Dataset:
    """Random tokens, four documents a row."""
    storage, shards = Storage(str(folder)), []
    rng = np.random.default_rng(0)
    per_batch = rows_per_batch(seq_len, "uint16")
    lens = np.full(DOCUMENTS_PER_ROW, (seq_len + 1) // DOCUMENTS_PER_ROW, np.int32)
    lens[-1] += (seq_len + 1) - lens.sum()
    for _ in range(-(-num_rows // rows_per_shard)):
        path = folder / "shard.tmp"
        folder.mkdir(exist_ok=True)
        writer = PackedShardWriter(
            path, seq_len=seq_len, token_dtype="uint16", metadata={}, rows_per_batch=per_batch
        )
        n = rows_per_shard
        pieces = n * DOCUMENTS_PER_ROW
        writer.write(
            PackedRows(
                tokens=rng.integers(0, 50_000, (n, seq_len + 1), np.uint16),
                row_splits=np.arange(n + 1, dtype=np.int64) * DOCUMENTS_PER_ROW,
                doc_lens=np.tile(lens, n),
                doc_input=np.zeros(pieces, np.int32),
                doc_offset=np.arange(pieces, dtype=np.int64),
            )
        )
        made = writer.close()
        name = publish_shard(storage, path, made.xxh3_128, made.bytes)
        path.unlink()
        shards.append(
            Shard(
                name=Path(name).name,
                rows=made.rows,
                bytes=made.bytes,
                xxh3_128=made.xxh3_128,
                split="train",
            )
        )
    rows = sum(shard.rows for shard in shards)
    manifest = Manifest(
        kind="packed_tokens",
        schema={
            "seq_len": seq_len,
            "token_dtype": "uint16",
            "vocab_size": 50_000,
            "bos_id": None,
            "eos_id": None,
            "rows_per_batch": per_batch,
        },
        tokenizer_digest=None,
        shards=tuple(shards),
        totals={
            "train": {
                "rows": rows,
                "documents": rows * DOCUMENTS_PER_ROW,
                "tokens": rows * (seq_len + 1),
                "targets": rows * (seq_len + 1 - DOCUMENTS_PER_ROW),
            }
        },
    )
    commit_dataset(storage, manifest, {}, "0" * 64)
    return open_dataset(str(folder))


def bare_copy(dataset: Dataset, order: Order, micro_batch: int, seconds: float) -> float:
    """Rows/s of copying random rows out of the maps into a new buffer a batch."""
    split = dataset.split("train")
    # The views a reader would keep: one array a shard, rows by number.
    shards = [PackedShard(dataset.shard_path(shard)) for shard in split.shards]
    views = [[shard._tokens[b] for b in range(len(shard._tokens))] for shard in shards]
    per_batch = shards[0]._rows_per_batch
    t, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        _, rows = order.rows(t, t + micro_batch)
        shard, local = split.locate(rows)
        out = np.empty((micro_batch, shards[0].seq_len + 1), np.uint16)
        for i, (s, row) in enumerate(zip(shard.tolist(), local.tolist(), strict=True)):
            out[i] = views[s][row // per_batch][row % per_batch]
        t += micro_batch
    return t / (time.perf_counter() - started)


def loader(dataset: Dataset, order: Order, micro_batch: int, seconds: float) -> float:
    """Rows/s of what a training loop receives."""
    plan = LoaderPlan(batch=micro_batch * 8, micro_batch=micro_batch)
    count, started = 0, 0.0
    with TokenLoader(dataset, dataset.split("train"), order, plan) as batches:
        for number, batch in enumerate(batches):
            if number == 8:  # the thread has started and filled its queue
                started = time.perf_counter()
            if number >= 8:
                count += len(batch.tokens)
                if time.perf_counter() - started > seconds:
                    break
        return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=131_072)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="leyden-bench-"))
    try:
        dataset = make_dataset(folder / "data", args.rows, args.seq_len, args.rows // 16)
        order = Order(dataset.split("train").num_rows, seed=1)
        bare_copy(dataset, order, args.micro_batch, 1.0)  # warms the page cache
        pairs = []
        for _ in range(args.repeat):
            bare = bare_copy(dataset, order, args.micro_batch, args.seconds)
            ours = loader(dataset, order, args.micro_batch, args.seconds)
            pairs.append((ours, bare, ours / bare))
            print(
                f"loader {ours:,.0f} rows/s, bare copy {bare:,.0f} rows/s, ratio {ours / bare:.2f}"
            )
        ours, bare, ratio = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            json.dumps({"loader_rows_s": ours, "bare_rows_s": bare, "ratio": ratio, **vars(args)})
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
