"""Reading shards from a web server: throughput, waiting at a steady demand, and re-downloads.

    python -m benchmarks.remote [--mb 512] [--order sequential,global] [--no-peers]

1. One epoch from a plain HTTP server with ranges on loopback, cold: ours from the first request to
   the last batch, litData the same with worker processes and without. litData has no downloader
   for http; it gets one by its own register_downloader, which streams a chunk by urllib as ours.
2. The share of wall time that a consumer waits that takes 50 MB/s, cold; with and without the wait
   for its first batch, and the same from the local folder: what a busy machine alone costs.
3. Bytes downloaded over bytes delivered where the cache holds a fifth of the data. `global` runs
   some steps only: it reads nearly every shard in each.

`windowed` is the order for training, with --lanes lanes of at most 4 live shards: one node reads
all lanes here, so that 16 shards are live. `sequential` is what validation reads.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from benchmarks.loader import make_dataset, write_rows
from benchmarks.peer_env import TORCH, peer_python, run_peer
from dist.cache import CacheConfig
from dist.dataset import Dataset, open_dataset
from dist.loader import LoaderPlan, TokenLoader
from dist.order import Order, SequentialOrder
from dist.split_table import SplitTable
from dist.windowed import OrderMode, block_rows_of, make_order

BATCH = 64
WINDOW = 2  # at most 4 live shards a lane
SEQ_LEN = 2048
ROW_BYTES = (SEQ_LEN + 1) * 2


class _Files(BaseHTTPRequestHandler):
    """Files of a folder and ranges of them, by sendfile."""

    protocol_version = "HTTP/1.1"
    folder = Path()

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, *, send: bool) -> None:
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        size = path.stat().st_size
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        start, end = (int(found[1]), min(size, int(found[2]) + 1)) if found else (0, size)
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        if send:
            self.wfile.flush()
            with open(path, "rb") as file:
                self.connection.sendfile(file, start, end - start)


def serve(folder: str) -> None:
    """Run a server until the process is ended; prints its port."""
    _Files.folder = Path(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Files)
    print(server.server_address[1], flush=True)
    server.serve_forever()


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """URL of a server in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.remote", "--serve", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()


def order_of(name: str, split: SplitTable, lanes: int) -> Any:
    """An order by name."""
    if name == "sequential":
        return SequentialOrder(split.num_rows)
    if name == "global":
        return Order(split.num_rows, seed=1)
    block_rows = block_rows_of(split.row_start, lanes, WINDOW)
    mode = OrderMode(mode="windowed", lanes=lanes, window=WINDOW, block_rows=block_rows)
    return make_order(split.row_start, 1, mode)


def epoch(
    url: str,
    cache: Path,
    order_name: str,
    *,
    lanes: int,
    mb_s: float = 0.0,
    limit_gb: float = 0.0,
    steps: int = 0,
) -> dict[str, float]:
    """One epoch (or `steps` of it) with an empty cache, at a demand of `mb_s` (0: all there is)."""
    shutil.rmtree(cache, ignore_errors=True)
    dataset = open_dataset(url, CacheConfig(folder=str(cache), limit_gb=limit_gb))
    split = dataset.split("train")
    order = order_of(order_name, split, lanes)
    end = min(split.num_rows, steps * BATCH) if steps else split.num_rows
    plan = LoaderPlan(batch=BATCH, micro_batch=BATCH, end_t=end)
    counts = dataset.cache.counts
    fetched, evicted = counts.fetched_bytes, dataset.cache.folder.evicted
    started, first_s, rows = time.perf_counter(), 0.0, 0
    with TokenLoader(dataset, split, order, plan) as loader:
        begun = 0.0
        for batch in loader:
            if not rows:
                first_s = loader.wait_s
                begun = time.perf_counter()
            rows += len(batch.tokens)
            if mb_s:  # a training step that takes as long as its bytes last
                due = begun + (rows * ROW_BYTES) / (mb_s * 1e6) + loader.wait_s - first_s
                time.sleep(max(0.0, due - time.perf_counter()))
        wall_s, wait_s = time.perf_counter() - started, loader.wait_s
    dataset.cache.close()
    return {
        "mb_s": rows * ROW_BYTES / wall_s / 1e6,
        "wall_s": wall_s,
        "first_s": first_s,
        "wait_share": wait_s / wall_s,
        "later_wait_share": (wait_s - first_s) / max(wall_s - first_s, 1e-9),
        "downloaded_ratio": (counts.fetched_bytes - fetched) / (rows * ROW_BYTES),
        "evicted": dataset.cache.folder.evicted - evicted,
    }


