"""Prep jobs on the test cluster: a corpus, the command, and what of Spark is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.make_dataset import tokenizer_json
from tests.slurm_cluster import Cluster

ROOT = Path(__file__).resolve().parent.parent
CLUSTER_YAML = "nodes: 2\ncpus_per_task: 2\ntime_limit_min: 20\njoin_timeout_s: 100\n"


def write_corpus(folder: Path, *, files: int = 6, documents: int = 60) -> None:
    """Text files and a tokenizer.json."""
    (folder / "raw").mkdir(parents=True)
    for number in range(files):
        rng = np.random.default_rng(number)
        words = ["spark", "jar", "return", "def f(x):\n    return x", "store"]
        texts = [" ".join(rng.choice(words, int(rng.integers(5, 90)))) for _ in range(documents)]
        lines = "".join(json.dumps({"text": f"{number} {text}"}) + "\n" for text in texts)
        (folder / "raw" / f"{number}.jsonl").write_text(lines)
    (folder / "tokenizer.json").write_bytes(tokenizer_json())


def prep_words(folder: Path, output: Path, *more: str) -> list[str]:
    """The job's own arguments."""
    return [
        "prep", "tokenize-text", "--input", str(folder / "raw"), "--output", str(output),
        "--tokenizer", str(folder / "tokenizer.json"), "--seq_len", "32",
        "--validation_fraction", "0.2", "--shard_size_mib", "0.02", *more,
    ]  # fmt: skip


def leyden(work: Path, env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder of the test."""
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *words],
        cwd=work,
        env={**os.environ, **env, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


class SlurmPrep:
    """One submitted prep."""

    def __init__(self, cluster: Cluster, work: Path, *words: str) -> None:
        self.cluster = cluster
        done = leyden(work, cluster.env, *words, "--cluster", "cluster.yaml")
        assert done.returncode == 0, done.stderr
        self.job = done.stdout.split(" as job ")[1].split(";")[0]
        self.folder = Path(done.stdout.split("its record: ")[1].splitlines()[0])

    def said(self) -> str:
        """The job's output and the end of the daemons' logs."""
        paths = [*self.folder.glob("slurm-*.out"), *self.folder.glob("logs/*")]
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in paths)

    def exit_code(self) -> int:
        return int(self.cluster.job(self.job)["ExitCode"].split(":")[0])

    def processes(self, role: str = "") -> dict[int, str]:
        """Live processes of the job's Spark on this machine: id -> command line."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # ended meanwhile
            tags = [w for w in words if w.startswith(f"LEYDEN_SPARK={self.job}.".encode())]
            if tags and role in command:
                found[int(entry.name)] = f"{tags[0].decode()} {command[:200]}"
        return found
