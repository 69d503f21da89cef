"""Time of a training step of the pretrain recipe against a hand-written loop with torch alone.

    python -m benchmarks.step --data DATASET [--config tiny] [--steps 60] [--repeat 3]
                              [--modes none,ddp,fsdp] [--ranks 2] [--micro-batch 1]

Mode `none` is one process; `ddp` and `fsdp` run on --ranks processes under torchrun, which share
the cores. The loops (benchmarks/by_hand.py) train the same model on the same rows with the same
optimizer, clipping and sharding, without Lightning, records, checkpoints or agreement on stopping.
Median step seconds of each run, the first ten left out; recipe and loop take turns, and which of
them begins. Goal: speed (by hand / recipe) of at least 0.98.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WARM_UP = 10


def start(ranks: int, module: str) -> list[str]:
    """The beginning of a command that runs a module on some ranks."""
    if ranks == 1:
        return [sys.executable, "-m", module]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    # As --standalone, which waits for minutes where the host's name does not resolve.
    agent += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return [*agent, "--local-addr", "127.0.0.1", "-m", "--", module]


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def recipe_step_s(args: argparse.Namespace, mode: str) -> float:
    """Median step of recipes.pretrain, from its metrics.jsonl."""
    with tempfile.TemporaryDirectory(prefix="leyden-bench-") as folder:
        command = start(1 if mode == "none" else args.ranks, "recipes.pretrain")
        command += ["--config", args.config, "--data.url", args.data]
        command += ["--max_steps", str(args.steps), "--run", f"{folder}/run", "--val_rows", "1"]
        command += ["--log_every_steps", "1", "--save_every_steps", "0"]
        command += ["--parallel.strategy", "ddp" if mode == "none" else mode]
        if args.micro_batch:
            command += ["--micro_batch", str(args.micro_batch)]
        run(command)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    seconds = [record["step_s"] for record in records if "step_s" in record]
    return statistics.median(seconds[WARM_UP:])


def by_hand_step_s(args: argparse.Namespace, mode: str) -> float:
    """Median step of the loop by hand."""
    command = start(1 if mode == "none" else args.ranks, "benchmarks.by_hand")
    command += [args.data, args.config, str(args.micro_batch), str(args.steps), mode]
    seconds = json.loads(run(command).strip().splitlines()[-1])
    return statistics.median(seconds[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="data/quickstart/dataset")
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--modes", default="none,ddp,fsdp")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=0, help="rows; 0: the config's")
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps must be above {WARM_UP}, which are left out")
    found: dict[str, dict[str, float]] = {}
    for mode in args.modes.split(","):
        pairs = []
        for number in range(args.repeat):
            if number % 2:
                by_hand, recipe = by_hand_step_s(args, mode), recipe_step_s(args, mode)
            else:
                recipe, by_hand = recipe_step_s(args, mode), by_hand_step_s(args, mode)
            pairs.append((recipe, by_hand, by_hand / recipe))
            print(
                f"{mode}: recipe {recipe:.4f} s, by hand {by_hand:.4f} s, "
                f"speed {by_hand / recipe:.3f}",
                flush=True,
            )
        columns = (statistics.median(column) for column in zip(*pairs, strict=True))
        names = ("recipe_step_s", "by_hand_step_s", "speed")
        found[mode] = dict(zip(names, columns, strict=True))
    print(json.dumps({**found, **vars(args)}))


if __name__ == "__main__":
    main()
