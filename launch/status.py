"""`leyden status [RUN]`: where runs stand, from their folders first and then from squeue."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist.errors import ConfigError
from launch.live_jobs import Job, ask_squeue, jobs_of, live_jobs, read_lease
from launch.submit_record import read_submits

_TAIL_BYTES = 4096
_ENDED_WORDS = {
    "completed": "completed", "stopped": "stopped, resumable", "failed": "failed",
    "data_refused": "data refused", "hung": "hung", "no_restart": "not to be restarted",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One line of the list."""

    name: str
    words: str
    step: int | None
    max_steps: int | None
    attempts: int
    changed: float
    """When something was last written, seconds since the epoch."""

    def row(self) -> list[str]:
        step = "-" if self.step is None else f"{self.step:,}"
        of = f"/{self.max_steps:,}" if self.max_steps else ""
        return [self.name, self.words, step + of, str(self.attempts), _when(self.changed)]


def find_run(name: str, run_root: str) -> Path:
    """Folder of a run that was started or submitted; ConfigError lists the runs that there are."""
    for path in (Path(name) if "/" in name else Path(run_root) / name, Path(name)):
        if is_run(path):
            return Path(os.path.abspath(path))
    known = ", ".join(path.name for path in list_runs(Path(run_root))) or "none"
    raise ConfigError(
        f"no run at {Path(run_root) / name}; pass a run's name or its folder "
        f"(runs in {run_root}/: {known})"
    )


def is_run(path: Path) -> bool:
    # The folder of attempts alone: its ranks have not come as far as run.json.
    return any((path / name).exists() for name in ("run.json", "submit.json", "attempts"))


def list_runs(root: Path) -> list[Path]:
    """Folders of all runs of a root, by name."""
    try:
        return sorted(Path(entry.path) for entry in os.scandir(root) if is_run(Path(entry.path)))
    except FileNotFoundError:
        return []


def stand(run: Path, jobs: Sequence[Job] | None) -> Standing:
    """Where one run stands. `jobs` are its live jobs, None if Slurm cannot be asked."""
    outcome = _read(run / "outcome.json")
    metrics = last_line(run / "metrics.jsonl")
    try:
        attempts = len(os.listdir(run / "attempts"))
    except FileNotFoundError:
        attempts = 0
    step = metrics.get("step", outcome.get("step"))
    return Standing(
        name=run.name, words=_words(run, outcome, attempts, jobs), step=step,
        max_steps=outcome.get("max_steps") or _planned(run), attempts=attempts,
        changed=_changed(run),
    )  # fmt: skip


def _words(run: Path, outcome: dict[str, Any], attempts: int, jobs: Sequence[Job] | None) -> str:
    """What a run does now, or how it ended."""
    if jobs:
        first = min(jobs, key=lambda job: job.state != "RUNNING")
        asked = (run / "control" / "drain").exists() and first.state == "RUNNING"
        drain = ", asked to stop" if asked else ""
        return f"job {first.job_id} {first.words()}{drain}"
    lease = read_lease(run)
    submits = read_submits(run)
    if lease and not (jobs is not None and lease.get("job_id")):
        return f"running as process {lease.get('pid')} on {lease.get('host')}"
    end = _read(run / "attempts" / str(attempts - 1) / "end.json")
    if end.get("verdict") == 93:
        return f"ended for good: {end.get('why')}"
    # An outcome of an earlier attempt does not tell how this one ended.
    if outcome and int(outcome.get("attempt", -1)) >= attempts - 1:
        return _ENDED_WORDS.get(str(outcome.get("status")), "unknown")
    if submits and attempts == 0:
        gone = "" if jobs is None else ", but Slurm has no job of it"
        return f"submitted as job {', '.join(submits[-1].get('job_ids', []))}{gone}"
    if jobs is None and not end:
        return "no outcome yet, and Slurm cannot be asked whether its job runs"
    return "completed" if outcome.get("status") == "completed" else "killed, resumable"


