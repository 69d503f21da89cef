"""`leyden cancel RUN`: end a run's jobs, at once or, with --drain, after a checkpoint."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from dist.errors import ConfigError, SetupError
from dist.local_files import write_atomic
from launch.live_jobs import Job, live_jobs, read_lease
from launch.status import find_run
from launch.submit_record import read_submits

DRAIN = "control/drain"


def scancel(jobs: list[Job]) -> None:
    """End jobs; SetupError with Slurm's own words if it refuses."""
    words = ["scancel", *(job.job_id for job in jobs)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise SetupError(f"cannot run scancel: {error.strerror}") from None
    if done.returncode != 0:
        raise SetupError(f"scancel refused: {' '.join(done.stderr.split())}")


def drain(run: Path, jobs: list[Job]) -> str:
    """Ask the run to stop after a checkpoint; jobs that wait are ended. Returns what was done."""
    waiting = [job for job in jobs if job.state == "PENDING"]
    running = [job for job in jobs if job.state != "PENDING"]
    if waiting:
        scancel(waiting)
    if running or read_lease(run):
        # The word tells the job not to be requeued (launch/policy.py).
        write_atomic(run / DRAIN, b"cancel\n")
        return "stops after at most two more steps and a checkpoint, and is not requeued"
    return f"had not started: job {', '.join(job.job_id for job in waiting)} was cancelled"


def main(arguments: list[str]) -> int:
    """End the jobs of a run."""
    parser = argparse.ArgumentParser(
        prog="leyden cancel",
        description="End a run's jobs. With --drain its ranks save first; leyden submit or "
        "leyden train goes on from there later.",
        epilog="examples: leyden cancel first    leyden cancel first --drain",
    )
    parser.add_argument("run", metavar="RUN", help="a run's name or folder")
    parser.add_argument("--drain", action="store_true", help="after a checkpoint")
    parser.add_argument("--run_root", default="runs", help="where runs lie (runs)")
    options = parser.parse_args(arguments)
    run = find_run(options.run, options.run_root)
    jobs = live_jobs(run) if read_submits(run) else []
    if jobs is None:
        raise SetupError("squeue cannot be asked which jobs the run has; use a login node")
    lease = read_lease(run)
    if not jobs and not lease:
        raise ConfigError(f"nothing of {run} runs or waits; leyden status {run} says how it ended")
    if options.drain:
        print(f"{run}: {drain(run, jobs)}")
        return 0
    if not jobs:
        raise ConfigError(
            f"{run} runs outside of Slurm, as process {lease.get('pid')} on {lease.get('host')}: "
            "pass --drain, or end that process"
        )
    scancel(jobs)
    print(f"{run}: cancelled job {', '.join(job.job_id for job in jobs)}")
    return 0


if __name__ == "__main__":
    from dist.errors import run_main

    run_main(lambda: main(sys.argv[1:]))
