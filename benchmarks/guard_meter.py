"""What the guard, the meter and the watchdog cost: step time with them on and off, in turns.

    python -m benchmarks.guard_meter --data DATASET [--config tiny] [--steps 120] [--repeat 5]

Both runs are `python -m recipes.pretrain` on one process, logging every step; the first ten steps
are left out. Prints the median step of each pair and the median ratio; the budget is 1.01.
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
OFF = ("--guard.policy", "off", "--meter.every_min", "0", "--watchdog.timeout_s", "0")
ON = ("--guard.policy", "skip", "--guard.spike_factor", "10", "--meter.every_min", "10")


def step_s(data: str, config: str, steps: int, options: tuple[str, ...]) -> float:
    """Median step of a run, from its metrics.jsonl."""
    with tempfile.TemporaryDirectory(prefix="leyden-bench-") as folder:
        command = [
            *(sys.executable, "-m", "recipes.pretrain", "--config", config, "--data.url", data),
            *("--max_steps", str(steps), "--run", f"{folder}/run", "--val_rows", "1"),
            *("--log_every_steps", "1", "--save_every_steps", "0", "--parallel.strategy", "ddp"),
        ]
        subprocess.run([*command, *options], check=True, capture_output=True)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line).get("step_s") for line in lines]
    return statistics.median([one for one in seconds if one is not None][WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="data/quickstart/dataset")
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    pairs = []
    for number in range(args.repeat):
        # Who comes first changes with every pair, so that a drift of the machine cancels.
        turns = [("on", ON), ("off", OFF)] if number % 2 else [("off", OFF), ("on", ON)]
        found = {name: step_s(args.data, args.config, args.steps, opts) for name, opts in turns}
        pairs.append((found["on"], found["off"], found["on"] / found["off"]))
        print(
            f"on {found['on']:.4f} s, off {found['off']:.4f} s, ratio {pairs[-1][2]:.4f}",
            flush=True,
        )
    on_s, off_s, ratio = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(json.dumps({"on_s": on_s, "off_s": off_s, "ratio": ratio, **vars(args)}))


if __name__ == "__main__":
    main()
