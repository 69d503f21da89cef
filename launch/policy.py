"""What becomes of a job: done, again, or never again. Called by templates/train.sbatch.

    python -m launch.policy RUN ATTEMPT RC [--ending]    after the ranks; the exit code says what
    python -m launch.policy --start RUN ATTEMPT          before them: is a failed node among ours?
    python -m launch.policy --nodes RUN ATTEMPT          Slurm ends the job: has a node failed?
    python -m launch.policy --sweep RUN ATTEMPT          on each node: end what earlier ones left

Exit codes of the first: 0 done, 75 stopped and to be requeued, 76 failed and to be requeued,
93 never again, anything else: that failure, and no requeue. The run's outcome decides, not srun's
code, which may be the 143 of a node that srun ended because another one had failed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist.local_files import write_atomic
from launch.failures import first_failure
from launch.node_failures import EXCLUDE, exclude_failed_nodes, excluded, failed_nodes

DONE, AGAIN, RETRY, NEVER = 0, 75, 76, 93
MAX_CYCLES_WITHOUT_PROGRESS = 3
MAX_FAILURES = 20
WAIT_FOR_WORD_S = 3.0
"""Slurm ends the job first and says which node has failed a moment later; KillWait is longer."""
_STEP = re.compile(r"step-(\d+)-a\d+")


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How one attempt ended, and what the attempts of this submit were before it."""

    rc: int
    """Of srun."""
    status: str = ""
    """Of the attempt's outcome; '' if it left none."""
    error: str = ""
    codes: tuple[int, ...] = ()
    """Of the tasks that said so before they ended."""
    num_tasks: int = 0
    progress: tuple[bool, ...] = ()
    """For each judged attempt, this one last: whether the run had new committed steps after it."""
    failures: int = 0
    """Failed attempts before this one."""
    cancelled: bool = False
    """`leyden cancel --drain` asked for the stop."""


def status_of(ended: Ended) -> str:
    """The outcome's status; without one, what the tasks' own codes say; else failed."""
    if ended.status:
        return ended.status
    if ended.rc == 0 and ended.codes and len(ended.codes) == ended.num_tasks:
        if all(code == 0 for code in ended.codes):
            return "completed"
        if all(code in (0, 75) for code in ended.codes):
            return "stopped"
    return "failed"


def decide(ended: Ended) -> tuple[int, str]:
    """(exit code, why) for an attempt that ended by itself."""
    status = status_of(ended)
    if status == "completed":
        return DONE, "completed"
    if status == "stopped" and ended.cancelled:
        return DONE, "stopped, as leyden cancel asked"
    idle = 0
    for progress in reversed(ended.progress):
        if progress:
            break
        idle += 1
    if idle >= MAX_CYCLES_WITHOUT_PROGRESS:
        return NEVER, f"{idle} attempts in a row ended without new committed steps"
    if status == "stopped":
        return AGAIN, "stopped on request; a checkpoint is durable"
    if status == "no_restart":
        return NEVER, f"the run asked not to be restarted: {ended.error}"
    if status == "data_refused":
        return 3, f"the data was refused: {ended.error}"
    if ended.rc == 2 and not any(ended.progress):
        return 2, "the command line or config was refused; see the job's log"
    if ended.failures + 1 >= MAX_FAILURES:
        return NEVER, f"{ended.failures + 1} attempts failed"
    return RETRY, f"failed ({ended.error or f'exit code {ended.rc}'})"


def committed_step(run: Path) -> int:
    """Highest step of any committed checkpoint, retired ones too; 0 without any."""
    names = [path.parent.name for path in (run / "checkpoints").glob("step-*/COMMIT.json")]
    for line in _lines(run / "ledger.jsonl"):
        if line.get("event") == "save" and not line.get("failure"):
            names.append(str(line.get("checkpoint", "")))
    found = [_STEP.fullmatch(name) for name in names]
    return max((int(match[1]) for match in found if match), default=0)


def read_ended(run: Path, attempt: int, rc: int, launch: str = "") -> Ended:
    """Everything that decide() needs, from the run's folder."""
    folder = run / "attempts" / str(attempt)
    outcome = _read(folder / "outcome.json")
    if not outcome and rc == 0:
        # The run was complete before this attempt: rank 0 said so and took no part.
        whole = _read(run / "outcome.json")
        outcome = whole if whole.get("status") == "completed" else {}
    earlier = [
        end
        for number in range(attempt)
        if (end := _read(run / "attempts" / str(number) / "end.json"))
        and end.get("submit") == (launch or _submit(run))
        and not end.get("by_slurm")
    ]
    progress = [end["committed_end"] > end["committed_start"] for end in earlier]
    start = int(_read(folder / "start.json").get("committed", 0))
    codes = [_number(path) for path in sorted((folder / "ended").glob("*"))]
    return Ended(
        rc=rc, status=str(outcome.get("status", "")), error=str(outcome.get("error", "")),
        codes=tuple(codes), num_tasks=int(os.environ.get("SLURM_NTASKS", len(codes))),
        progress=(*progress, committed_step(run) > start),
        failures=sum(end.get("status") == "failed" for end in earlier),
        cancelled=_drain_reason(run) == "cancel",
    )  # fmt: skip


