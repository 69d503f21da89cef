"""Step time of the pretrain recipe with `compile: blocks` against `off`, and what its start costs.

    python -m benchmarks.compile --data DATASET [--config tiny] [--steps 40] [--repeat 2]

Both train the same model on the same batches in one process; they take turns. Median step seconds
after the first ten steps, and seconds from the start of the process to the end of its first step:
once with an empty cache of compiled kernels (a first start) and once with a warm one (a restart).
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
from typing import Any

WARM_UP = 10


def train(data: str, config: str, steps: int, compiled: str, cache: str) -> dict[str, float]:
    """Median step and seconds to the first step's end of one run of the recipe."""
    with tempfile.TemporaryDirectory(prefix="leyden-bench-") as folder:
        run = Path(folder) / "run"
        command = [
            *(sys.executable, "-m", "recipes.pretrain", "--config", config, "--data.url", data),
            *("--max_steps", str(steps), "--run", str(run), "--val_rows", "1"),
            *("--log_every_steps", "1", "--save_every_steps", "0", "--compile", compiled),
        ]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        started = time.monotonic()
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        first_step_s = 0.0
        assert process.stderr is not None
        for line in process.stderr:  # the line about dtypes ends the first step
            if line.startswith(b"dtypes:"):
                first_step_s = time.monotonic() - started
        if process.wait():
            raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [record["step_s"] for record in records if "step_s" in record]
    return {"step_s": statistics.median(seconds[WARM_UP:]), "first_step_s": first_step_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="data/quickstart/dataset")
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps must be above {WARM_UP}")
    found: dict[str, list[dict[str, float]]] = {"off": [], "blocks": []}
    with tempfile.TemporaryDirectory(prefix="leyden-inductor-") as cache:
        for _ in range(max(2, args.repeat)):
            for name, results in found.items():
                results.append(train(args.data, args.config, args.steps, name, cache))
                print(name, json.dumps(results[-1]), flush=True)
    step = {
        name: statistics.median(r["step_s"] for r in results) for name, results in found.items()
    }
    record: dict[str, Any] = {
        "off_step_s": step["off"],
        "blocks_step_s": step["blocks"],
        "speed": step["off"] / step["blocks"],
        "off_first_step_s": found["off"][-1]["first_step_s"],
        "blocks_first_step_cold_s": found["blocks"][0]["first_step_s"],
        "blocks_first_step_warm_s": found["blocks"][-1]["first_step_s"],
    }
    print(json.dumps({**record, **vars(args)}))


if __name__ == "__main__":
    main()
