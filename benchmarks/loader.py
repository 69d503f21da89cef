"""Rows/s of the loader against litData, MDS and a bare mmap copy of such rows, in one run.

    python -m benchmarks.loader [--rows 65536] [--seq-len 2048] [--seconds 3] [--no-peers]

All read shuffled rows from the page cache. The bare copy is one numpy call a micro-batch on one
map of all rows, their order known: what the machine's memory gives. Beside it stand a copy row by
row, and one with the order and the shards that the rows have to be found in. Ours works the order
out and also finds the documents of each row and their borders; the peers deliver bare tokens, each
with no worker process and with two, the faster one counts. Each peer first gives one epoch whole,
in which every row is compared with what was stored, and says how far over the data the rows of a
batch are spread (1 for a shuffle of everything; ours is 1). Rows per CPU second (no worker
processes) are what a busy machine disturbs least. All take turns.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.peer_env import TORCH, peer_python, run_peer
from dist.commit import commit_dataset, publish_shard
from dist.dataset import Dataset, open_dataset
from dist.documents import shard_rows
from dist.loader import LoaderPlan, TokenLoader
from dist.manifest import Manifest, Shard
from dist.order import Order
from dist.packing import PackedRows
from dist.shard_file import PackedShard, PackedShardWriter, rows_per_batch
from dist.storage import Storage

DOCUMENTS_PER_ROW = 4


class Rate(NamedTuple):
    """Rows by wall time and by CPU time of the process, a second each."""

    wall: float
    cpu: float


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


def bare_copy(mapped: NDArray[Any], micro_batch: int, seconds: float) -> Rate:
    """Copying random rows out of one map into a new buffer a batch, their order worked out before:
    one numpy call each, which is what the memory of this machine gives."""
    rows = np.random.default_rng(1).permutation(len(mapped))
    batches = rows[: len(rows) // micro_batch * micro_batch].reshape(-1, micro_batch)
    return _rate(lambda number: mapped[batches[number % len(batches)]], micro_batch, seconds)


def copy_by_row(mapped: NDArray[Any], micro_batch: int, seconds: float) -> Rate:
    """The same by `out[i] = mapped[row]`, as a loader does that takes its samples one by one."""
    rows = np.random.default_rng(1).permutation(len(mapped))
    batches = rows[: len(rows) // micro_batch * micro_batch].reshape(-1, micro_batch)

    def copy(number: int) -> None:
        out = np.empty((micro_batch, mapped.shape[1]), mapped.dtype)
        for i, row in enumerate(batches[number % len(batches)].tolist()):
            out[i] = mapped[row]

    return _rate(copy, micro_batch, seconds)


def read_by_row(dataset: Dataset, order: Order, micro_batch: int, seconds: float) -> Rate:
    """The same with what any reader of these shards has to do: the order of each micro-batch, and
    where each row lies in which shard's map."""
    split = dataset.split("train")
    shards = [list(shard_rows(dataset.shard_path(shard))) for shard in split.shards]
    views = [[batch.tokens for batch in shard] for shard in shards]
    per_batch = len(views[0][0])

    def copy(number: int) -> None:
        _, rows = order.rows(number * micro_batch, (number + 1) * micro_batch)
        shard, local = split.locate(rows)
        out = np.empty((micro_batch, views[0][0].shape[1]), views[0][0].dtype)
        for i, (s, row) in enumerate(zip(shard.tolist(), local.tolist(), strict=True)):
            out[i] = views[s][row // per_batch][row % per_batch]

    return _rate(copy, micro_batch, seconds)


def _rate(copy: Callable[[int], Any], micro_batch: int, seconds: float) -> Rate:
    number, started, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        copy(number)
        number += 1
    count = number * micro_batch
    return Rate(count / (time.perf_counter() - started), count / (time.process_time() - cpu))


def loader(dataset: Dataset, order: Order, micro_batch: int, seconds: float) -> Rate:
    """What a training loop receives."""
    plan = LoaderPlan(batch=micro_batch * 8, micro_batch=micro_batch)
    count, started, cpu = 0, 0.0, 0.0
    gc.collect()
    gc.freeze()  # as training does (dist.training.LongLived)
    with TokenLoader(dataset, dataset.split("train"), order, plan) as batches:
        for number, batch in enumerate(batches):
            if number == 8:  # the thread has started and filled its queue
                started, cpu = time.perf_counter(), time.process_time()
            if number >= 8:
                count += len(batch.tokens)
                if time.perf_counter() - started > seconds:
                    break
        return Rate(count / (time.perf_counter() - started), count / (time.process_time() - cpu))


class Peer(NamedTuple):
    """A loader of somebody else's, and how it is run."""

    name: str
    script: str
    python: str
    words: tuple[str, ...] = ()


def make_peers() -> list[Peer]:
    """The peers with their environments. litData shuffles as it does by default, in windows of
    256 rows, and once more in whole chunks."""
    litdata = peer_python("litdata", [TORCH, "litdata==0.2.76"])
    mds = peer_python(
        "mds",
        [
            *(TORCH, "numpy<2.2", "transformers<5", "tqdm", "xxhash<4", "zstd", "psutil"),
            *("catalogue", "brotli", "python-snappy", "zstandard", "boto3", "requests", "pillow"),
        ],
        ("mosaicml-streaming==0.13.0",),
    )
    datasets = peer_python("datasets", [TORCH, "datasets==5.2.0"])
    return [
        Peer("litdata", "litdata_rows.py", litdata, ("uint16", "auto")),
        Peer("litdata_full_chunk", "litdata_rows.py", litdata, ("uint16", "full")),
        Peer("mds", "mds_rows.py", mds),
        Peer("datasets", "datasets_rows.py", datasets),
    ]


def write_rows(dataset: Dataset, path: Path, num_shards: int = 4) -> None:
    """The first shards' rows as an array for the peers, with their numbers as first tokens."""
    shards = [
        PackedShard(dataset.shard_path(s)) for s in dataset.split("train").shards[:num_shards]
    ]
    rows = np.concatenate([shard.tokens(0, shard.num_rows) for shard in shards])
    number = np.arange(len(rows))
    rows[:, 0], rows[:, 1] = number & 0xFFFF, number >> 16
    np.save(path, rows)


def measure_peer(peer: Peer, folder: Path, args: argparse.Namespace) -> Rate:
    """A peer's better rate of no worker and two workers, and its CPU rate without workers."""
    found = []
    for workers in ("0", "2"):
        data = folder / peer.script
        words = (str(folder / "rows.npy"), str(data), str(args.micro_batch), str(args.seconds))
        found.append(run_peer(peer.python, peer.script, *words, workers, *peer.words))
    alone, two = found
    best = max(alone["rows_s"], two["rows_s"])
    print(
        f"  {peer.name}: {alone['rows_s']:,.0f} rows/s, with two workers {two['rows_s']:,.0f}, "
        f"{alone['rows_cpu_s']:,.0f} a CPU second; {alone['dtype']}, spread {alone['spread']}, "
        f"{alone['rows_missing']} rows missing, {alone['rows_twice']} twice",
        flush=True,
    )
    return Rate(float(best), float(alone["rows_cpu_s"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="leyden-bench-"))
    rates: dict[str, list[Rate]] = {}
    try:
        dataset = make_dataset(folder / "data", args.rows, args.seq_len, args.rows // 16)
        order = Order(dataset.split("train").num_rows, seed=1)
        peers = [] if args.no_peers else make_peers()
        write_rows(dataset, folder / "rows.npy", len(dataset.split("train").shards))
        mapped = np.asarray(np.load(folder / "rows.npy", mmap_mode="r"))
        bare_copy(mapped, args.micro_batch, 1.0)  # warms the page cache
        loader(dataset, order, args.micro_batch, 1.0)
        for _ in range(args.repeat):
            bare = bare_copy(mapped, args.micro_batch, args.seconds)
            by_row = copy_by_row(mapped, args.micro_batch, args.seconds)
            reader = read_by_row(dataset, order, args.micro_batch, args.seconds)
            ours = loader(dataset, order, args.micro_batch, args.seconds)
            rates.setdefault("bare", []).append(bare)
            rates.setdefault("by_row", []).append(by_row)
            rates.setdefault("reader", []).append(reader)
            rates.setdefault("loader", []).append(ours)
            print(
                f"loader {ours.wall:,.0f} rows/s, bare copy {bare.wall:,.0f}, ratio "
                f"{ours.wall / bare.wall:.2f}; a CPU second {ours.cpu:,.0f} and {bare.cpu:,.0f}, "
                f"ratio {ours.cpu / bare.cpu:.2f}; a copy by row {by_row.wall:,.0f}, ratio "
                f"{ours.wall / by_row.wall:.2f}; and with its order from shards "
                f"{reader.wall:,.0f}, ratio {ours.wall / reader.wall:.2f}",
                flush=True,
            )
            for peer in peers:
                rates.setdefault(peer.name, []).append(measure_peer(peer, folder, args))
    finally:
        shutil.rmtree(folder)
    found = {}
    for name, measured in rates.items():
        found[f"{name}_rows_s"] = statistics.median(one.wall for one in measured)
        found[f"{name}_rows_cpu_s"] = statistics.median(one.cpu for one in measured)
        if name != "loader":  # pairs of one round
            pairs = list(zip(rates["loader"], measured, strict=True))
            found[f"times_{name}"] = statistics.median(a.wall / b.wall for a, b in pairs)
            found[f"times_{name}_cpu"] = statistics.median(a.cpu / b.cpu for a, b in pairs)
    print(json.dumps({**found, **vars(args)}))


if __name__ == "__main__":
    main()