def throughput(
    dataset: Dataset, url: str, folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Figure 1: ours and litData's, in turn."""
    rates: dict[str, list[float]] = {}
    python = "" if args.no_peers else peer_python("litdata", [TORCH, "litdata==0.2.76"])
    if python:
        write_rows(dataset, folder / "rows.npy", len(dataset.split("train").shards))
    for turn in range(args.repeat):
        for name in args.order.split(","):
            found = epoch(url, folder / f"cold-{name}-{turn}", name, lanes=args.lanes)
            rates.setdefault(f"loader_{name}", []).append(found["mb_s"])
            print(
                f"throughput {name}: {found['mb_s']:,.0f} MB/s, first batch after "
                f"{found['first_s']:.2f} s",
                flush=True,
            )
        for workers in ("0", "2") if python else ():
            words = [str(folder / "rows.npy"), str(folder / "litdata"), url, str(BATCH), workers]
            theirs = run_peer(python, "litdata_http.py", *words)
            rates.setdefault(f"litdata_{workers}_workers", []).append(theirs["mb_s"])
            print(
                f"throughput litData, {workers} workers: {theirs['mb_s']:,.0f} MB/s, first batch "
                f"after {theirs['first_s']:.2f} s",
                flush=True,
            )
    return {f"{name}_mb_s": round(statistics.median(one), 1) for name, one in rates.items()}


def waiting(url: str, dataset: Dataset, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Figure 2: the share of wall time that a consumer at a steady demand waits."""
    result = {}
    for name in args.order.split(","):
        asked: dict[str, Any] = {"lanes": args.lanes, "mb_s": args.demand_mb_s}
        waits = epoch(url, folder / f"wait-{name}", name, **asked)
        local = epoch(dataset.storage.url, folder / "none", name, **asked)
        print(
            f"{name}: waits {waits['wait_share']:.2%} of the time at a demand of "
            f"{args.demand_mb_s:.0f} MB/s ({waits['later_wait_share']:.2%} after its first batch, "
            f"which took {waits['first_s']:.2f} s; {local['later_wait_share']:.2%} from the local "
            "folder)",
            flush=True,
        )
        result |= {
            f"{name}_wait_share": round(waits["wait_share"], 4),
            f"{name}_later_wait_share": round(waits["later_wait_share"], 4),
            f"{name}_local_wait_share": round(local["later_wait_share"], 4),
        }
    return result


def downloads(url: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Figure 3: bytes downloaded over bytes delivered with a small cache."""
    result = {}
    limit_gb = args.mb * args.cache_share / 1e3
    for name in args.order.split(","):
        steps = args.global_steps if name == "global" else 0
        small = epoch(
            url, folder / f"small-{name}", name, lanes=args.lanes, limit_gb=limit_gb, steps=steps
        )
        of = f"{steps} steps" if steps else "an epoch"
        print(
            f"{name}: a cache of {limit_gb * 1e3:,.0f} of {args.mb:,} MB downloads "
            f"{small['downloaded_ratio']:,.2f} x what it delivers in {of}, {small['evicted']:.0f} "
            f"shards evicted, {small['wall_s']:.0f} s",
            flush=True,
        )
        result[f"{name}_downloaded_ratio"] = round(small["downloaded_ratio"], 3)
        shutil.rmtree(folder / f"small-{name}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mb", type=int, default=512)
    parser.add_argument("--shard-mb", type=int, default=4)
    parser.add_argument("--lanes", type=int, default=4)
    parser.add_argument("--order", default="sequential,windowed,global")
    parser.add_argument("--figures", default="throughput,waiting,downloads")
    parser.add_argument("--demand-mb-s", type=float, default=50.0)
    parser.add_argument("--cache-share", type=float, default=0.2)
    parser.add_argument("--global-steps", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    figures = args.figures.split(",")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="leyden-bench-"))
    result: dict[str, Any] = {}
    try:
        rows_per_shard = args.shard_mb * 1_000_000 // ROW_BYTES
        num_rows = args.mb // args.shard_mb * rows_per_shard
        dataset = make_dataset(folder / "data", num_rows, SEQ_LEN, rows_per_shard)
        with server(folder) as base:
            url = f"{base}/data"
            if "throughput" in figures:
                result |= throughput(dataset, url, folder, args)
            if "waiting" in figures:
                result |= waiting(url, dataset, folder, args)
            if "downloads" in figures:
                result |= downloads(url, folder, args)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