def last_line(path: Path) -> dict[str, Any]:
    """The last whole JSON record of a log, read from its end."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            return record
    return {}


def _planned(run: Path) -> int | None:
    config = _read(run / "run.json").get("config", {})
    return config.get("max_steps") if isinstance(config, dict) else None


def _changed(run: Path) -> float:
    times = [run]
    times += [run / name for name in ("metrics.jsonl", "outcome.json", "submit.json")]
    found = []
    for path in times:
        try:
            found.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(found, default=0.0)


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, padded."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def list_text(root: Path) -> str:
    """All runs of a root, the newest first; one question to squeue for all of them."""
    runs = [Path(os.path.abspath(run)) for run in list_runs(root)]
    if not runs:
        return f"no runs in {root}/"
    jobs: list[Job] | None = []
    if any((run / "submit.json").exists() for run in runs):
        jobs = ask_squeue("--me")
    found = [stand(run, None if jobs is None else jobs_of(run, jobs)) for run in runs]
    found.sort(key=lambda one: -one.changed)
    return table([["run", "status", "step", "attempts", "changed"], *(one.row() for one in found)])


def run_text(run: Path) -> str:
    """One run: where it stands, its attempts, and what its time went into."""
    jobs = live_jobs(run) if read_submits(run) else []
    standing = stand(run, jobs)
    lines = [f"{run}: {standing.words}", f"step {standing.row()[2]}, {standing.attempts} attempts"]
    if jobs is None:
        lines.append("Slurm cannot be asked here (no squeue): this is what the run's folder says")
    excluded = _text(run / "control" / "exclude").split()
    if excluded:
        lines.append(f"excluded nodes: {', '.join(excluded)} (control/exclude; edit to allow them)")
    rows = [attempt_row(run, number) for number in range(standing.attempts)]
    if rows:
        lines += ["", table([["attempt", "job", "nodes", "started", "queued", "end"], *rows])]
    goodput = goodput_line(run)
    return "\n".join([*lines, *(["", goodput] if goodput else [])])


def attempt_row(run: Path, number: int) -> list[str]:
    """number, job, nodes, start, time in the queue, how it ended."""
    folder = run / "attempts" / str(number)
    start, env, end = (_read(folder / f"{name}.json") for name in ("start", "env", "end"))
    outcome = _read(folder / "outcome.json")
    began = start.get("time") or env.get("time")
    queued = queued_s(run, number)
    nodes = start.get("nodes") or [env.get("host", "-")]
    how = end.get("why") or outcome.get("status") or "no outcome"
    return [
        str(number), str(start.get("SLURM_JOB_ID", "-")), ",".join(nodes),
        _when(began) if began else "-", "-" if queued is None else f"{queued:.0f} s", str(how),
    ]  # fmt: skip


def queued_s(run: Path, number: int) -> float | None:
    """Seconds from the submit, or from the attempt before it in the same job, to the start."""
    start = _read(run / "attempts" / str(number) / "start.json")
    if not start:
        return None
    before = run / "attempts" / str(number - 1)
    if _read(before / "start.json").get("submit") == start.get("submit"):
        # The script writes the one, the ranks the other; a kill leaves neither.
        times = [_read(before / f"{name}.json").get("time") for name in ("end", "outcome")]
    else:
        times = [one["time"] for one in read_submits(run) if one.get("id") == start.get("submit")]
    known = [float(time) for time in times if time]
    return max(0.0, start["time"] - max(known)) if known else None


def goodput_line(run: Path) -> str:
    """What the attempts' time went into; '' where nothing was trained or numpy is missing."""
    try:
        from dist.report_facts import read_facts
        from dist.run_dir import RunDir

        facts = read_facts(RunDir(run))
    except (ImportError, ConfigError, KeyError):
        return ""
    queue = [queued_s(run, attempt.number) for attempt in facts.attempts]
    parts = {
        "useful": sum(one.useful_s for one in facts.attempts),
        "lost": sum(one.lost_s for one in facts.attempts),
        "queue": sum(seconds or 0.0 for seconds in queue),
        "start-up": sum(one.startup_s or 0.0 for one in facts.attempts),
        "save stall": sum(one.saves_s for one in facts.attempts),
    }
    if not any(parts.values()):
        return ""
    return "time: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items())


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def main(arguments: list[str]) -> int:
    """Print the list of runs, or one run."""
    parser = argparse.ArgumentParser(
        prog="leyden status",
        description="Where runs stand: from their folders, then from squeue (never sacct).",
        epilog="examples: leyden status    leyden status first    leyden status runs/first",
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="a run's name or folder; none: all")
    parser.add_argument("--run_root", default="runs", help="where runs lie (runs)")
    options = parser.parse_args(arguments)
    if options.run is None:
        print(list_text(Path(options.run_root)))
    else:
        print(run_text(find_run(options.run, options.run_root)))
    return 0


if __name__ == "__main__":
    from dist.errors import run_main

    run_main(lambda: main(sys.argv[1:]))
