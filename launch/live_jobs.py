"""Which jobs of a run Slurm knows, by squeue alone (sacct needs a database that many lack)."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dist.errors import SetupError
from dist.lease import holder_gone
from launch.slurm import job_name
from launch.submit_record import read_submits

_FORMAT = "%i|%T|%r|%S|%e|%N|%j"
_FIELDS = ("job_id", "state", "reason", "start", "end", "nodes", "name")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One line of squeue; times as Slurm writes them (2026-11-21T23:57:36, N/A)."""

    job_id: str
    state: str
    reason: str
    start: str
    end: str
    nodes: str
    name: str

    def words(self, now: float | None = None) -> str:
        """What the job does now, with what a person would want to know next."""
        if self.state == "PENDING":
            return self._waiting(time.time() if now is None else now)
        if self.state == "RUNNING":
            return f"running on {self.nodes} until {self.end}"
        return f"{self.state.lower()} on {self.nodes}" if self.nodes else self.state.lower()

    def _waiting(self, now: float) -> str:
        if self.reason.startswith("JobHeld"):
            who = "an administrator" if "Admin" in self.reason else "its user"
            return f"held by {who}: scontrol release {self.job_id}"
        if self.reason.startswith("launch failed requeued held"):
            return f"held because a node could not start it: scontrol release {self.job_id}"
        if self.reason == "BeginTime":
            left_s = _seconds_until(self.start, now)
            in_s = f" in {left_s:.0f} s" if left_s is not None and left_s > 0 else ""
            return f"waiting to be requeued{in_s}"
        if self.reason == "Dependency":
            return "waiting for the job before it"
        expected = "" if self.start in ("N/A", "") else f", expected to start {self.start}"
        return f"waiting ({self.reason}){expected}"


def _seconds_until(text: str, now: float) -> float | None:
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S")) - now
    except ValueError:
        return None


def ask_squeue(*filters: str) -> list[Job] | None:
    """Jobs that squeue lists; None where it is absent or does not answer."""
    # --array: a line for each task that waits, too.
    words = ["squeue", "--noheader", "--states=all", "--array", f"--format={_FORMAT}", *filters]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        # "Invalid job id" is an answer: Slurm has forgotten the job.
        return [] if "nvalid job id" in done.stderr else None
    lines = [line.strip().split("|") for line in done.stdout.splitlines()]
    return [Job(**dict(zip(_FIELDS, parts, strict=True))) for parts in lines if len(parts) == 7]


ENDED = (
    *{"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"},
    *{"DEADLINE", "OUT_OF_MEMORY", "REVOKED"},
)


def live_jobs(run: Path) -> list[Job] | None:
    """Jobs of a run that run or wait, by its job names; None if Slurm cannot be asked."""
    jobs = ask_squeue(f"--name={','.join(names_of(run))}")
    return None if jobs is None else jobs_of(run, jobs)


def names_of(run: Path) -> dict[str, set[str]]:
    """Job name -> job ids of the run; an empty set where all jobs of the name are the run's.

    The tasks of an array share their name, and each is another run.
    """
    names: dict[str, set[str]] = {job_name(str(run)): set()}
    for one in read_submits(run):
        if one.get("job_name"):
            names.setdefault(one["job_name"], set()).update(one.get("job_ids", []))
    return names


def jobs_of(run: Path, jobs: Sequence[Job]) -> list[Job]:
    """Those of `jobs` that belong to the run and have not ended."""
    names = names_of(run)
    return [
        job
        for job in jobs
        if job.state not in ENDED
        and job.name in names
        and (not names[job.name] or job.job_id in names[job.name])
    ]


def read_lease(run: Path) -> dict[str, object]:
    """The lease of the run's ranks, or of the front that starts them; {} if nobody holds one."""
    for name in ("lease.json", "front.json"):
        try:
            record = json.loads((run / name).read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and not holder_gone(record, time.time()):
            return record
    return {}


def refuse_if_live(run: Path) -> None:
    """SetupError if a job or a process works on the run, or if that cannot be found out."""
    jobs = live_jobs(run)
    if jobs is None and read_submits(run):
        raise SetupError(
            f"{run} was submitted before, and squeue cannot be asked whether a job of it still "
            "runs; submit where Slurm's commands work"
        )
    if jobs:
        job = jobs[0]
        raise SetupError(
            f"{run} has job {job.job_id} already, which is {job.words()}; leyden status {run} "
            f"shows it, leyden cancel {run} ends it, --fresh starts another run"
        )
    lease = read_lease(run)
    job_id = lease.get("job_id")
    if lease and not (job_id and jobs is not None):
        raise SetupError(
            f"{run} is in use by process {lease.get('pid')} on host {lease.get('host')}; wait "
            "until it ends, or end it"
        )
