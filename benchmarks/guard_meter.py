"""What the guard, the meter and the watchdog cost a step: with them on and off, in turns.

    python -m benchmarks.guard_meter --data DATASET [--config tiny] [--steps 400] [--repeat 5]

Both runs are `python -m recipes.pretrain` on one process, logging every step, which makes the meter
work every step; the first ten steps are left out. What they do does not grow with the model (a few
scalars a step), and two runs of a model's quarter second differ by several per cent on these
machines, so the difference is taken where it shows: on a model of one small layer, whose step takes
some ten milliseconds. Prints the median step of each pair, the median difference, and its share of
a step of CONFIG, measured in the same run; the budget is 0.01.
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
SMALL = (
    *("--model.hidden_size", "64", "--model.num_layers", "1", "--model.num_heads", "2"),
    *("--model.num_kv_heads", "2", "--model.intermediate_size", "128"),
    *("--global_batch", "1", "--micro_batch", "1"),
)
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
    parser.add_argument("--steps", type=int, default=400, help="of the small model")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    pairs = []
    for number in range(args.repeat):
        # Who comes first changes with every pair, so that a drift of the machine cancels.
        turns = [("on", ON), ("off", OFF)] if number % 2 else [("off", OFF), ("on", ON)]
        found = {
            name: step_s(args.data, args.config, args.steps, (*SMALL, *opts))
            for name, opts in turns
        }
        pairs.append((found["on"], found["off"], found["on"] - found["off"]))
        print(
            f"small model: on {found['on'] * 1e3:.3f} ms, off {found['off'] * 1e3:.3f} ms, "
            f"difference {pairs[-1][2] * 1e3:.3f} ms",
            flush=True,
        )
    on_s, off_s, cost_s = (statistics.median(column) for column in zip(*pairs, strict=True))
    whole_s = step_s(args.data, args.config, 3 * WARM_UP, OFF)
    share = cost_s / whole_s
    print(f"{args.config}: {whole_s * 1e3:.0f} ms a step without them; they cost {share:.4f} of it")
    facts = {"on_s": on_s, "off_s": off_s, "cost_s": cost_s, "step_s": whole_s, "share": share}
    print(json.dumps({**facts, **vars(args)}))


if __name__ == "__main__":
    main()
