"""MB/s of tokenize-text against datatrove's DocumentTokenizer and against the bare tokenizer.

    python -m benchmarks.prep [--sizes-mb 500,2000] [--peer-sizes-mb 20,60] [--cores 2]
                              [--repeat 2] [--no-peers]

The same documents in the same order, the same tokenizer.json, the same number of processes. Each
job is timed whole at two sizes into a new folder; the slope between them is its rate, and what is
left at size zero is its start (the JVM, planning, commit; datatrove's imports). datatrove would
take 10 to 30 minutes for 2 GB, so its two sizes are smaller; on its larger one our job runs too,
and the tokens of both are counted. The bare tokenizer is our engine in as many processes, on
documents already in memory: no reading, hashing, shuffle, packing or writing. All take turns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import site
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from benchmarks.peer_env import peer_python, run_peer
from dist.dataset import open_dataset
from dist.tokenizer import TextTokenizer

DATATROVE = "datatrove[processing,io]==0.10.1"
EOS = "<|end_of_text|>"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A folder of JSONL files, one a core, and the bytes of text in it."""

    folder: Path
    mb: float


def documents() -> Iterator[tuple[str, int]]:
    """(JSON line, bytes of text) of the installed packages' Python sources, over and over."""
    sources = sorted(Path(site.getsitepackages()[0]).rglob("*.py"))
    random.Random(0).shuffle(sources)  # so that every size has the same mix
    lines: list[tuple[str, int]] = []
    for source in sources:
        text = source.read_bytes().decode(errors="ignore")
        if text.strip():
            lines.append((json.dumps({"text": text}), len(text.encode())))
            yield lines[-1]
    for turn in count(1):
        for line, size in lines:
            yield f'{line[:-1]}, "turn": {turn}}}', size


def write_corpus(folder: Path, megabytes: float, num_files: int) -> Corpus:
    """The first documents, dealt out to the files in turn."""
    folder.mkdir()
    files = [open(folder / f"{n}.jsonl", "w", encoding="utf-8") for n in range(num_files)]  # noqa: SIM115
    written = 0
    for number, (line, size) in enumerate(documents()):
        files[number % num_files].write(line + "\n")
        written += size
        if written >= megabytes * 1e6:
            break
    for file in files:
        file.close()
    return Corpus(folder=folder, mb=written / 1e6)


def train_tokenizer(folder: Path) -> bytes:
    """The quickstart's kind of tokenizer, from 10 MB, by the job itself."""
    corpus = write_corpus(folder / "small", 10, 1)
    output = folder / "tokenizer"
    job("train_tokenizer", input=str(corpus.folder), output=str(output), vocab_size="4096")
    return (output / "tokenizer.json").read_bytes()


def job(name: str, **options: str) -> float:
    """Run a prep job as a user would; wall seconds."""
    command = [sys.executable, "-m", f"spark_jobs.{name}"]
    for key, value in options.items():
        command += [f"--{key}", value]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - started


def ours(corpus: Corpus, folder: Path, cores: int) -> tuple[float, int]:
    """(wall seconds, tokens) of our job into a new folder."""
    output = folder / "out"
    seconds = job(
        "tokenize_text",
        input=str(corpus.folder),
        tokenizer=str(folder / "tokenizer"),
        output=str(output),
        seq_len="2048",
        bos="",
        eos=EOS,
        master=f"local[{cores}]",
    )
    totals = open_dataset(str(output)).manifest.totals.values()
    shutil.rmtree(output)
    return seconds, sum(split["tokens"] for split in totals)


def datatrove(corpus: Corpus, folder: Path, cores: int, python: str) -> tuple[float, int]:
    """(wall seconds, tokens) of datatrove's pipeline into a new folder."""
    output = folder / "peer"
    tokenizer = str(folder / "tokenizer" / "tokenizer.json")
    words = (str(corpus.folder), tokenizer, EOS, str(output), str(cores))
    started = time.perf_counter()
    found = run_peer(python, "datatrove_tokenize.py", *words)
    seconds = time.perf_counter() - started
    shutil.rmtree(output)
    return seconds, int(found["tokens"])


