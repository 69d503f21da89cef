"""`leyden status` over 1,000 runs: how long a person waits on a login node.

    python -m benchmarks.status [--runs 1000]

Each run has three attempts, 300 steps of metrics, a submit record and an outcome; squeue is not
there, as on a laptop. The process is timed from its start, the best of five. The first line is an
empty Python, for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AIM_S = 1.0


def write_run(folder: Path, number: int) -> None:
    """A run as training leaves it; every third one was killed."""
    for attempt in range(3):
        (folder / "attempts" / str(attempt)).mkdir(parents=True)
        (folder / "attempts" / str(attempt) / "start.json").write_text('{"time": 1.0}')
    config = {f"key_{i}": i for i in range(40)} | {"max_steps": 300}
    (folder / "run.json").write_text(json.dumps({"config": config}, indent=1))
    line = {"loss": 1.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 1e5, "step_s": 0.1}
    lines = [json.dumps({"step": step, **line}) for step in range(1, 301)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    submit = {"id": "x", "time": 1.0, "job_ids": [str(number)], "arguments": ["pretrain"]}
    (folder / "submit.json").write_text(json.dumps({"submits": [submit]}))
    if number % 3:
        outcome = {"status": "completed", "attempt": 2, "step": 300, "max_steps": 300}
        (folder / "outcome.json").write_text(json.dumps(outcome))


def best_s(*words: str, cwd: Path) -> tuple[float, str]:
    """Shortest of five wall times of a process, and its output."""
    times, out = [], ""
    for _ in range(5):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *words], cwd=cwd, check=True, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        times.append(time.perf_counter() - started)
        out = done.stdout
    return min(times), out


def main() -> int:
    """Print both times; 1 if status takes longer than the aim."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    num_runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as place:
        for number in range(num_runs):
            write_run(Path(place) / "runs" / f"run-{number:04}", number)
        empty_s, _ = best_s("-c", "pass", cwd=Path(place))
        took_s, out = best_s("-m", "launch.cli", "status", cwd=Path(place))
    assert len(out.splitlines()) == num_runs + 1, "every run has a line"
    print(f"python -c pass             {empty_s:.3f} s")
    print(f"leyden status, {num_runs} runs   {took_s:.3f} s (aim {AIM_S:.0f} s)")
    return 0 if took_s < AIM_S else 1


if __name__ == "__main__":
    sys.exit(main())