def end(run: Path, attempt: int, rc: int, *, ending: bool, launch: str = "") -> int:
    """Judge an attempt, write attempts/<n>/end.json and say so in one line.

    `launch` counts the attempts of one `leyden train` instead of those of the newest submit.
    """
    ended = read_ended(run, attempt, rc, launch)
    code, why = decide(ended)
    by_slurm = ending and code not in (DONE, NEVER)
    if by_slurm:
        # Slurm is ending the job: nobody's failure, and not ours to requeue.
        code, why = AGAIN, f"ended by Slurm ({status_of(ended)})"
    record = {
        "rc": rc, "status": status_of(ended), "verdict": code, "why": why, "time": time.time(),
        "drain": _drain_reason(run), "submit": launch or _submit(run), "codes": list(ended.codes),
        "committed_start": _read(run / "attempts" / str(attempt) / "start.json").get(
            "committed", 0
        ),
        "committed_end": committed_step(run), "by_slurm": by_slurm,
        "failed_nodes": failed_nodes(run, attempt),
        "first_failure": first_failure(run / "attempts" / str(attempt)),
    }  # fmt: skip
    write_atomic(run / "attempts" / str(attempt) / "end.json", _json(record))
    if by_slurm:
        print(f"attempt {attempt}: {why}", flush=True)
        return AGAIN
    said = {DONE: "done", AGAIN: "again", RETRY: "again", NEVER: "not again"}.get(code, "not again")
    print(f"attempt {attempt}: {said}: {why}", flush=True)
    return code


def start(run: Path, attempt: int) -> int:
    """Write attempts/<n>/start.json; 75 if a node that failed under this run is among ours."""
    nodes = begin(run, attempt)
    before = _read(run / "attempts" / str(attempt - 1) / "end.json") if attempt > 0 else {}
    if attempt > 0 and (not before or before.get("by_slurm")):
        exclude_failed_nodes(run, attempt - 1)
    bad = sorted(set(excluded(run)) & set(nodes))
    if bad:
        print(f"attempt {attempt}: {', '.join(bad)} failed before ({EXCLUDE}): requeued without")
        return AGAIN
    return 0


def begin(run: Path, attempt: int, *, launch: str = "", **facts: str) -> list[str]:
    """Write attempts/<n>/start.json; returns the attempt's nodes."""
    names = (
        *("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST", "SLURM_NTASKS"),
        *("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "NPROC"),
    )
    slurm = {name: os.environ[name] for name in names if name in os.environ}
    nodes = (run / "attempts" / str(attempt) / "nodes").read_text().split()
    record = {
        "time": time.time(), "committed": committed_step(run), "submit": launch or _submit(run),
    }  # fmt: skip
    write_atomic(
        run / "attempts" / str(attempt) / "start.json",
        _json({**record, **slurm, **facts, "nodes": nodes}),
    )
    return nodes


def sweep(run: str, attempt: str) -> int:
    """End processes of earlier attempts of this run on this machine; how many it were."""
    ended = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # ended meanwhile, or another user's
        settings = dict(word.split(b"=", 1) for word in words if b"=" in word)
        of_run = settings.get(b"LEYDEN_RUN_DIR") == os.fsencode(run)
        if of_run and settings.get(b"LEYDEN_ATTEMPT", attempt.encode()) != attempt.encode():
            try:
                os.kill(int(entry.name), signal.SIGKILL)
                ended += 1
            except (ProcessLookupError, PermissionError):
                continue
    if ended:
        print(f"attempt {attempt}: ended {ended} processes that an earlier attempt left behind")
    return ended


def _submit(run: Path) -> str:
    """Which `leyden submit` this job belongs to; a new one starts the counts afresh.

    Outside of Slurm (templates/torchrun.sh) the launch says so itself.
    """
    if os.environ.get("LEYDEN_LAUNCH_ID"):
        return os.environ["LEYDEN_LAUNCH_ID"]
    submits = _read(run / "submit.json").get("submits") or [{}]
    return str(submits[-1].get("id", ""))


def _drain_reason(run: Path) -> str:
    try:
        return (run / "control" / "drain").read_text().strip()
    except OSError:
        return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        data = path.read_bytes()
    except OSError:
        return []
    records = []
    for line in filter(None, data.split(b"\n")):
        try:
            records.append(json.loads(line))
        except ValueError:
            continue  # torn by a kill
    return [record for record in records if isinstance(record, dict)]


def _number(path: Path) -> int:
    text = path.read_text().strip()
    return int(text) if text.isdigit() else 1


def _json(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()


def main(arguments: Sequence[str]) -> int:
    """Read the words that train.sbatch gives."""
    words = list(arguments)
    if words[:1] == ["--start"]:
        return start(Path(words[1]), int(words[2]))
    if words[:1] == ["--nodes"]:
        exclude_failed_nodes(Path(words[1]), int(words[2]), wait_s=WAIT_FOR_WORD_S)
        return 0
    if words[:1] == ["--sweep"]:
        sweep(words[1], words[2])
        return 0
    return end(Path(words[0]), int(words[1]), int(words[2]), ending="--ending" in words[3:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
