"""Rows/s of the loader against litData, MDS and a bare mmap copy of such rows, in one run.

    python -m benchmarks.loader [--rows 131072] [--seq-len 2048] [--seconds 4] [--no-peers]

All read shuffled rows from the page cache. The bare copy is what no loader in Python can beat:
`out[i] = mapped[row]`. Ours also finds the documents of each row and their borders; the peers
deliver bare tokens, each with no worker process and with two, the faster one counts.
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

from benchmarks.peer_env import TORCH, peer_python, run_peer
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


def peer(script: str, python: str, rows: Path, folder: Path, args: argparse.Namespace) -> float:
    """Rows/s of a peer, the better of no worker and two workers."""
    found = []
    for workers in ("0", "2"):
        target = folder / f"{script}-{workers}"
        words = (str(rows), str(target), str(args.micro_batch), str(args.seconds), workers)
        found.append(float(run_peer(python, script, *words)["rows_s"]))
        shutil.rmtree(target)
    return max(found)


def peers(dataset: Dataset, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Rows/s of the peers on an array of the first shards' rows."""
    shards = [PackedShard(dataset.shard_path(s)) for s in dataset.split("train").shards[:4]]
    rows = folder / "rows.npy"
    np.save(rows, np.concatenate([shard.tokens(0, shard.num_rows) for shard in shards]))
    litdata = peer_python("litdata", [TORCH, "litdata==0.2.76"])
    mds = peer_python(
        "mds",
        [
            *(TORCH, "numpy<2.2", "transformers<5", "tqdm", "xxhash<4", "zstd", "psutil"),
            *("catalogue", "brotli", "python-snappy", "zstandard", "boto3", "requests", "pillow"),
        ],
        ("mosaicml-streaming==0.13.0",),
    )
    return {
        "litdata_rows_s": peer("litdata_rows.py", litdata, rows, folder, args),
        "mds_rows_s": peer("mds_rows.py", mds, rows, folder, args),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=131_072)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true")
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
        found = {"loader_rows_s": ours, "bare_rows_s": bare, "of_bare": ratio}
        if not args.no_peers:
            theirs = peers(dataset, folder, args)
            found |= theirs
            for name, rate in theirs.items():
                found[f"times_{name.removesuffix('_rows_s')}"] = ours / rate
        print(json.dumps({**found, **vars(args)}))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
