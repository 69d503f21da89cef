"""MB/s of tokenize-text against the bare tokenizer, on the same documents and cores.

    python -m benchmarks.prep [--sizes-mb 300,900] [--cores 2] [--repeat 2]

The job is timed whole at two sizes, each into a new folder; the slope between them is its rate,
and what is left at size zero is the JVM's start, planning and commit. The bare tokenizer is the
same engine in as many processes as the job has cores, on the same documents already in memory:
no reading, hashing, shuffle, packing or writing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import site
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dist.tokenizer import TextTokenizer


def write_corpus(path: Path, megabytes: float) -> int:
    """JSONL of the installed packages' Python sources, again from the start when they run out."""
    sources = sorted(Path(site.getsitepackages()[0]).rglob("*.py"))
    written, turn = 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while True:
            for source in sources:
                text = source.read_bytes().decode(errors="ignore")
                if not text.strip():
                    continue
                file.write(json.dumps({"text": text, "turn": turn}) + "\n")
                written += len(text.encode())
                if written >= megabytes * 1e6:
                    return written
            turn += 1


def train_tokenizer(folder: Path) -> bytes:
    """The quickstart's kind of tokenizer, from 10 MB, by the job itself."""
    corpus = folder / "small.jsonl"
    write_corpus(corpus, 10)
    output = folder / "tokenizer"
    job("train_tokenizer", input=str(corpus), output=str(output), vocab_size="4096")
    return (output / "tokenizer.json").read_bytes()


def job(name: str, **options: str) -> float:
    """Run a prep job as a user would; wall seconds."""
    command = [sys.executable, "-m", f"spark_jobs.{name}"]
    for key, value in options.items():
        command += [f"--{key}", value]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def _encode_share(arguments: tuple[bytes, str, int, int]) -> tuple[float, int]:
    """(seconds of encoding alone, bytes) of every n-th document of a corpus."""
    tokenizer_json, path, start, step = arguments
    with open(path, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for i, line in enumerate(file) if i % step == start]
    tokenizer = TextTokenizer(tokenizer_json, "kitoken")
    size = sum(len(text.encode()) for text in texts)
    started = time.perf_counter()
    for first in range(0, len(texts), 256):
        tokenizer.encode_batch(texts[first : first + 256])
    return time.perf_counter() - started, size


def bare_rate(tokenizer_json: bytes, corpus: Path, cores: int) -> float:
    """MB/s of all cores encoding at once."""
    shares = [(tokenizer_json, str(corpus), i, cores) for i in range(cores)]
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        done = pool.map(_encode_share, shares)
    return sum(size for _, size in done) / 1e6 / max(seconds for seconds, _ in done)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes-mb", default="300,900")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    small, large = (float(size) for size in args.sizes_mb.split(","))
    folder = Path(tempfile.mkdtemp(prefix="leyden-bench-"))
    try:
        tokenizer_json = train_tokenizer(folder)
        sizes = {mb: write_corpus(folder / f"{mb:g}.jsonl", mb) / 1e6 for mb in (small, large)}
        rates, starts, bares = [], [], []
        for _ in range(args.repeat):
            seconds = {}
            for mb in sizes:
                output = folder / "out"
                seconds[mb] = job(
                    "tokenize_text",
                    input=str(folder / f"{mb:g}.jsonl"),
                    tokenizer=str(folder / "tokenizer"),
                    output=str(output),
                    seq_len="2048",
                    master=f"local[{args.cores}]",
                )
                shutil.rmtree(output)
            rate = (sizes[large] - sizes[small]) / (seconds[large] - seconds[small])
            rates.append(rate)
            starts.append(seconds[small] - sizes[small] / rate)
            bares.append(bare_rate(tokenizer_json, folder / f"{small:g}.jsonl", args.cores))
            print(
                f"job {seconds[small]:.1f} s and {seconds[large]:.1f} s: {rate:.1f} MB/s after "
                f"{starts[-1]:.1f} s; bare {bares[-1]:.1f} MB/s; share {rate / bares[-1]:.2f}"
            )
        found = {
            "job_mb_s": statistics.median(rates),
            "start_s": statistics.median(starts),
            "bare_mb_s": statistics.median(bares),
            "share": statistics.median(r / b for r, b in zip(rates, bares, strict=True)),
        }
        print(json.dumps({**found, **vars(args)}))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
