"""Training that waits for a Slurm prep job, and starts on what that job has committed.

    python -m launch.after_prep RUN ATTEMPT PREP    in train.sbatch: prints the dataset, or 93

A job that has ended says nothing of its data: it may have failed after its commit, or ended well
in another folder. So the entry in jobs/ under the digest of that job's inputs and config decides.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist.errors import ConfigError, run_main
from dist.local_files import write_atomic
from launch.cli import nearest
from launch.live_jobs import ENDED, ask_squeue
from launch.policy import NEVER
from launch.prep_slurm import RECORD, absolute, read_prep

BOUND = "prep.json"
"""In the run: which prep job it waited for, and the dataset that it was bound to."""


def find_prep(reference: str, root: Path, cwd: Path) -> Path:
    """The record of a prep by its job id, its name or folder, or the dataset that it writes.

    The newest one where several write the same dataset. ConfigError if there is none.
    """
    for folder in (root / reference, cwd / reference):
        if (folder / RECORD).is_file():
            return Path(folder).resolve()
    found: list[tuple[float, Path]] = []
    known: list[str] = []
    for folder in sorted(root.glob("*/")):
        record = read_prep(folder)
        known += [str(record[name]) for name in ("job_id", "output") if record.get(name)]
        if reference == record.get("job_id") or absolute(reference, cwd) == record.get("output"):
            found.append((float(record.get("time", 0)), folder))
    if not found:
        raise ConfigError(
            f"--after-prep {reference}: no prep job with this id, name or output was submitted"
            f"{nearest(reference, known)} (looked in {root}; `leyden prep JOB --cluster F` "
            "submits one)"
        )
    return max(found)[1].resolve()


def check_data(prep: Path, url: str, cwd: Path) -> None:
    """ConfigError where --data.url names another dataset than the prep job writes."""
    record = read_prep(prep)
    output = str(record.get("output", ""))
    if record.get("job") == "train_tokenizer":
        raise ConfigError(f"--after-prep: {prep.name} makes a tokenizer, not a dataset")
    if url and output and absolute(url.partition("@")[0], cwd) != output:
        raise ConfigError(
            f"--data.url {url}, but the prep job {record.get('job_id')} writes {output}; leave "
            "--data.url out"
        )


def dependency(prep: Path) -> str:
    """`afterany:ID` while that job waits or runs; '' once it has ended (Slurm forgets it then)."""
    job = str(read_prep(prep).get("job_id", ""))
    jobs = ask_squeue(f"--jobs={job}")
    live = jobs is None or any(one.state not in ENDED for one in jobs)
    return f"afterany:{job}" if job and live else ""


def bind(run: Path, attempt: int, prep: Path) -> str:
    """URL@digest that this run trains on; '' if the prep job committed nothing.

    What it says is kept: a requeued attempt trains on the same version, whatever came later.
    """
    bound = _read(run / BOUND)
    if bound.get("prep") == str(prep):
        return str(bound["data"])
    from dist.commit import find_job
    from dist.storage import Storage

    record = read_prep(prep)
    digest = None
    if record.get("job_digest"):
        digest = find_job(Storage(record["output"]), record["job_digest"])
    facts = {name: record.get(name, "") for name in ("job_id", "job_digest", "output", "ended")}
    if digest is None:
        _refuse(run, attempt, _why(facts))
        return ""
    data = f"{record['output']}@{digest}"
    bound = {**facts, "prep": str(prep), "data": data, "time": time.time()}
    write_atomic(run / BOUND, _json(bound))
    if facts["ended"] not in ("0", ""):
        print(
            f"the prep job {facts['job_id']} ended with exit code {facts['ended']} after its "
            "commit; training goes on",
            file=sys.stderr,
        )
    return data


def _why(facts: dict[str, Any]) -> str:
    how = f"ended with exit code {facts['ended']}" if facts["ended"] else "was ended"
    where = f" to {facts['output']}" if facts["output"] else ""
    return (
        f"the prep job {facts['job_id']} {how} and has committed nothing{where}; see its log, "
        "submit it again, then this run"
    )


def _refuse(run: Path, attempt: int, why: str) -> None:
    """Say it where `leyden status` looks, as launch.policy does of an attempt that ran."""
    submits = _read(run / "submit.json").get("submits") or [{}]
    record = {
        "rc": NEVER, "status": "failed", "verdict": NEVER, "why": why, "time": time.time(),
        "drain": "", "submit": str(submits[-1].get("id", "")), "codes": [],
        "committed_start": 0, "committed_end": 0,
    }  # fmt: skip
    write_atomic(run / "attempts" / str(attempt) / "end.json", _json(record))
    print(f"error: attempt {attempt}: not again: {why}", file=sys.stderr)


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _json(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()


def command_line(words: Sequence[str]) -> int:
    """What train.sbatch asks for."""
    data = bind(Path(words[0]), int(words[1]), Path(words[2]))
    print(data)
    return 0 if data else NEVER


if __name__ == "__main__":
    run_main(lambda: command_line(sys.argv[1:]))
