"""How long a run takes to know its data: order state, first rows, resume, and a large manifest.

    python -m benchmarks.start [--shards 10000] [--repeat 5]

The order at N = 10^6, 10^9 and 10^12 rows over a synthetic table of shards, global and windowed:
the time from the table to the first step's shards and rows, the same for a resume in the middle,
and the bytes of state that a checkpoint holds. Beside it stands what a permutation in memory costs,
numpy's own, where it fits: that is the peer. Then a manifest of 10,000 shards, in a folder with a
(sparse) file for each: reading and checking it, the shard table, and that every shard is present.
Each in a fresh interpreter, imports apart, medians over the repeats. Goals: flat, below 1 s, and
below 1 MB of order state.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist.commit import commit_dataset
from dist.dataset import open_dataset
from dist.manifest import Manifest, Shard
from dist.order import MODES, Order, OrderState
from dist.split_table import SplitTable
from dist.storage import Storage
from dist.verify import check_presence
from dist.windowed import MAX_LANES, OrderMode, auto_window, block_rows_of, make_order

NUM_ROWS = (10**6, 10**9, 10**12)
BATCH = 1024
LARGEST_IN_MEMORY = 10**8


def synthetic_shards(num_shards: int, num_rows: int) -> tuple[Shard, ...]:
    """Shards of equal rows (the last takes the rest), named as real ones are."""
    rows = max(1, num_rows // num_shards)
    shards = []
    for number in range(num_shards):
        digest = hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest()
        here = rows if number < num_shards - 1 else num_rows - rows * (num_shards - 1)
        shards.append(
            Shard(name=f"{digest}.arrow", rows=here, bytes=4096, xxh3_128=digest, split="train")
        )
    return tuple(shards)


def made_order(starts: NDArray[np.int64], mode: str) -> Any:
    """An order in the mode that a run would take, with as many lanes as it has at most."""
    if mode == "global":
        return make_order(starts, 1, OrderMode())
    window = auto_window(MAX_LANES)
    blocks = block_rows_of(starts, MAX_LANES, window)
    return make_order(
        starts, 1, OrderMode(mode=mode, lanes=MAX_LANES, window=window, block_rows=blocks)
    )


def order_facts(num_rows: int, num_shards: int, mode: str) -> dict[str, float]:
    """Seconds and bytes of one order, in this process."""
    shards = synthetic_shards(num_shards, num_rows)
    counts = [shard.rows for shard in shards]
    Order(1000, seed=1).rows(0, 1000)  # numpy imports some of itself at first use
    tracemalloc.start()
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    order = made_order(starts, mode)
    order.rows(0, BATCH)
    held = tracemalloc.get_traced_memory()[0]  # what stays: the table's row numbers, the order
    tracemalloc.stop()
    started = time.perf_counter()
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
    table = SplitTable(name="train", shards=shards, row_start=starts)
    order = made_order(starts, mode)
    _, rows = order.rows(0, BATCH)
    table.locate(rows)
    first_s = time.perf_counter() - started
    t = 3 * num_rows // 2  # in the middle of the second epoch
    digest = "0" * 64
    state = OrderState(
        data_digest=digest, seed=1, step=t // BATCH, t=t, batch=BATCH, mode=mode,
        lanes=getattr(order, "lanes", 0), block_rows=getattr(order, "block_rows", 0),
    )  # fmt: skip
    stored = json.dumps(state.to_dict()).encode()
    started = time.perf_counter()
    found = OrderState.from_dict(json.loads(stored))
    resumed = make_order(starts, found.seed, OrderMode.of(found))
    _, rows = resumed.rows(found.t, found.t + BATCH)
    table.locate(rows)
    resume_s = time.perf_counter() - started
    return {
        "first_s": first_s,
        "resume_s": resume_s,
        "state_bytes": len(stored),
        "held_bytes": held,
    }


def permutation_s(num_rows: int) -> float | None:
    """Seconds of a shuffled list of all rows, None where it would not fit."""
    if num_rows > LARGEST_IN_MEMORY:
        return None
    started = time.perf_counter()
    np.random.default_rng(1).permutation(num_rows)
    return time.perf_counter() - started


def make_dataset(folder: str, num_shards: int) -> None:
    """A committed dataset whose shards are sparse files of the right size."""
    storage = Storage(folder)
    shards = synthetic_shards(num_shards, num_shards * 1000)
    (Path(folder) / "shards").mkdir(parents=True)
    for shard in shards:
        with open(Path(folder) / "shards" / shard.name, "wb") as file:
            file.truncate(shard.bytes)
    rows = num_shards * 1000
    schema = {
        "seq_len": 2048,
        "token_dtype": "uint16",
        "vocab_size": 50_000,
        "bos_id": None,
        "eos_id": None,
        "rows_per_batch": 512,
    }
    totals = {"rows": rows, "documents": rows, "tokens": rows * 2049, "targets": rows * 2048}
    manifest = Manifest(
        kind="packed_tokens",
        schema=schema,
        tokenizer_digest=None,
        shards=shards,
        totals={"train": totals},
    )
    commit_dataset(storage, manifest, {}, "0" * 64)


def opening_facts(folder: str) -> dict[str, float]:
    """Seconds of opening a dataset, of its table and of the presence of all its shards."""
    started = time.perf_counter()
    dataset = open_dataset(folder)
    opened = time.perf_counter()
    table = dataset.split("train")
    _, rows = Order(table.num_rows, seed=1).rows(0, BATCH)
    table.locate(rows)
    located = time.perf_counter()
    check_presence(dataset)
    present = time.perf_counter()
    return {
        "open_s": opened - started,
        "first_s": located - opened,
        "presence_s": present - located,
        "all_s": present - started,
    }


def fresh(*words: str) -> dict[str, float]:
    """What this file measures in an interpreter of its own."""
    command = [sys.executable, "-m", "benchmarks.start", *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def medians(records: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(record[key] for record in records) for key in records[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--order", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--mode", default="global", help=argparse.SUPPRESS)
    parser.add_argument("--open", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.order:
        print(json.dumps(order_facts(args.order, args.shards, args.mode)))
        return
    if args.open:
        print(json.dumps(opening_facts(args.open)))
        return
    found: dict[str, object] = {}
    for mode, num_rows in itertools.product(MODES, NUM_ROWS):
        words = ("--order", str(num_rows), "--shards", str(args.shards), "--mode", mode)
        facts = medians([fresh(*words) for _ in range(args.repeat)])
        shuffled = permutation_s(num_rows)
        in_memory = "does not fit" if shuffled is None else f"{shuffled * 1e3:.1f} ms"
        print(
            f"{mode}, N = 10^{len(str(num_rows)) - 1}: first rows {facts['first_s'] * 1e3:.2f} "
            f"ms, resume {facts['resume_s'] * 1e3:.2f} ms, state {facts['state_bytes']:.0f} bytes, "
            f"order and shard table {facts['held_bytes']:,.0f} bytes; numpy.random.permutation "
            f"{in_memory}, {num_rows * 8:,} bytes",
            flush=True,
        )
        found[f"{mode}_{num_rows:.0e}"] = {**facts, "numpy_permutation_s": shuffled}
    with tempfile.TemporaryDirectory(prefix="leyden-bench-") as folder:
        make_dataset(folder + "/data", args.shards)
        facts = medians([fresh("--open", folder + "/data") for _ in range(args.repeat)])
    print(
        f"{args.shards} shards: manifest {facts['open_s'] * 1e3:.0f} ms, first rows "
        f"{facts['first_s'] * 1e3:.1f} ms, presence of every shard {facts['presence_s'] * 1e3:.0f} "
        f"ms, in all {facts['all_s'] * 1e3:.0f} ms"
    )
    print(json.dumps({**found, "manifest": facts, "shards": args.shards, "repeat": args.repeat}))


if __name__ == "__main__":
    main()
