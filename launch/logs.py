"""`leyden logs RUN`: what a run's newest attempt said, of the whole job or of one rank."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from dist.errors import ConfigError
from launch.status import find_run

POLL_S = 0.5


def newest_attempt(run: Path) -> int:
    """Number of the newest attempt; ConfigError where there is none."""
    numbers = [int(path.name) for path in (run / "attempts").glob("*") if path.name.isdigit()]
    if not numbers:
        raise ConfigError(f"{run} has no attempt yet; leyden status {run} says what it waits for")
    return max(numbers)


def job_logs(run: Path, attempt: int) -> list[Path]:
    """The job's own log; one job writes all its attempts into one file."""
    job_id = _start(run, attempt).get("SLURM_JOB_ID", "*")
    return sorted(run.glob(f"slurm-{job_id}.out"))


def rank_logs(run: Path, attempt: int, rank: int) -> list[Path]:
    """Files of one rank. torchrun numbers nodes by the order of their names."""
    folder = run / "attempts" / str(attempt) / "logs"
    own = folder / f"rank-{rank}.log"
    if own.is_file():
        return [own]
    start = _start(run, attempt)
    nproc = int(start.get("NPROC", 0) or 0)
    nodes = sorted(start.get("nodes", []))
    if nodes and "SLURM_JOB_ID" not in start and folder.is_dir():
        # Of several nodes that `leyden train` started on, the first knows its own name only.
        nodes = sorted(path.name for path in folder.iterdir())
    if not nproc or rank >= nproc * len(nodes):
        known = f"ranks 0 to {nproc * len(nodes) - 1}" if nproc else "none by rank"
        raise ConfigError(f"no log of rank {rank} in attempt {attempt} of {run} (there: {known})")
    node, local = divmod(rank, nproc)
    return sorted((folder / nodes[node]).glob(f"*/attempt_0/{local}/std*.log"))


def _start(run: Path, attempt: int) -> dict[str, Any]:
    try:
        record = json.loads((run / "attempts" / str(attempt) / "start.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def copy_new(paths: list[Path], seen: dict[Path, int]) -> bool:
    """Print what has come since the last call; whether there was anything."""
    any_new = False
    for path in paths:
        with open(path, "rb") as file:
            file.seek(seen.get(path, 0))
            data = file.read()
        if data:
            seen[path] = seen.get(path, 0) + len(data)
            sys.stdout.buffer.write(data)
            any_new = True
    sys.stdout.flush()
    return any_new


def main(arguments: list[str]) -> int:
    """Print the log; with --follow until the run has ended."""
    parser = argparse.ArgumentParser(
        prog="leyden logs",
        description="What a run's newest attempt said: the job's log, or one rank's.",
        epilog="examples: leyden logs first    leyden logs first --rank 3 --follow",
    )
    parser.add_argument("run", metavar="RUN", help="a run's name or folder")
    parser.add_argument("--rank", type=int, help="one rank's own output")
    parser.add_argument("--attempt", type=int, help="another attempt than the newest")
    parser.add_argument("--follow", action="store_true", help="go on until the run has ended")
    parser.add_argument("--run_root", default="runs", help="where runs lie (runs)")
    options = parser.parse_args(arguments)
    run = find_run(options.run, options.run_root)
    seen: dict[Path, int] = {}
    while True:
        attempt = newest_attempt(run) if options.attempt is None else options.attempt
        ended = options.follow and _over(run, attempt)
        if options.rank is None:
            paths = job_logs(run, attempt)
            if not paths and "NPROC" in (started := _start(run, attempt)):
                # Of `leyden train`: rank 0 speaks for all.
                paths = [] if "SLURM_JOB_ID" in started else rank_logs(run, attempt, 0)
        else:
            paths = rank_logs(run, attempt, options.rank)
        if not paths and not options.follow:
            raise ConfigError(
                f"attempt {attempt} of {run} has no such log: a run that `torchrun` started "
                "speaks on its terminal; a job that just started has not spoken yet"
            )
        copy_new(paths, seen)
        if not options.follow or ended:
            return 0
        time.sleep(POLL_S)


def _over(run: Path, attempt: int) -> bool:
    """Whether no further attempt of this job will come."""
    try:
        end = json.loads((run / "attempts" / str(attempt) / "end.json").read_bytes())
    except (OSError, ValueError):
        return False
    return end.get("verdict") not in (75, 76)


if __name__ == "__main__":
    from dist.errors import run_main

    run_main(lambda: main(sys.argv[1:]))