def _encode_share(arguments: tuple[bytes, str]) -> tuple[float, int]:
    """(seconds of encoding alone, bytes) of one file of a corpus."""
    tokenizer_json, path = arguments
    with open(path, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    tokenizer = TextTokenizer(tokenizer_json, "kitoken")
    size = sum(len(text.encode()) for text in texts)
    started = time.perf_counter()
    for first in range(0, len(texts), 256):
        tokenizer.encode_batch(texts[first : first + 256])
    return time.perf_counter() - started, size


def bare_rate(tokenizer_json: bytes, corpus: Corpus) -> float:
    """MB/s of all cores encoding at once, a file each."""
    shares = [(tokenizer_json, str(path)) for path in sorted(corpus.folder.iterdir())]
    with multiprocessing.get_context("spawn").Pool(len(shares)) as pool:
        done = pool.map(_encode_share, shares)
    return sum(size for _, size in done) / 1e6 / max(seconds for seconds, _ in done)


def slope(small: Corpus, large: Corpus, small_s: float, large_s: float) -> tuple[float, float]:
    """(MB/s between two sizes, seconds left at size zero)."""
    rate = (large.mb - small.mb) / (large_s - small_s)
    return rate, small_s - small.mb / rate


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes-mb", default="500,2000")
    parser.add_argument("--peer-sizes-mb", default="20,60")
    parser.add_argument("--bare-mb", type=float, default=200.0)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core already, ours and theirs
    python = "" if args.no_peers else peer_python("datatrove", [DATATROVE])
    folder = Path(tempfile.mkdtemp(prefix="leyden-bench-"))
    try:
        tokenizer_json = train_tokenizer(folder)

        def corpora(sizes: str, name: str) -> list[Corpus]:
            wanted = [float(size) for size in sizes.split(",")]
            return [write_corpus(folder / f"{name}{mb:g}", mb, args.cores) for mb in wanted]

        small, large = corpora(args.sizes_mb, "ours")
        (bare,) = corpora(str(args.bare_mb), "bare")
        peer = [] if args.no_peers else corpora(args.peer_sizes_mb, "theirs")
        rounds: list[dict[str, float]] = []
        for _ in range(args.repeat):
            one: dict[str, float] = {}
            seconds = [ours(corpus, folder, args.cores)[0] for corpus in (small, large)]
            one["job_mb_s"], one["start_s"] = slope(small, large, *seconds)
            one["bare_mb_s"] = bare_rate(tokenizer_json, bare)
            one["of_bare"] = one["job_mb_s"] / one["bare_mb_s"]
            print(
                f"job {seconds[0]:.1f} s and {seconds[1]:.1f} s: {one['job_mb_s']:.1f} MB/s after "
                f"{one['start_s']:.1f} s; bare {one['bare_mb_s']:.1f} MB/s; "
                f"share {one['of_bare']:.2f}",
                flush=True,
            )
            if peer:
                theirs = [datatrove(corpus, folder, args.cores, python) for corpus in peer]
                one["datatrove_mb_s"], one["datatrove_start_s"] = slope(
                    peer[0], peer[1], theirs[0][0], theirs[1][0]
                )
                one["times_datatrove"] = one["job_mb_s"] / one["datatrove_mb_s"]
                print(
                    f"datatrove {theirs[0][0]:.1f} s and {theirs[1][0]:.1f} s: "
                    f"{one['datatrove_mb_s']:.2f} MB/s after {one['datatrove_start_s']:.1f} s; "
                    f"ours is {one['times_datatrove']:.1f}x",
                    flush=True,
                )
            rounds.append(one)
        found: dict[str, object] = {
            key: statistics.median(one[key] for one in rounds) for key in rounds[0]
        }
        if peer:
            whole_s, tokens = ours(peer[1], folder, args.cores)
            print(
                f"{peer[1].mb:.0f} MB whole: ours {whole_s:.1f} s and {tokens:,} tokens, "
                f"datatrove {theirs[1][0]:.1f} s and {theirs[1][1]:,} tokens"
            )
            found |= {"tokens": tokens, "datatrove_tokens": theirs[1][1]}
        print(json.dumps({**found, **vars(args)}))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
