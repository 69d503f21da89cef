"""Figure: `leyden --help` answers in under 0.3 s. Run: python -m benchmarks.help

Ours is a whole process, from fork to exit; beside it stand a bare `python -c pass`, which nothing
written in Python can beat, and `torchrun --help`, the front that a user would type otherwise.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 15
LIMIT_S = 0.3


def median_s(command: list[str], runs: int) -> float:
    """Median wall seconds of a command, after one run that warms the page cache."""
    seconds = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def main() -> int:
    """Print ours, the peers' and the ratios; 1 if ours is over the limit."""
    folder = Path(sys.executable).parent
    ours = median_s([str(folder / "leyden"), "--help"], RUNS)
    bare = median_s([sys.executable, "-c", "pass"], RUNS)
    peer = median_s([sys.executable, "-m", "torch.distributed.run", "--help"], 3)
    print(f"leyden --help     {ours * 1000:7.1f} ms   (median of {RUNS}, limit {LIMIT_S} s)")
    print(f"python -c pass    {bare * 1000:7.1f} ms   leyden takes {ours / bare:.1f}x")
    print(f"torchrun --help   {peer * 1000:7.1f} ms   leyden is {peer / ours:.0f}x faster")
    return 0 if ours < LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())
