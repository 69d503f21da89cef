"""What a run has measured and what Slurm says of itself: numbers for the lint rules."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

from dist.run_dir import RunDir
from launch.slurm import p99


def measured(run_dir: Path) -> dict[str, Any]:
    """step_p99_s, save_p99_s, startup_s and save_every_steps of a run; None where not logged."""
    run = RunDir(run_dir)
    steps = [float(x["step_s"]) for x in run.read_lines("metrics.jsonl") if "step_s" in x]
    saves = [
        float(x.get("stall_s", 0.0)) + float(x.get("write_s", 0.0))
        for x in run.read_lines("ledger.jsonl")
        if x.get("event") == "save" and not x.get("failure")
    ]
    return {
        "step_p99_s": p99(steps),
        "save_p99_s": p99(saves),
        "startup_s": _startup_s(run),
        "save_every_steps": _save_every(run_dir),
    }


def _startup_s(run: RunDir) -> float | None:
    """Longest time from a job's start to the first step of its attempt."""
    from dist.run_history import read_json

    first: dict[int, float] = {}
    for line in run.read_lines("consumed.jsonl"):
        if "time" in line:
            first.setdefault(int(line["attempt"]), float(line["time"]))
    took = []
    for attempt, time in first.items():
        started = read_json(run.attempt_dir(attempt) / "start.json").get("time")
        if started:
            took.append(time - float(started))
    return max(took, default=None)


def _save_every(run_dir: Path) -> int | None:
    try:
        text = (run_dir / "config.yaml").read_text()
    except OSError:
        return None
    found = re.search(r"^save_every_steps: (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None


def slurm_waits(partition: str) -> tuple[float | None, float | None]:
    """(KillWait, GraceTime of the partition) in seconds; None where Slurm cannot be asked.

    A GraceTime of 0 means that the partition gives none of its own.
    """
    config = _ask("scontrol", "show", "config")
    wait = re.search(r"^KillWait\s*=\s*(\d+)", config, re.MULTILINE)
    said = _ask("scontrol", "show", "partition", *([partition] if partition else []), "-o")
    lines = [x for x in said.splitlines() if partition or "Default=YES" in x]
    grace = re.search(r"\bGraceTime=(\d+)", lines[0]) if lines else None
    grace_s = float(grace[1]) if grace and int(grace[1]) > 0 else None
    return (float(wait[1]) if wait else None), grace_s


def _ask(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """Type of the file system that a path lies on, or will lie on; '' if not known."""
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return ""
    real = os.path.realpath(path)
    best = ("", "")
    for words in lines:
        if len(words) > 2:
            point = words[1].encode().decode("unicode_escape")
            if Path(real).is_relative_to(point) and len(point) >= len(best[0]):
                best = (point, words[2])
    return best[1]
