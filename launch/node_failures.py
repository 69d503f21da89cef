"""Which nodes of a Slurm attempt have failed: attempts/<n>/failed_nodes, and control/exclude.

A node may be back, and idle, milliseconds after it took the job down (a reboot, a slurmd that lost
its connection). So its state now is only one of the witnesses:

    srun            says `Node failure on r2` (attempts/<n>/srun.log)
    the node        is down, drained, failing or silent now
    the node        was booted, or got a reason, since the attempt began
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

from dist.local_files import write_atomic

EXCLUDE = "control/exclude"
FAILED = "failed_nodes"
# A node in one of these states, or not answering (*), is not to be given work.
_BAD_STATES = re.compile(r"DOWN|DRAIN|FAIL|ERROR|NOT_RESPONDING|\*")
_SRUN = re.compile(r"^srun: (?:error: )?Node failure on (\S+)", re.MULTILINE)
_TIME = r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)"


def excluded(run: Path) -> list[str]:
    """Nodes that failed under this run, one a line; a person may edit the file."""
    try:
        return (run / EXCLUDE).read_text().split()
    except FileNotFoundError:
        return []


def failed_nodes(run: Path, attempt: int) -> dict[str, str]:
    """Node -> how it is known to have failed, as exclude_failed_nodes() has found out."""
    try:
        record = json.loads((run / "attempts" / str(attempt) / FAILED).read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(node): str(why) for node, why in record.items()}


def exclude_failed_nodes(run: Path, attempt: int, wait_s: float = 0.0) -> dict[str, str]:
    """Find the failed nodes of an attempt and exclude them from the run; node -> why.

    `wait_s`: how long to ask again while none is found.
    """
    folder = run / "attempts" / str(attempt)
    try:
        nodes = (folder / "nodes").read_text().split()
    except FileNotFoundError:
        return {}
    until = time.monotonic() + wait_s
    found = told_by_srun(folder, nodes) | told_by_slurm(folder, nodes)
    while not found and time.monotonic() < until:
        time.sleep(0.25)
        found = told_by_srun(folder, nodes)
    if not found:
        return {}
    write_atomic(folder / FAILED, (json.dumps(found, indent=1, sort_keys=True) + "\n").encode())
    known = excluded(run)
    new = [node for node in nodes if node in found and node not in known]
    if new:
        said = ", ".join(f"{node} ({found[node]})" for node in new)
        print(f"attempt {attempt}: excluded from now on: {said}", flush=True)
        write_atomic(run / EXCLUDE, ("\n".join([*known, *new]) + "\n").encode())
    return found


def told_by_srun(folder: Path, nodes: list[str]) -> dict[str, str]:
    """Node -> why, of those nodes of an attempt that srun named."""
    try:
        said = set(_SRUN.findall((folder / "srun.log").read_text(errors="replace")))
    except OSError:
        return {}
    return {node: "srun: node failure" for node in nodes if node in said}


def told_by_slurm(folder: Path, nodes: list[str]) -> dict[str, str]:
    """Node -> why, of those nodes of an attempt that the controller has something against."""
    began = _began(folder)
    found: dict[str, str] = {}
    for line in _show(nodes).splitlines():
        name = re.match(r"NodeName=(\S+)", line)
        why = _why_bad(line, began)
        if name and name[1] in nodes and why:
            found[name[1]] = why
    return found


def _why_bad(shown: str, began: float) -> str:
    """What `scontrol show node` has against a node; '' for nothing."""
    state = re.search(r"\bState=(\S+)", shown)
    if state and _BAD_STATES.search(state[1]):
        return f"state {state[1]}"
    booted = re.search(rf"\bBootTime={_TIME}", shown)
    if began and booted and _seconds(booted[1]) > began:
        return f"booted at {booted[1]}"
    reason = re.search(rf"\bReason=(.*?) \[\S*@{_TIME}\]", shown)
    if began and reason and _seconds(reason[2]) > began:
        return f"reason {reason[1]!r}"
    return ""


def _began(folder: Path) -> float:
    """When the attempt began, in whole seconds as Slurm's times are; 0 if unknown."""
    try:
        return float(int(json.loads((folder / "start.json").read_bytes())["time"]))
    except (OSError, ValueError, KeyError):
        return 0.0


def _seconds(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))


def _show(nodes: list[str]) -> str:
    """Slurm's words on nodes, a line each; '' if it cannot be asked."""
    words = ["scontrol", "show", "node", "-o", ",".join(nodes)]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
