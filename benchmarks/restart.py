"""From the command to the first new step of an interrupted run of the 124M model.

    python -m benchmarks.restart --data DATASET [--config 124m] [--repeat 3] [--nproc 1]

A run is started once and stopped by max_steps after its first checkpoint, then started again and
again under `leyden train`, one step further each time. Told apart: until the command is past its
imports and has opened run, data and checkpoint ("ready", the line that names the step it goes on
from), until the first new step is recorded, and how long a later step of that attempt takes, which
is the part of a restart that is training. The peer is what no recipe can go below: importing
torch and Lightning in a bare interpreter. A step has one row, so that most of the time is start-up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3  # of each attempt: the first is the restart's, the others tell what a step takes


def command(args: argparse.Namespace, folder: Path, max_steps: int) -> list[str]:
    rows = ("--global_batch", str(args.nproc), "--micro_batch", "1", "--val_rows", "1")
    saves = ("--save_every_steps", "0", "--val_every_steps", "0", "--guard.policy", "skip")
    return [
        *(sys.executable, "-m", "launch.cli", "train", "pretrain", "--nproc", str(args.nproc)),
        *("--config", args.config, "--data.url", args.data, "--run", str(folder)),
        *("--max_steps", str(max_steps), *rows, *saves),
    ]


def attempt(args: argparse.Namespace, folder: Path, max_steps: int) -> dict[str, float]:
    """Seconds from the command on."""
    started = time.time()
    ready = 0.0
    process = subprocess.Popen(
        command(args, folder, max_steps), cwd=ROOT, text=True, bufsize=1,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if not ready and f"run {folder}" in line:
            ready = time.time() - started
    if process.wait() != 0:
        raise SystemExit("".join(said[-40:]))
    lines = (folder / "consumed.jsonl").read_text().splitlines()
    times = [float(json.loads(line)["time"]) for line in lines[-STEPS:]]
    later = [after - before for before, after in zip(times, times[1:], strict=False)]
    return {
        "ready_s": ready,
        "first_step_s": times[0] - started,
        "later_step_s": statistics.median(later),
        "all_s": time.time() - started,
    }


def imports_s() -> float:
    started = time.time()
    words = [sys.executable, "-c", "import torch, torch.distributed, pytorch_lightning"]
    subprocess.run(words, check=True)
    return time.time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="data/quickstart/dataset")
    parser.add_argument("--config", default="124m")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--nproc", type=int, default=1)
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(prefix="leyden-bench-") as work:
        folder = Path(work) / "run"
        first = attempt(args, folder, STEPS)
        print(f"first start: first step after {first['first_step_s']:.1f} s", flush=True)
        checkpoint = max((folder / "checkpoints").glob("step-*"), key=lambda one: one.name)
        size = sum(file.stat().st_size for file in checkpoint.iterdir())
        for number in range(args.repeat):
            bare = imports_s()
            facts = {**attempt(args, folder, STEPS * (number + 2)), "imports_s": bare}
            found.append(facts)
            print(
                f"restart: ready after {facts['ready_s']:.1f} s, first new step after "
                f"{facts['first_step_s']:.1f} s, of which a step takes {facts['later_step_s']:.1f} "
                f"s; bare imports {bare:.1f} s",
                flush=True,
            )
    medians = {key: statistics.median(one[key] for one in found) for key in found[0]}
    load = os.getloadavg()[0]
    print(json.dumps({**medians, "checkpoint_bytes": size, "load": load, **vars(args)}))


if __name__ == "__main__":
    main()
